"""Where a model keeps its vision tower."""

from __future__ import annotations

from torch import nn

from vtc.dialect import towers
from vtc.models import Parts


def tower_of(parts: Parts, modality: str = "image") -> nn.Module:
    """The module that encodes images, or videos where that is another one.

    Raises:
        ValueError: there is none.
    """
    tower = towers.tower_of(parts.base, modality)
    if tower is None:
        raise ValueError(f"this {parts.config.model_type!r} config has no vision tower, so there is nothing to prune")
    return tower
