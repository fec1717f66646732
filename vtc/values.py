"""Values that users give: numbers of the right kind, and how an error shows them."""

from __future__ import annotations

import math
import numbers
from typing import Any

LONGEST = 200
"""Characters of a value that an error message shows whole."""


def shown(value: Any) -> str:
    """``repr(value)`` for an error message: of what is long, the two ends and the length."""
    try:
        text = repr(value)
    except Exception:  # an int of 5000 digits, an object that cannot describe itself
        return f"<a {type(value).__name__} that cannot be printed>"
    return shortened(text)


def shortened(text: str) -> str:
    """A text, or its two ends and its length where it is long."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 60]}...{text[-20:]} ({len(text)} characters)"


def number(
    name: str,
    value: Any,
    rule: str,
    least: float = -math.inf,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a float, which is no NaN.

    Args:
        name: of the option.
        value: as given.
        rule: what would work.
        least: at least this.
        above: more than this.
        below: less than this.

    Raises:
        TypeError: not a number (``True`` and ``False`` count as none, a Decimal is none either).
        ValueError: not a number that a float can hold, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={shown(value)} is not a number; {rule}")
    found = as_float(value)
    inside = found >= least and (above is None or found > above) and (below is None or found < below)
    if not inside:  # as of a NaN
        raise ValueError(f"{name}={shown(value)}: {rule}")
    return found


def as_float(value: numbers.Real) -> float:
    """The nearest float, an infinity for what is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def share(name: str, value: Any, rule: str, zero: bool = True) -> float:
    """``value`` as a float in [0, 1], or in (0, 1] without ``zero``; arguments and errors as :func:`number`."""
    found = number(name, value, rule)
    if not 0.0 <= found <= 1.0 or not (zero or found):
        raise ValueError(f"{name}={shown(value)}: {rule}")
    return found


def whole(name: str, value: Any, rule: str, least: int | None = None) -> int:
    """``value`` as an int, of at least ``least``; arguments as :func:`number`.

    Raises:
        TypeError: not a whole number.
        ValueError: below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={shown(value)} is not a whole number; {rule}")
    if least is not None and value < least:
        raise ValueError(f"{name}={shown(value)}: {rule}")
    return int(value)


def interval(name: str, value: Any, rule: str) -> tuple[float, float]:
    """``value`` as two floats, the first at most the second; arguments as :func:`number`.

    Raises:
        TypeError: not a tuple or list of two numbers.
        ValueError: falling.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}={shown(value)} is not a pair; {rule}")
    low, high = (number(name, end, f"{name}={shown(value)}: {rule}") for end in value)
    if low > high:
        raise ValueError(f"{name}={shown(value)}: {rule}")
    return low, high


def flag(name: str, value: Any) -> bool:
    """``value``, which is True or False.

    Raises:
        TypeError: it is something else, a text such as "no" for one, which Python would take for True.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} is neither True nor False")
    return value


def one_of(name: str, value: Any, *known: Any, rule: str = "") -> Any:
    """The one of the known values that ``value`` equals.

    Raises:
        ValueError: it is something else; ``rule`` is the reason.
    """
    if value not in known:
        what = f"is none of {', '.join(map(repr, known))}" if len(known) > 1 else f"must be {known[0]!r}"
        raise ValueError(f"{name}={shown(value)} {what}{rule and f': {rule}'}")
    return known[known.index(value)]
