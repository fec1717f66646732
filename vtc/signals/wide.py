"""Queries and keys of a tower layer with all heads side by side, as one wide head: what LLaVA-PruMerge looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.cls import Cls
from vtc.signals.keys import TowerKeys


@dataclass(frozen=True, kw_only=True)
class ClsWide(Cls):
    """:class:`Cls` as if the layer had one head: the softmax of products over its whole width, over its root.

    Found under ``cls``. It is the softmax of the sum of the heads' logits over the root of their number.
    """

    kind: ClassVar[str] = "cls_wide"

    @property
    def key(self) -> str:
        """As of :class:`Cls`."""
        return self.name or Cls.kind

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """One row of products."""
        query, key = side_by_side(module, hidden[:, :1], "q"), side_by_side(module, hidden, "k")
        products = (query @ key.mT)[:, 0] * key.shape[-1] ** -0.5
        return products.softmax(-1)[:, tower.special :]


@dataclass(frozen=True, kw_only=True)
class KeysWide(TowerKeys):
    """:class:`TowerKeys` with heads side by side instead of averaged: [G, N, width]. Found under ``keys``."""

    kind: ClassVar[str] = "keys_wide"

    @property
    def key(self) -> str:
        """As of :class:`TowerKeys`."""
        return self.name or TowerKeys.kind

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """One projection."""
        return side_by_side(module, hidden, "k")[:, tower.special :]


def side_by_side(attention: nn.Module, hidden: Tensor, side: str) -> Tensor:
    """Float32 [pictures, patches, width]: queries (``q``) or keys (``k``) of all heads."""
    return inner.project_in_tower(attention, hidden, side).transpose(1, 2).flatten(2).float()
