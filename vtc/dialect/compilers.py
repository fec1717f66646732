"""torch.compile from outside: wrappers to look through, what it has compiled so far, and what its graphs watch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import torch

COMPILED_SLOT = "_compiled_call"
"""Where generate keeps the call that it compiled."""

_INSIDE = "_orig_mod"
_SKIPS = "skip_nnmodule_hook_guards"
_NEVER_A_MODEL = ("flex_attention.py",)
"""Files whose functions are compiled by themselves, once for all models: no graph of theirs has a hook in it."""


def uncompiled(module: Any) -> Any:
    """The module inside the wrapper that ``torch.compile(module)`` returns; its hooks are those that always run."""
    while isinstance(module, torch.nn.Module) and _INSIDE in module._modules:
        module = module._modules[_INSIDE]
    return module


def never_alone(function: Any) -> None:
    """Make no graph that begins with this function. Within the graph of a caller it is traced as ever.

    All hooks are the same few lines, called with everything a model passes around: each would be a graph of its own,
    and soon more of them than dynamo makes of one function.
    """
    from torch._dynamo import eval_frame

    eval_frame.skip_code(function.__code__)


def compiled_inside(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether one of some modules was compiled, in place or in a wrapper."""
    return any(uncompiled(m) is not m or getattr(m, "_compiled_call_impl", None) is not None for m in modules)


def compiled_around() -> bool:
    """Whether what runs now was called by something compiled: as seen from what runs between graphs."""
    aside = _aside()
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == aside.co_filename and code is not aside:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _aside() -> Any:
    """The code that calls what runs between graphs; it stands in the file of what calls compiled functions."""
    return torch.compiler.disable(lambda: None).__code__


def watch_hooks() -> None:
    """Let graphs be bound to the hooks they were made with: a patched model's must not serve its unpatched twin.

    By default they are not, to spare a check for each call, and then two models of a class share what was compiled for
    the first of them. Graphs made before this know nothing of it: see :func:`forget`.
    """
    import torch._dynamo

    config = torch._dynamo.config
    setattr(config, _SKIPS, False)
    if (entry := getattr(config, "_config", {}).get(_SKIPS)) is not None:
        entry.default = False  # what is set counts in the thread that set it; others see the default


def forget(root: Any) -> None:
    """Drop every graph that may have been made of a model. Others go too: what is compiled cannot be asked whose it is.

    Nothing is lost but the time to compile once more.
    """
    known = root.__dict__.pop(COMPILED_SLOT, None) is not None
    if known or any(PurePath(code.co_filename).name not in _NEVER_A_MODEL for code in _compiled()):
        torch._dynamo.reset()


def _compiled() -> Iterable[Any]:
    """The code objects that have graphs."""
    from torch._dynamo import convert_frame

    found = (reference() for reference in convert_frame.input_codes.seen)
    return [code for code in found if code is not None]
