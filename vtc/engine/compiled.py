"""Under torch.compile: what vtc does runs between graphs, never inside them.

A hook that is traced would be baked into a graph, or stand aside in silence. So each is called through a graph break,
where it does what it does without a compiler: prompts are pruned, and masks of later steps translated. The exception is
a step of one column for which nothing is left to do; the decode step that ``generate`` compiles stays one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vtc.dialect import compilers
from vtc.dialect.arguments import CACHE, EMBEDS, HIDDEN, IDS
from vtc.dialect.caches import cache_in, is_prepared, prepared_for, pruned
from vtc.engine.context import current

_WORKS = (
    "fullgraph=False, generate(..., cache_implementation='static') which compiles decode steps by itself, or "
    "vtc.compress_inputs, whose shorter inputs any unpatched compiled model takes"
)
_REASON = (
    "vtc prunes visual tokens between graphs: what it decides depends on the prompt. A model under vtc.patch therefore "
    f"cannot be one graph (fullgraph=True). What works: {_WORKS}"
)


class between_graphs:
    """The same function; inside of what is compiled, it runs as it would outside.

    An object, not a closure: whoever copies or pickles a patched model comes through it to the patch, which says no.
    """

    def __init__(self, function: Callable[..., Any], *, steps_aside: bool = False) -> None:
        """Wrap.

        Args:
            function: a hook, or a part of what replaces a method.
            steps_aside: a hook that has nothing to do in a step of one column whose masks fit already.
        """
        self.function, self.steps_aside = function, steps_aside

        def plainly(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.broken_out = torch.compiler.disable(plainly, reason=_REASON)

    def __getstate__(self) -> dict[str, Any]:
        """Without the local function, which pickle would complain about before it meets the patch."""
        return {"function": self.function, "steps_aside": self.steps_aside}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, outside of any graph."""
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "torch.export cannot take a model under vtc.patch: which visual tokens stay is decided anew for each "
                "prompt, outside of what is exported. vtc.unpatch(model) first, and export the model as it is; it "
                "takes the shorter inputs of vtc.compress_inputs"
            )
        if self.steps_aside and torch.compiler.is_compiling() and _nothing_to_do(args, kwargs):
            return None
        return self.broken_out(*args, **kwargs)


compilers.never_alone(between_graphs.__call__)


def _nothing_to_do(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a module is a step of one column on a cache that lost nothing, or for which masks were made.

    This is traced: all it asks is of a kind that the compiler guards.
    """
    _, given, named = args[:3]
    cache = CACHE.read(named)
    if cache is None:
        cache = cache_in(given)
    if pruned(cache) and not is_prepared(cache):
        return False
    new = next((x for x in (EMBEDS.read(named), IDS.read(named), HIDDEN.read(named), *given) if x is not None), None)
    return isinstance(new, torch.Tensor) and new.dim() > 1 and new.shape[1] == 1


def saying_prepared(get_compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what gives ``generate`` its compiled call: masks that were just made for a pruned cache need no hook."""

    @functools.wraps(get_compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = get_compiled(*args, **kwargs)

        @functools.wraps(run, updated=())
        def running(*args: Any, **kwargs: Any) -> Any:
            cache, made = CACHE.read(kwargs), current().prepared
            if made is None or made.cache is not cache or not pruned(cache):
                return run(*args, **kwargs)
            with prepared_for(cache):
                return run(*args, **kwargs)

        return running

    return call
