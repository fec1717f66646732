"""How much a patch is looked at by all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Tower
from vtc.signals.base import TowerSignal

QUERIES = 256
"""Rows of attention computed at a time: memory is O(QUERIES x patches) per head."""


@dataclass(frozen=True, kw_only=True)
class Received(TowerSignal):
    """Attention that a patch receives in one layer, averaged over heads and over all queries (CLS among them)."""

    kind: ClassVar[str] = "received"
    recomputes: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention, where it is plain: no rotary embedding, no windows."""
        return None if tower.rotates else tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor) -> Tensor:
        """In blocks of queries."""
        query, key = (inner.project_in_tower(module, hidden, side) for side in "qk")
        total = query.new_zeros(len(query), key.shape[2], dtype=torch.float32)
        for rows in query.split(QUERIES, dim=2):
            products = (rows @ key.transpose(2, 3)).float() * inner.scaling_in_tower(module)
            total = total + products.softmax(-1).mean(1).sum(1)
        return total[:, tower.special :] / hidden.shape[1]
