"""Whether a task has its answers judged by a model behind an API: read from its functions' code, without running it.

lmms-eval does not say so in a task's config. What a function can reach by the names in its code does: one of the
clients by which tasks talk to such a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

CLIENTS = ("lmms_eval.llm_judge", "openai", "anthropic", "google", "dashscope", "requests", "httpx", "aiohttp")
"""Modules that a task judges by, or asks a server with."""


def client(function: Callable[..., Any]) -> str | None:
    """The first of :data:`CLIENTS` that a function can reach through functions and classes of its task; ``None``: none.

    Args:
        function: any callable; what is written in C reaches nothing.
    """
    todo, seen = [function], set()
    while todo:
        here = todo.pop()
        here = inspect.unwrap(here.func if isinstance(here, functools.partial) else here)
        if id(here) in seen:
            continue
        seen.add(id(here))
        if inspect.isclass(here):
            todo += [value for value in vars(here).values() if callable(value)]
        elif inspect.isfunction(here):
            for name, value in _named(here):
                home = name if value is None else _home(value)
                if found := next((c for c in CLIENTS if home == c or home.startswith(f"{c}.")), None):
                    return found
                if value is not None and _of_a_task(home, here):
                    todo.append(value if inspect.isfunction(value) or inspect.isclass(value) else type(value))
    return None


def _named(function: Any) -> Iterator[tuple[str, Any]]:
    """Names in a function's code, inner functions too, with what they stand for among its globals (else ``None``)."""
    codes = [function.__code__]
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        for name in code.co_names:
            yield name, function.__globals__.get(name)


def _home(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    named = inspect.isfunction(value) or inspect.isclass(value)
    return str(getattr(value if named else type(value), "__module__", ""))


def _of_a_task(home: str, function: Any) -> bool:
    """Whether to read on: the same file, or lmms-eval itself; a library asks no model."""
    return home == function.__module__ or home.startswith("lmms_eval.")
