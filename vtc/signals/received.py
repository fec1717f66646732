"""How much a patch is looked at by all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import TowerSignal

QUERIES = 256
"""Rows of attention computed at a time: memory is O(QUERIES x patches) per head."""


@dataclass(frozen=True, kw_only=True)
class Received(TowerSignal):
    """Attention that a patch receives in one layer, averaged over heads and summed over queries (CLS among them).

    The queries are those that really see it there: of its picture, frame or window. 1 is an even share, whatever the
    size of those: their mean, which papers speak of, would favour patches in the smaller windows along an edge.
    A token made of several patches has their mean.
    """

    kind: ClassVar[str] = "received"
    recomputes: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention."""
        return tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """In blocks of queries. Waits for the device where sequences share a row."""
        if tower.packed and heard.mask is None and heard.ends is None:
            raise NotImplementedError(
                f"nothing tells {type(module).__name__} where a picture ends in this release of transformers with this "
                "attention; load the model with attn_implementation='sdpa' or 'eager'"
            )
        return received(module, hidden, heard)[:, tower.special :]


def received(attention: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
    """Head-averaged attention to every token, summed over the queries that see it.

    Args:
        attention: a vision self-attention module.
        hidden: [B, T, width], the module's input.
        heard: what else it is called with.

    Returns:
        float32 [B, T].
    """
    query, key = inner.attending_in_tower(attention, hidden, heard.rotary)
    scale = inner.scaling_in_tower(attention)
    if heard.ends is None:
        return _columns(query, key, scale, heard.seen)
    total = query.new_zeros(hidden.shape[:2], dtype=torch.float32)
    for columns in heard.sequences(hidden.shape[1]):
        q, k = (x[0, :, columns].transpose(0, 1) for x in (query, key))
        total[0, columns] = _columns(q, k, scale)
    return total


def _columns(query: Tensor, key: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """Sums of the columns of attention, [B, heads, T, dh] → [B, T]; what nobody sees is padding, and pays nothing."""
    pictures, _, length, _ = query.shape
    total = query.new_zeros(pictures, length, dtype=torch.float32)
    if seen is not None:
        seen = seen.expand(pictures, 1, length, length)
        real = seen.any(2).mT  # [B, T, 1]
    each = max(1, QUERIES // length)
    for first in range(0, pictures, each):
        for start in range(0, length, QUERIES):
            at, rows = slice(first, first + each), slice(start, start + QUERIES)
            products = (query[at, :, rows] @ key[at].mT).float() * scale
            if seen is not None:
                products = products.masked_fill(~seen[at, :, rows], torch.finfo(products.dtype).min)
            share = products.softmax(-1).mean(1)
            total[at] += (share if seen is None else share * real[at, rows]).sum(1)
    return total
