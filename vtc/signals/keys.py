"""Keys: of a layer of the vision tower, or of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import ColumnSignal, LayerView, TowerSignal


@dataclass(frozen=True, kw_only=True)
class TowerKeys(TowerSignal):
    """What a layer's key projection makes of a patch, averaged over heads: [G, N, dh], before any rotation."""

    kind: ClassVar[str] = "keys"
    wide: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention."""
        return tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """One projection."""
        return inner.project_in_tower(module, hidden, "k").float().mean(1)[:, tower.special :]


@dataclass(frozen=True)
class LayerKeys(ColumnSignal):
    """Keys in a layer of the language model, after RoPE, heads side by side: [G, N, Hkv * dh], or [G, T, Hkv * dh]."""

    kind: ClassVar[str] = "layer_keys"
    wide: ClassVar[bool] = True

    def read(self, view: LayerView) -> Tensor:
        """Those that the layer's attention rows are made with."""
        keys = view.rows("text").new_keys.transpose(1, 2).flatten(2)  # [B, M, Hkv * dh]
        return self.chosen(view, keys.float())
