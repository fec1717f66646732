"""What peers' public code does before the first token, written by us from descriptions (shared/methods.md).

For models of the shape of LLaVA-1.5: one picture in every prompt of a batch, at the same columns, no padding. Nothing
was copied. Each prefill gives the logits of the last position, and which of a picture's tokens stayed.

divprune    the official loop picks projected features of each picture; a shorter prompt with new positions goes on
fastv       all layers of the language model in eager attention, which return their maps (`output_attentions`); the last
            row of layer K-1's says what enters layer K
visionzip   the vision tower in eager attention, which returns its maps; the CLS row of the last layer but one and the
            keys there choose and merge, before the projector
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import published
from vtc.dialect.modules import attention_of, features_in, set_attention
from vtc.models import resolve

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prefill:
    """What a prefill gave.

    Attributes:
        logits: float [B, vocabulary], of the last position.
        kept: LongTensor [B, K], indices among the picture's tokens, ascending; ``None``: all.
    """

    logits: Tensor
    kept: Tensor | None


Way = Callable[[Any, Inputs, int], Prefill]
"""From a model, its inputs and how many tokens of a picture stay to a prefill."""


@contextlib.contextmanager
def eager(*modules: Any) -> Iterator[None]:
    """Their attention by plain products for a while: only that returns maps."""
    configs = [module.config for module in modules]
    before = [attention_of(config) for config in configs]
    try:
        for config in configs:
            set_attention(config, "eager")
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            set_attention(config, name)


def divprune(model: Any, inputs: Inputs, k: int) -> Prefill:
    """The official loop, picture by picture."""
    features = features_in(model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True))
    features = torch.stack([*features])
    kept = torch.stack([published.divprune(x, k).sort().values for x in features])
    short = features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
    return Prefill(_shorter(model, inputs, short), kept)


def visionzip(model: Any, inputs: Inputs, k: int) -> Prefill:
    """Dominant and contextual tokens, 54 to 10 as published; without the CLS token itself, which vtc leaves out too."""
    adapter, parts = resolve(model)
    tower = adapter.tower(parts.base, "image")
    assert tower is not None
    vision: Any = tower.module
    attention: Any = tower.attention(len(tower.layers) - 2)
    keys: list[Tensor] = []
    hook = attention.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    try:
        with eager(vision):
            seen = vision(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    finally:
        hook.remove()
    merged = min(k - 1, round(k * 10 / 64))
    looked = seen.attentions[-2][:, :, 0, 1:].sum(1)
    hidden = seen.hidden_states[-2][:, 1:]
    key = keys[-1][:, 1:].unflatten(2, (seen.attentions[-2].shape[1], -1)).mean(2)
    rows, kept = [], []
    for row in range(len(hidden)):
        values, places = _zipped(looked[row], hidden[row], key[row], k - merged, merged)
        rows.append(values)
        kept.append(places)
    features = model.model.multi_modal_projector(torch.stack(rows))
    return Prefill(_shorter(model, inputs, features), torch.stack(kept))


def fastv(model: Any, inputs: Inputs, k: int, layer: int = 2) -> Prefill:
    """Maps of every layer are made; one row of one of them is read."""
    decoder = model.model.language_model
    features = features_in(model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True))
    embeds, columns = _merged(model, inputs, torch.stack([*features]))
    found: dict[str, Any] = {}

    def look(module: Any, args: Any, output: Any) -> None:
        found["row"] = output[1][:, :, -1].mean(1)[:, columns]

    def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "index" not in found:
            found["kept"] = found["row"].topk(k).indices.sort().values
            before, behind = torch.arange(int(columns[0])), torch.arange(int(columns[-1]) + 1, embeds.shape[1])
            others = [part.to(embeds.device).expand(len(embeds), -1) for part in (before, behind)]
            found["index"] = torch.cat([others[0], columns[0] + found["kept"], others[1]], 1)
        hidden, index = args[0], found["index"]
        if hidden.shape[1] == embeds.shape[1]:
            hidden = _gathered(hidden, index)
        cos, sin = kwargs["position_embeddings"]
        rotary = tuple(_gathered(part.expand(len(index), -1, -1), index) for part in (cos, sin))
        new = index.shape[1]
        mask = torch.full((new, new), torch.finfo(hidden.dtype).min, device=hidden.device, dtype=hidden.dtype).triu(1)
        return (hidden, *args[1:]), kwargs | {"position_embeddings": rotary, "attention_mask": mask[None, None]}

    hooks = [decoder.layers[layer - 1].self_attn.register_forward_hook(look)]
    hooks += [at.register_forward_pre_hook(shorten, with_kwargs=True) for at in decoder.layers[layer:]]
    try:
        with eager(decoder):
            last = decoder(inputs_embeds=embeds, use_cache=True, output_attentions=True).last_hidden_state[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return Prefill(model.lm_head(last), found["kept"])


def _zipped(looked: Tensor, hidden: Tensor, key: Tensor, dominant: int, merged: int) -> tuple[Tensor, Tensor]:
    """Of one picture: values [dominant + merged, d], dominant ones first, and the places of all in raster order."""
    top = looked.topk(dominant).indices.sort().values
    others = torch.ones(len(looked), dtype=torch.bool, device=looked.device)
    others[top] = False
    left = others.nonzero()[:, 0]
    target = left[:: max(1, len(left) // max(1, merged))][:merged]
    others[target] = False
    rest = others.nonzero()[:, 0]
    unit = torch.nn.functional.normalize(key, dim=-1)
    nearest = (unit[rest] @ unit[target].mT).argmax(1)
    total = torch.zeros_like(hidden[target]).index_add(0, nearest, hidden[rest])
    count = torch.bincount(nearest, minlength=len(target)).clamp(min=1)[:, None]
    values = torch.cat([hidden[top], hidden[target] + total / count])
    return values, torch.cat([top, target]).sort().values


def _merged(model: Any, inputs: Inputs, features: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, d] with features [B, N, d] in them, and the columns [N] of the pictures."""
    ids = inputs["input_ids"]
    columns = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    embeds = model.get_input_embeddings()(ids)
    return embeds.index_copy(1, columns, features.to(embeds.dtype)), columns


def _shorter(model: Any, inputs: Inputs, features: Tensor) -> Tensor:
    """Logits of the last position of a prompt in which features [B, K, d] stand for the picture."""
    ids = inputs["input_ids"]
    columns = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    embeds = model.get_input_embeddings()(ids)
    first, behind = int(columns[0]), int(columns[-1]) + 1
    embeds = torch.cat([embeds[:, :first], features.to(embeds.dtype), embeds[:, behind:]], 1)
    last = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1]
    return model.lm_head(last)


def _gathered(sequence: Tensor, index: Tensor) -> Tensor:
    return sequence.gather(1, index[..., None].expand(-1, -1, sequence.shape[2]))


WAYS: dict[str, Way] = {"divprune": divprune, "fastv": fastv, "visionzip": visionzip}
"""By the name of vtc's method."""
