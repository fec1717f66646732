"""From the size of a picture to counts: what several families share. Each family's own rule is its adapter's ``feed``.

The rules are transformers' own functions wherever it has them without needing pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vtc.dialect.towers import Tower, tower_of
from vtc.feed import Feed, Picture
from vtc.models import clip
from vtc.models.base import Parts


def one(value: Any) -> int:
    """A side that some configs write twice."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def side(parts: Parts) -> int:
    """Patches along a side of one picture."""
    vision = parts.config.vision_config
    return one(vision.image_size) // one(vision.patch_size)


def has_cls(parts: Parts, picture: Picture) -> bool:
    """Whether the tower that a picture goes through has a CLS token."""
    tower = Tower.of(tower_of(parts.base, picture.modality))
    return tower is not None and bool(tower.special)


def squares(parts: Parts, picture: Picture, count: int, each: int, words: str, **more: Any) -> Feed:
    """``count`` square pictures that become ``each`` tokens; the projector gets one row for each token."""
    patches = side(parts) ** 2
    rows = patches + has_cls(parts, picture)
    size = one(parts.config.vision_config.image_size)
    values: dict[str, Any] = {
        "projected": count * each,
        "lengths": (each,) * count,
        "words": f"{words} of {size}x{size}",
    } | more
    return Feed(sequences=(rows,) * count, patches=count * patches, **values)


def features(parts: Parts, picture: Picture) -> int:
    """Features of one picture: its patches, and CLS where that is not left out."""
    return side(parts) ** 2 + (clip.keeps_cls(parts.base, {}) and has_cls(parts, picture))


def frames(picture: Picture) -> dict[str, Any]:
    """What a video encoder is called with, as far as layouts ask for it."""
    return {"pixel_values_videos": torch.empty(1, picture.frames or 1, device="meta")}


def pixtral(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    """Pictures of any shape, as Pixtral's processor sizes them."""
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    vision, merge = parts.config.vision_config, getattr(parts.config, "spatial_merge_size", 1)
    longest = _longest(parts, settings)
    blank, cell = torch.empty(3, picture.height, picture.width, device="meta"), one(vision.patch_size) * merge
    height, width = get_resize_output_image_size(blank, longest, cell, "channels_first")
    rows, columns = height // cell, width // cell
    return Feed(
        sequences=(rows * columns * merge**2,),
        patches=rows * columns * merge**2,
        projected=rows * columns,
        lengths=(rows * columns,),
        words=f"resized to {width}x{height}: {columns}x{rows} tokens",
        arguments={"image_sizes": [[height, width]]},
    )


def pixtral_budgets(
    parts: Parts, picture: Picture, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Shorter longest sides than the picture has now, an eighth of it each."""
    now = min(_longest(parts, settings), max(picture.width, picture.height))
    for eighths in range(7, 0, -1):
        size = {"longest_edge": now * eighths // 8}
        yield f"size={size}", {"size": size}


def _longest(parts: Parts, settings: Mapping[str, Any]) -> int:
    size = settings.get("size", {})
    return size.get("longest_edge") or size.get("height") or one(parts.config.vision_config.image_size)
