"""Image classifiers: a vision tower and a head, no language model (ViT, DeiT, DINOv2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from vtc.dialect.modules import base_of, without_adapters
from vtc.dialect.towers import Tower, is_classifier
from vtc.errors import UnsupportedModelError
from vtc.methods.base import ANY_MODEL, ModelFacts
from vtc.models.base import Adapter, Parts
from vtc.signals import TOWER_SIGNALS


@dataclass(frozen=True)
class Alone(Parts):
    """The modules of a classifier: there is no decoder among them."""

    @property
    def vision_tower(self) -> str:
        """The class that encodes images, for messages."""
        return type(self.base).__name__


class Classifiers(Adapter):
    """Where the tower of a classifier is."""

    def tower(self, base: Any, modality: str) -> Tower | None:
        """All but the head."""
        return Tower.alone(base) if modality == "image" else None

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        """Nobody needs them behind it."""
        return "drop"

    def facts(self, parts: Parts) -> ModelFacts:
        """What can be known without a language model."""
        tower = self.tower(parts.base, "image")
        assert tower is not None
        return replace(
            ANY_MODEL,
            model_type=parts.config.model_type,
            signals=frozenset(signal.kind for signal in TOWER_SIGNALS if signal().of(tower) is not None),
            tower_depth=len(tower.layers),
        )


def resolve_classifier(model: nn.Module) -> tuple[Classifiers, Alone] | None:
    """The adapter and the parts of an image classifier; ``None``: it is none.

    Raises:
        UnsupportedModelError: it is one, and not built so that patches could leave in it.
    """
    root = without_adapters(model)
    if not is_classifier(root):
        return None
    base = base_of(root)
    if Tower.alone(base) is None:
        raise UnsupportedModelError(
            f"{type(root).__name__} cannot be pruned: patches leave between blocks that take hidden states and nothing "
            f"that has an entry for each patch, with special tokens in front, and {type(base).__name__} is not built "
            "so. What works: ViT, DeiT, DINOv2 and what is built alike"
        )
    return Classifiers(), Alone(root, base, None, {}, None)  # type: ignore[arg-type]
