"""An unpatched model, looked at eagerly: hidden states, keys and attention, and what it says blind to some columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from reference import Continuation, blind
from release import CACHE
from torch import Tensor
from zoo import GREEDY, NEW_TOKENS


@dataclass(frozen=True)
class Seen:
    """Of one sample without padding.

    hidden: by layer, [M, d], what enters it.
    keys: by layer, [M, Hkv * dh], after RoPE.
    attention: by layer, [H, M, M].
    """

    hidden: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]


@torch.no_grad()
def seen(model: Any, sample: dict[str, Tensor], stages: Sequence[tuple[int, Tensor]] = (), merge: Any = None) -> Seen:
    """One pass; ``stages`` and ``merge`` as in :func:`answered`."""
    with _changed(model, stages, merge or {}):
        out = model(**sample, output_attentions=True, output_hidden_states=True, use_cache=True)
    cache = out[CACHE]
    keys = tuple(layer.keys[0].transpose(0, 1).flatten(1) for layer in cache.layers)
    hidden = tuple(h[0] for h in out.hidden_states)
    return Seen(hidden, keys, tuple(a[0] for a in out.attentions))


def answered(
    model: Any,
    sample: dict[str, Tensor],
    stages: Sequence[tuple[int, Tensor]],
    merge: dict[int, Callable[[Tensor], Tensor]] | None = None,
) -> Continuation:
    """What it goes on to say when columns are hidden from some layer on.

    Args:
        model: unpatched.
        sample: its inputs.
        stages: from which layer on which columns are hidden, bool [M].
        merge: by layer, what becomes of the hidden states [M, d] that enter it.
    """
    with _changed(model, stages, merge or {}):
        out = model.generate(**sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, 1)[0]
    return Continuation(out.sequences[0, -NEW_TOKENS:], logits, torch.empty(0), logits)


def _changed(model: Any, stages: Sequence[tuple[int, Tensor]], merge: dict[int, Any]) -> ExitStack:
    model.set_attn_implementation("eager")
    layers = model.get_decoder().layers
    none = torch.zeros(1, dtype=torch.bool)
    gone = [none for _ in layers]
    for after, columns in stages:
        gone[after:] = [columns | seen for seen in gone[after:]]
    stack = ExitStack()
    if stages:
        stack.enter_context(blind(model, gone))
    for index, change in merge.items():

        def put(module: Any, args: Any, change: Any = change) -> Any:
            hidden = args[0].clone()
            now = change(hidden[0])
            hidden[0, : len(now)] = now
            return (hidden, *args[1:])

        stack.callback(layers[index].register_forward_pre_hook(put).remove)
    return stack
