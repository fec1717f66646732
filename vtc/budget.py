"""From ``keep`` to integer counts: the one place where rounding happens, and where a budget is shared out.

``keep`` is a float in (0, 1], the fraction kept, or an int >= 1, the tokens kept per image. The float 1.0 is
everything; the int 1 is one token.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence

from vtc.values import as_float, shown

Keep = float | int


def check_keep(keep: Keep) -> Keep:
    """Return ``keep`` as a plain int or float, or say what is wrong with it.

    Raises:
        TypeError: not a number (``True`` and ``False`` count as none).
        ValueError: NaN, a float outside (0, 1], an int below 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(
            f"keep={shown(keep)} is not a number; give a float in (0, 1] (a fraction) or an int >= 1 (tokens per image)"
        )
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise ValueError(f"keep={shown(keep)} as an int counts the tokens kept per image and must be at least 1")
        return int(keep)
    value = as_float(keep)
    if not 0.0 < value <= 1.0:
        hint = f"; for {int(value)} tokens per image write keep={int(value)}" if 1.0 < value < 1e9 else ""
        raise ValueError(f"keep={shown(keep)} as a float is the fraction kept and must lie in (0, 1]{hint}")
    return value


def count(keep: Keep, n: int) -> int:
    """How many of an image's ``n`` tokens stay: at least one, at most all.

    A fraction is rounded as DivPrune's code does, ``int(round(keep * n))`` (half to even). An int above ``n`` keeps
    all of them, with a warning.
    """
    if isinstance(keep, int):
        if keep > n:
            warnings.warn(
                f"keep={shown(keep)} is more than the {n} visual tokens of an image: all are kept", stacklevel=2
            )
        return min(keep, n)
    return min(n, max(1, round(keep * n)))


def share(keep: Keep, n: int) -> float:
    """``keep`` as a fraction of ``n`` tokens, in (0, 1]."""
    return keep if isinstance(keep, float) else min(keep, max(n, 1)) / max(n, 1)


def truncated(share: float, n: int) -> int:
    """``int(share * n)``, as GlobalCom² and TransPrune count; a product that is whole but for round-off stays so."""
    return min(n, int(share * n + 1e-9))


def apportioned(total: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Divide ``total`` in proportion to ``sizes``, none above its size; the largest remainders get what is left over.

    Ties go to the first.
    """
    whole = sum(sizes)
    if not 0 <= total <= whole:
        raise ValueError(f"total={total} cannot be taken from {whole}")
    if not whole:
        return (0,) * len(sizes)
    counts = [total * n // whole for n in sizes]
    left = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))[: total - sum(counts)]
    return tuple(k + (i in left) for i, k in enumerate(counts))
