"""Options of a method: fields that say what is checked of the values that users give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

CHECK = "check"


def option(default: Any, check: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """A field of a method; what is given for it becomes ``check(name, value, *arguments, **more)``, or is refused.

        alpha: float = option(0.1, share, "it must lie in [0, 1]")

    ``None`` is not checked where the annotation allows it. A subclass that gives another default keeps the check.
    """
    return field(default=default, metadata={CHECK: lambda name, value: check(name, value, *arguments, **more)})


def check_options(method: Any) -> None:
    """Check what was given for every :func:`option` of a frozen dataclass.

    Raises:
        TypeError: a value of another kind.
        ValueError: a value that would not work.
    """
    for each in fields(method):
        value = getattr(method, each.name)
        if (check := check_of(type(method), each.name)) and not (value is None and "None" in str(each.type)):
            object.__setattr__(method, each.name, check(each.name, value))


def check_of(cls: type, name: str) -> Callable[[str, Any], Any] | None:
    """The check of a class's field, its own or inherited; ``None``: it has none."""
    given = (vars(base).get("__dataclass_fields__", {}).get(name) for base in cls.__mro__)
    return next((found.metadata[CHECK] for found in given if found is not None and CHECK in found.metadata), None)
