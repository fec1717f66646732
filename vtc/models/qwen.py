"""Families whose processor hands over a (time, height, width) grid per image: the Qwen-VL line and GLM-V."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.dialect.towers import Tower, knows_order, places, tower_of
from vtc.feed import Feed, Picture
from vtc.models import units
from vtc.models.base import Adapter, Parts, register_model
from vtc.tokens import Kind, Layout, Segment

_PIXELS = {  # (fewest, most) pixels of an image, and of a video; as published with the checkpoints
    "qwen2_vl": ((3136, 12845056), (128 * 28**2, 768 * 28**2)),
    "qwen2_5_vl": ((3136, 12845056), (128 * 28**2, 768 * 28**2)),
    "qwen3_vl": ((65536, 16777216), (4096, 25165824)),
    "qwen3_vl_moe": ((65536, 16777216), (4096, 25165824)),
    "qwen3_5": ((65536, 16777216), (4096, 25165824)),
    "glm46v": ((112**2, 15000 * 28**2), (112**2, 60000 * 28**2)),
}


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
        found = self.pictures(base, modality, arguments)
        if [layout.length for layout in found] != lengths:
            return [Layout.plain(n) for n in lengths]  # e.g. frames handed over one by one
        return found

    def pictures(self, base: Any, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        merge = base.config.vision_config.spatial_merge_size
        grids = torch.as_tensor(arguments[f"{modality}_grid_thw"]).tolist()
        sizes = [(t, h // merge, w // merge) for t, h, w in grids]
        kind: Kind = "image" if modality == "image" else "frame"
        return [
            Layout(
                t * rows * columns,
                tuple(Segment(kind, f * rows * columns, rows * columns, (rows, columns)) for f in range(t)),
            )
            for t, rows, columns in sizes
        ]

    def tower(self, base: Any, modality: str) -> Tower | None:
        tower = tower_of(base, modality)
        return Tower.of(tower) if knows_order(tower) else None

    def reduces(self, base: Any, modality: str) -> Literal["units"] | None:
        tower = self.tower(base, modality)
        return "units" if tower is not None and tower.mergers else None

    def pixels(self, modality: str, arguments: Mapping[str, Any]) -> Tensor:
        found: Tensor = arguments["pixel_values" if modality == "image" else "pixel_values_videos"]
        return found

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """Patches come unit by unit; in Qwen2.5-VL units come window by window."""
        unit = base.config.vision_config.spatial_merge_size**2
        means = values.unflatten(1, (-1, unit)).mean(2)
        order = places(tower_of(base, modality), torch.as_tensor(arguments[f"{modality}_grid_thw"]))
        if order is not None:
            means = means[:, order.to(means.device, non_blocking=True)]
        return units.split(means, [layout.length for layout in layouts])

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize as resize_video
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_image

        family, vision = parts.config.model_type, parts.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        pair = vision.temporal_patch_size
        fewest, most = _bounds(family, picture, settings)
        bounds = {"factor": patch * merge, "min_pixels": fewest, "max_pixels": most}
        shape = {"height": picture.height, "width": picture.width}
        if family == "glm46v" or (picture.frames is not None and family not in ("qwen2_vl", "qwen2_5_vl")):
            # a bound on the pixels of all frames together; an image counts as one pair of frames
            frames = max(picture.frames or pair, pair)
            height, width = resize_video(num_frames=frames, temporal_factor=pair, **shape, **bounds)
        else:
            height, width = resize_image(**shape, **bounds)
        times = -(-(picture.frames or 1) // pair)
        rows, columns = height // patch, width // patch
        tokens = rows * columns // merge**2
        words = f"resized to {width}x{height}: {columns // merge}x{rows // merge} tokens"
        if picture.frames is not None:
            words += f", {times} times ({pair} frames each)"
        return Feed(
            sequences=(rows * columns,) * times,
            patches=times * rows * columns,
            projected=times * tokens,
            lengths=(times * tokens,),
            words=words,
            windows=_windows(vision, rows // merge, columns // merge, merge, times),
            arguments={f"{picture.modality}_grid_thw": [[times, rows, columns]]},
        )

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Half the pixels that the picture has now, if the processor does not enlarge such a one again."""
        vision = parts.config.vision_config
        ((_, rows, columns),) = self.feed(parts, picture, settings).arguments["image_grid_thw"]
        most = rows * columns * vision.patch_size**2 // 2
        if most >= _bounds(parts.config.model_type, picture, settings)[0]:
            yield f"max_pixels={most}", {"max_pixels": most}


@register_model
class GlmV(Grids):
    """Video frames are written into image placeholders, one block a frame."""

    families = {"glm46v": ("image", "video")}

    def placeholders(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.image_token_id}


def _bounds(family: str, picture: Picture, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most pixels."""
    size = settings.get("size") or {}
    fewest, most = _PIXELS[family][picture.frames is not None]
    return (
        settings.get("min_pixels") or size.get("shortest_edge") or fewest,
        settings.get("max_pixels") or size.get("longest_edge") or most,
    )


def _windows(vision: Any, rows: int, columns: int, merge: int, times: int) -> tuple[tuple[int, int], ...]:
    """Qwen2.5-VL's windows over the merged grid; those at the far edges are what is left."""
    if not hasattr(vision, "window_size"):
        return ()
    side = vision.window_size // (merge * vision.patch_size)
    counts: dict[int, int] = {}
    for height in _pieces(rows, side):
        for width in _pieces(columns, side):
            size = height * width * merge**2
            counts[size] = counts.get(size, 0) + times
    return tuple(counts.items())


def _pieces(length: int, side: int) -> list[int]:
    whole, rest = divmod(length, side)
    return [side] * whole + [rest] * bool(rest)
