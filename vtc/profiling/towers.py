"""Where a model keeps its vision tower."""

from __future__ import annotations

from torch import nn

from vtc.models import Parts

TOWERS = ("vision_tower", "image_tower", "visual", "vision_model")
"""Attributes of a base model that are one."""


def tower_of(parts: Parts, modality: str = "image") -> nn.Module:
    """The module that encodes images, or videos where that is another one.

    Raises:
        ValueError: there is none.
    """
    names = ("video_tower", *TOWERS) if modality == "video" else TOWERS
    tower = next((tower for name in names if (tower := getattr(parts.base, name, None)) is not None), None)
    if tower is None:
        raise ValueError(f"this {parts.config.model_type!r} config has no vision tower, so there is nothing to prune")
    return tower
