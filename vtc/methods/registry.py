"""The methods by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

from vtc.methods.base import Method
from vtc.values import shown

M = TypeVar("M", bound="type[Method]")

_REGISTRY: dict[str, type[Method]] = {}


def register_method(cls: M) -> M:
    """Class decorator: make a :class:`Method` known under its ``name`` (to ``vtc.patch``, configs and the CLI).

    Raises:
        ValueError: the name is taken, not lower case, or missing.
        TypeError: the class was written for an earlier contract.
    """
    old = [verb for verb in ("select", "keep_inside") if verb in vars(cls)]
    if old and getattr(cls, "__abstractmethods__", None):
        raise TypeError(
            f"{cls.__name__} has {old[0]}, which became reduce(stage, tokens, budget) -> vtc.Reduction(index); where "
            "tokens leave and what is needed there is said by stages(model). See docs/methods.md"
        )
    name = getattr(cls, "name", None)
    if not name or name != name.lower():
        raise ValueError(f"{cls.__name__}.name={shown(name)}: a method needs a lower-case name")
    if _REGISTRY.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"a method named {shown(name)} exists already: {_REGISTRY[name].__qualname__}")
    _REGISTRY[name] = cls
    return cls


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        ValueError: unknown; the message suggests the nearest names.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        near = difflib.get_close_matches(str(name).lower(), _REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(list_methods())}"
        raise ValueError(f"unknown method {shown(name)}; {hint}") from None


def make_method(name: str, **options: Any) -> Method:
    """Build a method by name; options it does not have are refused by name."""
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{name} has no option {', '.join(map(shown, unknown))}; its options: {', '.join(known)}")
    return cls(**options)


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_REGISTRY)


def blind_methods() -> list[str]:
    """Names of the methods that need no signal, as they are by default, nor a model trained for them."""
    return [name for name, cls in sorted(_REGISTRY.items()) if not cls.trained and not cls().signals()]
