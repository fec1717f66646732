"""Queries and keys of a layer of the vision tower, head by head: what its attention maps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import TowerSignal

UNSEEN = -1e30
"""Last feature of a key that nobody sees: the softmax makes 0 of it."""


@dataclass(frozen=True, kw_only=True)
class TowerHeads(TowerSignal):
    """Queries and keys of patches, such that a product is the logit of the layer's attention.

    Float32 [pictures, patches, 2, heads, dh + 1], queries first; turned and scaled as they meet. The last feature of a
    query is 1, that of a key 0, or :data:`UNSEEN` for padding. A map, [heads, T, T] for each picture, is then
    ``(query @ key.mT).softmax(-1)`` over special tokens and patches, whenever and of whomever somebody wants it.
    """

    kind: ClassVar[str] = "heads"
    recomputes: ClassVar[bool] = True
    inside: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention, where every picture has a row of its own."""
        return None if tower.packed else tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """Two projections."""
        seen = None if heard.seen is None else heard.seen.any(2)  # [P or 1, 1, T]
        return _meeting(module, hidden, heard.rotary, seen)[:, tower.special :]


@dataclass(frozen=True, kw_only=True)
class SpecialHeads(TowerHeads):
    """The same of the tokens in front of the patches (CLS): [pictures, special, 2, heads, dh + 1]."""

    kind: ClassVar[str] = "special_heads"
    needs_cls: ClassVar[bool] = True

    @property
    def axes(self) -> dict[str, int | None]:
        """None of patches."""
        return {self.key: None}

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """Two small projections."""
        return _meeting(module, hidden[:, : tower.special], [turn[: tower.special] for turn in heard.rotary])


def _meeting(attention: nn.Module, hidden: Tensor, rotary: Sequence[Tensor], seen: Tensor | None = None) -> Tensor:
    """Float32 [P, T, 2, heads, dh + 1] of [P, T, width]; ``seen`` is bool [P or 1, 1, T]."""
    query, key = (side.float() for side in inner.attending_in_tower(attention, hidden, rotary))  # [P, heads, T, dh]
    bias = torch.zeros_like(key[..., :1])
    if seen is not None:
        bias = bias.masked_fill(~seen[..., None], UNSEEN)
    query = torch.cat([query * inner.scaling_in_tower(attention), torch.ones_like(bias)], -1)
    return torch.stack([query, torch.cat([key, bias], -1)], 2).permute(0, 3, 2, 1, 4)
