"""Families whose processor hands over a (time, height, width) grid per image: the Qwen-VL line and GLM-V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtc.models.base import Adapter, register_model
from vtc.tokens import Kind, Layout, Segment


@register_model
class Grids(Adapter):
    """Rows and columns after the 2x2 merge, frame by frame."""

    families = {
        "qwen2_vl": ("image", "video"),
        "qwen2_5_vl": ("image", "video"),
        "qwen3_vl": ("image", "video"),
        "qwen3_vl_moe": ("image", "video"),
        "qwen3_5": ("image", "video"),
    }
    notes = "3-D positions: positions='original' only; DeepStack features follow the kept tokens"

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None:
            return super().layouts(base, modality, lengths, arguments)
        merge = base.config.vision_config.spatial_merge_size
        sizes = [(t, h // merge, w // merge) for t, h, w in torch.as_tensor(grids).tolist()]
        if [t * rows * columns for t, rows, columns in sizes] != lengths:
            return [Layout.plain(n) for n in lengths]  # e.g. frames handed over one by one
        kind: Kind = "image" if modality == "image" else "frame"
        return [
            Layout(
                t * rows * columns,
                tuple(Segment(kind, f * rows * columns, rows * columns, (rows, columns)) for f in range(t)),
            )
            for t, rows, columns in sizes
        ]


@register_model
class GlmV(Grids):
    """Video frames are written into image placeholders, one block a frame."""

    families = {"glm46v": ("image", "video")}

    def placeholders(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.image_token_id}
