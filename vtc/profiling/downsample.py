"""Baselines that give the model a coarser picture instead of dropping tokens: every pruning method has to beat them.

``downsample`` makes the picture smaller, so that the vision tower has less to do too. What that means differs:

- Families whose token count follows the picture's size (Qwen-VL, GLM-V): the picture is resized before the processor.
- One fixed grid (LLaVA): the processor makes a smaller square, and the tower's position embeddings are interpolated to
  it, as transformers offers for CLIP and does for DINOv2. CLIP was never trained on that.
- Thumbnail and crops (LLaVA-NeXT): the thumbnail alone, made smaller (as above) where even that is over the budget.

``pool`` is for one fixed grid only: the tower sees the full picture, and the projected tokens are averaged over cells,
g x g in all. It costs what pruning costs, and on tinyvlm it answers better than the smaller picture.

Grids are square, so a budget is met to the nearest square; the numbers of tokens that are reported are the real ones.
Positions have no gaps: to the language model it is a smaller picture.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.budget import Keep, share
from vtc.dialect.modules import set_features
from vtc.models import resolve
from vtc.profiling.tasks import batches_of, placed

NAMES = ("downsample", "pool")
SQUARE = ("clip_vision_model", "dinov2")
"""Towers that read one square of patches, and can read a smaller one."""


@dataclass(frozen=True)
class Coarse:
    """A way to run a model on coarser pictures.

    Attributes:
        inputs: from questions to one batch of inputs.
        running: the context that the model has to run in.
    """

    inputs: Callable[[Sequence[Any]], dict[str, Any]]
    running: Callable[[], AbstractContextManager[Any]]


def coarse(name: str, model: Any, processor: Any, keep: Keep) -> Coarse:
    """The baseline ``name`` with about ``keep`` of the visual tokens.

    Raises:
        ValueError: it is not defined for this family.
    """
    _, parts = resolve(model)
    config, vision = parts.config, parts.config.vision_config
    if name == "downsample" and hasattr(vision, "temporal_patch_size"):
        return _resized(model, processor, keep)
    tower = getattr(vision, "model_type", "")
    if tower in SQUARE:
        side = vision.image_size // vision.patch_size
        if config.model_type == "llava":
            return (_smaller if name == "downsample" else _pooled)(model, processor, _grid(keep, side * side, side))
        if name == "downsample" and config.model_type == "llava_next" and tower == SQUARE[0]:
            return _thumbnail(model, processor, keep, side)
    raise ValueError(f"the baseline {name!r} is not defined for model_type {config.model_type!r}")


def _grid(keep: Keep, total: float, side: int) -> int:
    """The side, at most ``side``, of the square whose number of tokens is nearest to ``keep`` of ``total``."""
    wanted = share(keep, round(total)) * total
    return min(range(1, side + 1), key=lambda g: abs(g * g - wanted))


def _resized(model: Any, processor: Any, keep: Keep) -> Coarse:
    _, parts = resolve(model)

    def inputs(asked: Sequence[Any]) -> dict[str, Any]:
        full = batches_of(asked, processor, len(asked), "cpu", model.dtype)[0]["input_ids"]
        small = []
        for question, tokens in zip(asked, (full == parts.placeholders["image"]).sum(1).tolist(), strict=True):
            scale = math.sqrt(share(keep, tokens))
            width, height = (max(1, round(scale * side)) for side in question.image.size)
            small.append(SimpleNamespace(image=question.image.resize((width, height)), prompt=question.prompt))
        return batches_of(small, processor, len(small), model.device, model.dtype)[0]

    return Coarse(inputs, contextlib.nullcontext)


def _smaller(model: Any, processor: Any, g: int) -> Coarse:
    _, parts = resolve(model)
    pixels = g * parts.config.vision_config.patch_size

    def inputs(asked: Sequence[Any]) -> dict[str, Any]:
        batch = processor(
            images=[q.image for q in asked],
            text=[q.prompt for q in asked],
            size={"shortest_edge": pixels},
            crop_size={"height": pixels, "width": pixels},
            return_tensors="pt",
            padding=True,
        )
        return placed(batch, model.device, model.dtype)

    return Coarse(inputs, lambda: _interpolating(parts.base.vision_tower))


def _pooled(model: Any, processor: Any, g: int) -> Coarse:
    _, parts = resolve(model)

    def inputs(asked: Sequence[Any]) -> dict[str, Any]:
        batch = batches_of(asked, processor, len(asked), model.device, model.dtype)[0]
        return _fewer_placeholders(batch, parts.placeholders["image"], g * g)

    def pool(module: nn.Module, args: Any, features: Tensor) -> Tensor:
        side = math.isqrt(features.shape[1])
        cells = features.transpose(1, 2).unflatten(2, (side, side))
        return nn.functional.adaptive_avg_pool2d(cells, g).flatten(2).transpose(1, 2)

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        hook = parts.base.multi_modal_projector.register_forward_hook(pool)
        try:
            yield
        finally:
            hook.remove()

    return Coarse(inputs, running)


def _thumbnail(model: Any, processor: Any, keep: Keep, side: int) -> Coarse:
    _, parts = resolve(model)
    base, token = parts.base, parts.placeholders["image"]
    patch = base.config.vision_config.patch_size

    def inputs(asked: Sequence[Any]) -> dict[str, Any]:
        batch = batches_of(asked, processor, len(asked), model.device, model.dtype)[0]
        g = _grid(keep, float((batch["input_ids"] == token).sum()) / len(asked), side)
        batch = _fewer_placeholders(batch, token, g * g)
        batch["pixel_values"] = nn.functional.interpolate(
            batch["pixel_values"][:, 0].float(), (g * patch,) * 2, mode="bicubic", antialias=True
        ).to(model.dtype)
        return batch

    def encode(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = base.vision_tower(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True)
        features = outputs.hidden_states[base.config.vision_feature_layer]
        if base.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        set_features(outputs, list(base.multi_modal_projector(features)))
        return outputs

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        base.__dict__["get_image_features"] = encode
        try:
            yield
        finally:
            del base.__dict__["get_image_features"]

    return Coarse(inputs, running)


@contextlib.contextmanager
def _interpolating(tower: nn.Module) -> Iterator[None]:
    """Let a tower take pictures of another size: CLIP has to be asked, DINOv2 needs not."""
    if "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        yield
        return

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"interpolate_pos_encoding": True}

    hook = tower.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _fewer_placeholders(inputs: dict[str, Any], token: int, count: int) -> dict[str, Any]:
    """The prompts with ``count`` placeholders each, padded on the left where they had different numbers."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rank = (ids == token).cumsum(1)  # of a placeholder among those of its row
    keep = mask.bool() & ~((ids == token) & (rank > count))
    width = int(keep.sum(1).max())
    short = torch.zeros(len(ids), width, dtype=ids.dtype, device=ids.device)
    short_mask = torch.zeros_like(short)
    for row, (prompt, stays) in enumerate(zip(ids, keep, strict=True)):
        begin = width - int(stays.sum())
        short[row, begin:], short_mask[row, begin:] = prompt[stays], 1
    return inputs | {"input_ids": short, "attention_mask": short_mask}
