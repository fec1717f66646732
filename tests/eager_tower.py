"""What patches receive, their keys and their features in towers without a CLS token, by an eager pass and no vtc.

The maps are what a layer's own eager function computes. What a token is made of is asked of autograd: no name of a
window, an order or a merger stands here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Batch


def tower_of(model: Any) -> Any:
    names = ("vision_tower", "visual", "vision_model")
    found = next(tower for name in names if (tower := getattr(model.model, name, None)) is not None)
    return getattr(found, "vision_model", found)


def layer_of(model: Any, layer: int) -> Any:
    tower = tower_of(model)
    holder = getattr(tower, "encoder", None) or getattr(tower, "transformer", tower)
    return (holder.layers if hasattr(holder, "layers") else holder.blocks)[layer]


def attention_of(layer: Any) -> Any:
    return next(found for name in ("self_attn", "attention", "attn") if (found := getattr(layer, name, None)))


def encoders(model: Any, batch: Batch) -> dict[str, Callable[[], list[Tensor]]]:
    """By modality, its encoder with the arguments that the unpatched model calls it with: entries [n, d]."""
    base, calls, depth = model.model, {}, [0]

    def spy(modality: str, encode: Any) -> Any:
        @functools.wraps(encode)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:  # one encoder may call another
                calls[modality] = functools.partial(encode, *args, **kwargs)
            depth[0] += 1
            try:
                return encode(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        for modality in ("image", "video"):
            if (encode := getattr(base, f"get_{modality}_features", None)) is not None:
                monkeypatch.setitem(base.__dict__, f"get_{modality}_features", spy(modality, encode))
        model(**batch)
    return {
        modality: lambda call=call: [entry.reshape(-1, entry.shape[-1]) for entry in call().pooler_output]
        for modality, call in calls.items()
    }


@contextmanager
def eagerly(model: Any) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def received_of(model: Any, encode: Callable[[], Any], layer: int) -> Tensor:
    """[pictures, tokens of the tower]: mean over heads, summed over the queries, of the maps that eager computes."""
    attention, maps = attention_of(layer_of(model, layer)), []
    source = sys.modules[type(attention).__module__]
    eager = source.eager_attention_forward

    def note(module: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, *args, **kwargs)
        if module is attention:
            maps.append(weights.float())
        return output, weights

    with eagerly(model), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(source, "eager_attention_forward", note)
        encode()
    return torch.cat([one.mean(1).sum(1) for one in maps], 1)  # sequences that share a row come one by one


@torch.no_grad()
def features_of(model: Any, encode: Callable[[], Any], layer: int) -> Tensor:
    """[pictures, tokens of the tower, width]: what a layer returns."""
    return _output(layer_of(model, layer), encode)


@torch.no_grad()
def keys_of(model: Any, encode: Callable[[], Any], layer: int) -> Tensor:
    """[pictures, tokens of the tower, dh]: its keys before any rotation, averaged over heads."""
    attention = attention_of(layer_of(model, layer))
    if hasattr(attention, "k_proj"):
        keys = _output(attention.k_proj, encode)
    else:
        keys = _output(attention.qkv, encode).chunk(3, -1)[1]
    return keys.unflatten(-1, (attention.num_heads, -1)).mean(2)


def _output(module: Any, encode: Callable[[], Any]) -> Tensor:
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        encode()
    finally:
        hook.remove()
    (output,) = seen
    output = output[0] if isinstance(output, tuple) else output
    return output if output.dim() == 3 else output[None]


def made_of(model: Any, encode: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Of each entry of an encoder's output [n, pictures, tokens of the tower]: what share each has in a token.

    A leaf stands where patches leave the tower's last layer (those that merge inside), or the tower. The tokens that
    depend on one have equal shares; behind a projector that takes them one by one the shares are the gradient.
    """
    merges, interpolates = hasattr(tower_of(model), "merger"), hasattr(model.model, "apply_pooling")
    leaves: list[Tensor] = []

    def leaf(like: Tensor) -> Tensor:
        leaves.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).requires_grad_())
        return leaves[-1]

    def instead(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return leaf(output)
        output.last_hidden_state = one = leaf(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(one for _ in output.hidden_states)
        return output

    inner = layer_of(model, -1) if merges else tower_of(model)
    hook = (model.model.multi_modal_projector if interpolates else inner).register_forward_hook(instead)
    try:
        entries = encode()
    finally:
        hook.remove()
    (source,) = leaves
    mix = torch.randn(entries[0].shape[1], generator=torch.Generator().manual_seed(1))
    found = []
    for entry in filter(len, entries):  # a sample may have none
        rows = []
        for token in entry[:, 0] if interpolates else entry @ mix:
            (slope,) = torch.autograd.grad(token, source, retain_graph=True, allow_unused=True)
            slope = torch.zeros_like(source) if slope is None else slope
            row = slope[..., 0] if interpolates else (slope != 0).any(-1).float()
            rows.append(row if interpolates else row / row.sum().clamp(min=1))
        shares = torch.stack(rows)
        found.append(shares if shares.dim() == 3 else shares[:, None])
    return found
