"""What a vision tower attends to, and which of its patches each token depends on, with no vtc and no family.

The row is that of the attention weights that the layer gives in eager mode; the patches are found by asking autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from zoo import Batch
from zoo import models as zoo_models


def encoder_calls(batch: Batch) -> dict[str, dict[str, Tensor]]:
    """The arguments of `get_image_features` and `get_video_features` for a batch."""
    video = {"pixel_values_videos": batch["pixel_values_videos"]} if "pixel_values_videos" in batch else {}
    names = ("pixel_values", "pixel_values_images", "image_sizes")
    return {"image": {name: batch[name] for name in names if name in batch}, "video": video}


def tower_of(base: Any, modality: str) -> nn.Module:
    split = getattr(base, f"{modality}_tower", None)
    return base.vision_tower if split is None else split


def pixels_of(model: Any, batch: Batch, modality: str) -> Tensor:
    """What enters the tower, [pictures, 3, height, width]: seen by a hook, since families cut and reshape."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["pixel_values"])

    hook = tower_of(model.model, modality).register_forward_pre_hook(look, with_kwargs=True)
    try:
        features(model, batch, modality)
    finally:
        hook.remove()
    return seen[0]


def features(model: Any, batch: Batch, modality: str) -> list[Tensor]:
    """Visual tokens [n, d] of each entry that the encoder returns."""
    encoder = getattr(model.model, f"get_{modality}_features")
    output = encoder(
        *encoder_calls(batch)[modality].values(), return_dict=True
    ).pooler_output  # names differ by release
    return list(output)


@torch.no_grad()
def eager_rows(model: Any, batch: Batch, modality: str) -> Tensor:
    """Float32 [pictures, patches]: attention of CLS in the tower's last layer, from the weights that eager returns."""
    pixels, tower = pixels_of(model, batch, modality), tower_of(model.model, modality)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        weights = tower(pixels, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    assert len(weights) == tower.config.num_hidden_layers
    return weights[-1].mean(1)[:, 0, 1:]


@contextmanager
def tower_output(model: Any, modality: str) -> Iterator[list[Tensor]]:
    """Put a leaf of autograd where the tower's output was; families read `hidden_states` or `last_hidden_state`."""
    leaves: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        leaf = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(0))
        leaves.append(leaf.requires_grad_())
        output.last_hidden_state = leaf
        if output.hidden_states is not None:
            output.hidden_states = tuple(leaf for _ in output.hidden_states)
        return output

    hook = tower_of(model.model, modality).register_forward_hook(replace)
    try:
        yield leaves
    finally:
        hook.remove()


def sources(model: Any, batch: Batch, modality: str) -> list[Tensor]:
    """For every image, bool [n, pictures, 1 + patches]: what each of its tokens depends on."""
    with tower_output(model, modality) as leaves:
        entries = features(model, batch, modality)
    tokens = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in entries])
    weights = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(1))
    reached = []
    for token in tokens @ weights:
        if token.requires_grad:
            (gradient,) = torch.autograd.grad(token, leaves[0], retain_graph=True, allow_unused=True)
            reached.append((gradient != 0).any(-1))
    return list(torch.stack(reached).split(token_counts(batch, modality)))


def token_counts(batch: Batch, modality: str) -> list[int]:
    """Placeholders of every image of a modality, over all samples in order."""
    token = zoo_models.IMAGE if modality == "image" else zoo_models.VIDEO
    return [
        len(columns)
        for sample, images in zip(batch.samples, batch.images, strict=True)
        for columns in images
        if sample["input_ids"][0, columns[0]] == token
    ]


def scores_by_hand(rows: Tensor, reached: Tensor) -> Tensor:
    """Mean over the patches behind each token; 0 where there are none (newlines) and for CLS, which rows leave out."""
    behind = reached[..., 1:].float()
    return (behind * rows).sum((1, 2)) / behind.sum((1, 2)).clamp(min=1)
