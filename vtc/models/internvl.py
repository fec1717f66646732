"""InternVL: tiles of a picture follow one another without text in between, the thumbnail last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.models import clip
from vtc.models.base import Adapter, register_model, square
from vtc.tokens import Layout, Segment


@register_model
class InternVL(Adapter):
    """Square tiles, pixel-shuffled."""

    families = {"internvl": ("image",)}
    signals = ("cls", "cls_logits")
    notes = "tiles of a split image make one image; cls is averaged over the 2x2 patches behind a token"

    def merge(self, tiles: Sequence[Layout]) -> Layout:
        """The processor puts a thumbnail behind the tiles of a split image."""
        if len(tiles) == 1:
            return tiles[0]
        segments: list[Segment] = []
        for index, tile in enumerate(tiles):
            kind = "thumbnail" if index == len(tiles) - 1 else "crops"
            segments.append(Segment(kind, sum(t.length for t in tiles[:index]), tile.length, square(tile.length)))
        return Layout(sum(t.length for t in tiles), tuple(segments))

    def cls_attention(self, base: nn.Module, modality: str) -> nn.Module | None:
        return clip.cls_attention(base.vision_tower)

    def cls_scores(
        self, base: nn.Module, modality: str, rows: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        side = square(rows.shape[1])
        if side is None or clip.keeps_cls(base, arguments):
            raise ValueError(f"{rows.shape[1]} patches per tile are no square grid to shuffle")
        # the model's own shuffle gathers the patches behind a token into channels
        shuffled = base.pixel_shuffle(rows.reshape(-1, *side, 1), scale_factor=base.config.downsample_ratio)
        return list(torch.flatten(shuffled.mean(-1), 1))
