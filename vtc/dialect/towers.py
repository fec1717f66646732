"""Vision towers: their layers, the attention in them, the special tokens in front of the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.dialect.compilers import uncompiled


@dataclass(frozen=True)
class Tower:
    """What a signal may know of a vision tower.

    Attributes:
        layers: in order.
        special: tokens in front of the patches (1 with a CLS token, 0 without).
        rotates: attention turns queries and keys by their places, or works in windows: it cannot be recomputed from
            the input of a layer alone.
        projector: where a patch becomes a token of the language model, if one does by itself.
    """

    layers: tuple[nn.Module, ...]
    special: int
    rotates: bool = False
    projector: nn.Module | None = None

    @classmethod
    def of(cls, tower: nn.Module | None, projector: nn.Module | None = None) -> Tower | None:
        """A tower as CLIP, SigLIP and InternViT build it, ``None`` of what has no such layers."""
        tower = getattr(tower, "vision_model", tower)
        embeddings, encoder = getattr(tower, "embeddings", None), getattr(tower, "encoder", None)
        layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
        if embeddings is None or not layers:
            return None
        has_cls = (getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token"))
        return cls(tuple(map(uncompiled, layers)), int(any(has_cls)), projector=projector)

    def attention(self, layer: int) -> nn.Module | None:
        """The attention of a layer, where it has projections of its own for queries and keys."""
        found = self.layers[layer]
        attention = uncompiled(getattr(found, "self_attn", getattr(found, "attention", None)))
        return attention if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") else None


TOWERS = ("vision_tower", "image_tower", "visual", "vision_model")
"""Attributes of a base model that are a vision tower."""


def tower_of(base: Any, modality: str = "image") -> nn.Module | None:
    """The module that encodes images, or videos where that is another one; ``None`` if there is none."""
    names = ("video_tower", *TOWERS) if modality == "video" else TOWERS
    return next((tower for name in names if (tower := getattr(base, name, None)) is not None), None)
