"""Towers in which patches merge, by hand: the model's own blocks one after the other, and loops between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.models import resolve

Merging = Callable[[int, Tensor, Tensor, list[float]], tuple[list[int], Tensor, list[float]]]
"""Block, patches [M, width] in front of it, what the block before attended with, sizes -> who stays, values, sizes."""


def entering(model: Any, inputs: Any) -> Tensor:
    """[pictures, T, width], what enters the first block of the image tower."""
    adapter, parts = resolve(model)
    tower, seen = adapter.tower(parts.base, "image"), []
    hook = tower.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def by_blocks(model: Any, state: Tensor, read: str, merging: Merging, logs: bool) -> tuple[list[int], Tensor]:
    """One picture [1, T, width] through the blocks that the language model sees: places of the patches left, values.

    Args:
        model: in eager attention.
        state: what enters the first block.
        read: `keys` [M, dh] or the `cls` row [M] of the block that just ran.
        merging: asked in front of every block but the first.
        logs: add the logarithm of sizes to the logits of keys.
    """
    adapter, parts = resolve(model)
    tower, depth = adapter.tower(parts.base, "image"), adapter.facts(parts).tower_depth
    special = tower.special
    places = list(range(state.shape[1] - special))
    sizes, attended = [1.0] * len(places), torch.empty(0)
    for index in range(depth):
        if index:
            stays, values, sizes = merging(index, state[0, special:], attended, sizes)
            places = [places[i] for i in stays]
            state = torch.cat([state[:, :special], values[None].to(state.dtype)], 1)
        layer, attention = tower.layers[index], tower.attention(index)
        inner = layer.layer_norm1(state)
        query, key = (
            p(inner).unflatten(-1, (attention.num_heads, -1))[0] for p in (attention.q_proj, attention.k_proj)
        )
        if read == "keys":
            attended = key.mean(1)[special:]
        else:
            rows = [(query[0, h] @ key[:, h].T * key.shape[-1] ** -0.5).softmax(-1) for h in range(attention.num_heads)]
            attended = torch.stack(rows).mean(0)[special:]
        mask = torch.zeros(1, 1, 1, state.shape[1])
        for i, size in enumerate(sizes):
            mask[..., special + i] = math.log(size) if logs else 0.0
        state = layer(state, attention_mask=mask.expand(-1, -1, state.shape[1], -1))
        state = state[0] if isinstance(state, tuple) else state
    return places, state[0, special:]


def projected(model: Any, inputs: Any, places: Sequence[Sequence[int]]) -> Tensor:
    """[pictures, M, width]: what a (patched) model's projector is given of the patches at these places.

    PaliGemma's gets zeros beside them.
    """
    seen: list[Tensor] = []
    first = next(m for m in resolve(model)[1].base.multi_modal_projector.modules() if isinstance(m, torch.nn.Linear))
    hook = first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    rows = torch.cat(seen)
    if rows.shape[1] == len(places[0]):
        return rows
    return rows.gather(1, torch.tensor(places)[..., None].expand(-1, -1, rows.shape[2]))


def last_norm(model: Any, rows: Tensor) -> Tensor:
    """What SigLIP makes of the last state before the projector gets it."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).post_layernorm(rows)
