"""Hooks under torch.compile: they run between its graphs, except in the one step that needs none of them.

What a prompt keeps is decided on the host and changes shapes, and a decode step on a pruned cache needs its masks
translated; neither belongs into a graph. So a hook that finds itself traced breaks the graph and runs as always. The
exception is a decode step on a cache of fixed size whose masks ``generate`` has prepared: it compiles to one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.arguments import CACHE, EMBEDS, HIDDEN, IDS, MASK
from vtc.dialect.caches import has_fixed_size, ledger_of
from vtc.dialect.generation import COMPILED_SLOT

_REASON = (
    "vtc decides between graphs which visual tokens stay. Compile with fullgraph=False, or let generate compile decode "
    "steps (cache_implementation='static'), or compile the unpatched model and give it vtc.compress_inputs(...)"
)


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook (with keywords) that runs outside the graphs that torch.compile makes."""
    eager = _disabled(hook, recursive=True)

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return hook(module, args, kwargs, *output)
        if torch.compiler.is_exporting():
            raise RuntimeError(f"a patched model cannot be exported, vtc.unpatch it first: {_REASON}")
        if _needs_nothing(args, kwargs):
            return None
        return eager(module, args, kwargs, *output)

    return call


def method_outside_graphs(
    original: Callable[..., Any], wrapped: Callable[..., Any], active: Callable[[], bool]
) -> Callable[..., Any]:
    """A method that does what ``wrapped`` does while ``active``, outside graphs; modules it calls still compile.

    Once it is not active it is the original again: somebody may hold it, or have wrapped it.
    """
    eager = _disabled(wrapped, recursive=False)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not active():
            return original(*args, **kwargs)
        return eager(*args, **kwargs) if torch.compiler.is_compiling() else wrapped(*args, **kwargs)

    return call


def _disabled(function: Callable[..., Any], *, recursive: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # bound methods and partials take no attributes
        return function(*args, **kwargs)

    return torch.compiler.disable(call, recursive=recursive, reason=_REASON)


def _needs_nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has one new column, for which all was prepared where ``generate`` makes the inputs of a step."""
    entering = args[0] if args else None
    for role in (HIDDEN, EMBEDS, IDS):
        if entering is None:
            entering = role.read(kwargs)
    if not isinstance(entering, Tensor) or entering.dim() < 2 or entering.shape[1] != 1:
        return False
    cache, mask = CACHE.read(kwargs), MASK.read(kwargs)
    if cache is None:
        return True
    prepared = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
    return has_fixed_size(cache) and (prepared or ledger_of(cache) is None)


def forget_graphs(modules: Iterable[nn.Module]) -> None:
    """Graphs that were compiled before do not see hooks added since, and the other way round."""
    for module in modules:
        module.__dict__.pop(COMPILED_SLOT, None)
    if torch._dynamo.convert_frame.FRAME_COUNTER:
        torch._dynamo.reset()
