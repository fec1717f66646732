"""What the vision tower's CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import TowerSignal


@dataclass(frozen=True, kw_only=True)
class Cls(TowerSignal):
    """Attention of the CLS token to the patches, after the softmax over CLS and patches, averaged over heads."""

    kind: ClassVar[str] = "cls"
    needs_cls: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention."""
        return tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """One row of products; memory is O(patches)."""
        return cls_row(module, hidden)[:, tower.special - 1 :]


@dataclass(frozen=True, kw_only=True)
class ClsLogits(Cls):
    """The same before the softmax: scaled products of query and key, averaged over heads."""

    kind: ClassVar[str] = "cls_logits"

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """As :class:`Cls`."""
        return cls_logit_row(module, hidden)[:, tower.special - 1 :]


def cls_row(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Head-averaged softmax attention of the CLS token (index 0) to all that is behind it.

    Args:
        attention: a vision self-attention module with projections for queries and keys.
        hidden: [pictures, 1 + n, width], the module's input.

    Returns:
        float32 [pictures, n]. The softmax runs over CLS and the others, as in the tower; memory is O(n).
    """
    return _products(attention, hidden).softmax(-1).mean(1)[:, 1:]


def cls_logit_row(attention: nn.Module, hidden: Tensor) -> Tensor:
    """The same before the softmax."""
    return _products(attention, hidden).mean(1)[:, 1:]


def _products(attention: nn.Module, hidden: Tensor) -> Tensor:
    """float32 [pictures, heads, 1 + patches]."""
    query, key = (inner.project_in_tower(attention, x, side) for x, side in ((hidden[:, :1], "q"), (hidden, "k")))
    return (query @ key.transpose(2, 3)).float()[:, :, 0] * inner.scaling_in_tower(attention)
