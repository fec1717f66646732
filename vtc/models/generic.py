"""Families that need next to nothing: they are listed because they are tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtc.models.base import Adapter, register_model, square
from vtc.tokens import Layout


@register_model
class Plain(Adapter):
    """One entry per image, no structure that a method could use."""

    families = {"mistral3": ("image",)}

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return [Layout.plain(n) for n in lengths]
        cell = base.config.vision_config.patch_size * base.config.spatial_merge_size
        grids = [(int(h) // cell, int(w) // cell) for h, w in torch.as_tensor(sizes).tolist()]
        return [Layout.plain(n, g if g[0] * g[1] == n else None) for n, g in zip(lengths, grids, strict=True)]


@register_model
class Tiles(Adapter):
    """The processor writes text around every tile of a split image; the encoder returns a sample's tiles in one go."""

    families = {"idefics3": ("image",), "smolvlm": ("image",)}
    notes = "every tile of a split image counts as an image of its own"

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        each = base.image_seq_len
        return [Layout.plain(each, square(each)) for _ in range(sum(lengths) // each)]


@register_model
class PrefixLM(Adapter):
    """Image tokens see each other in both directions; the engine prunes the masks that the base model prepares."""

    families = {"gemma3": ("image",), "paligemma": ("image",)}
    notes = "image tokens attend in both directions; kept ones still do"


@register_model
class Gemma4(PrefixLM):
    """Pictures of any shape: a square number of tokens is no square."""

    families = {"gemma4": ("image",)}

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        return [Layout.plain(n) for n in lengths]
