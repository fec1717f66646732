"""Attention rows without attention maps: recomputed from the norm and the q and k projections of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.ops.gather import gather_columns
from vtc.ops.scores import row_attention


@dataclass(frozen=True)
class AttentionRows:
    """Some rows of one decoder layer's attention, from its own norm, q, k and RoPE; nothing is attended to yet.

    Attributes:
        attention: the layer's self-attention.
        query: [B, H, T, dh], after RoPE. T is 1 where no sample wants any.
        key: [B, Hkv, P + M, dh], keys stored before and those of the columns, after RoPE.
        there: bool [B, T], which rows are wanted. They stand at the end, in order.
        position: LongTensor [B, T], where they are among the keys.
        valid: bool [B, P + M], keys that are no padding; ``None``: no key is padding.
        allowed: bool [B, T, P + M] to obey instead of causality, or ``None``.
        window: how many keys back the layer looks, ``None`` for all.
        past: P.
    """

    attention: nn.Module
    query: Tensor
    key: Tensor
    there: Tensor
    position: Tensor
    valid: Tensor | None
    allowed: Tensor | None
    window: int | None
    past: int

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        recipe: inner.Recipe,
        hidden: Tensor,
        rotary: Sequence[Tensor] | None,
        positions: Tensor | None,
        which: Tensor,
        longest: int,
        *,
        keys: Tensor | None,
        valid: Tensor | None,
        prepared: Tensor | None,
        window: int | None,
    ) -> AttentionRows:
        """Project them.

        Args:
            layer: the decoder layer.
            recipe: how it makes queries and keys.
            hidden: [B, M, d], what enters it.
            rotary: cos and sin of the M columns, as the layer gets them; ``None`` where it gets none.
            positions: LongTensor [B, M] for layers that compute with position ids, else ``None``.
            which: bool [B, M], the rows wanted.
            longest: the most rows any sample wants (host integer).
            keys: [B, Hkv, P, dh], keys stored before, after RoPE, or ``None``.
            valid: bool [B, P + M], keys that are no padding; ``None``: no key is padding.
            prepared: 4-D mask over the M columns to obey instead of causality (prefix-LM families).
            window: how many keys back the layer looks, ``None`` for all.
        """
        attention = inner.self_attention(layer)
        assert attention is not None
        past = 0 if keys is None else keys.shape[2]
        index = at_the_end(which, longest, None if valid is None else valid[:, past:])
        x = inner.norm(layer, hidden, recipe)
        turns = [part.expand(len(x), -1, -1) for part in rotary or ()]
        rows, *row_turns = gather_columns((x, *turns), index)
        query = inner.project(attention, rows, row_turns, "q", recipe)
        if positions is not None:
            query = inner.scale_by_position(attention, query, positions.gather(1, index))
        key = inner.project(attention, x, turns, "k", recipe)
        if keys is not None:
            key = torch.cat([keys.to(key.dtype), key], dim=2)
        allowed = None
        if prepared is not None:
            own = prepared.expand(len(x), -1, -1, -1)[:, 0]
            own = own.gather(1, index[..., None].expand(-1, -1, own.shape[-1]))
            own = own if own.dtype == torch.bool else own == 0
            allowed = torch.nn.functional.pad(own, (past, 0), value=True)
        there = which.gather(1, index)
        return cls(attention, query, key, there, index + past, valid, allowed, window, past)

    @property
    def new_keys(self) -> Tensor:
        """[B, Hkv, M, dh], keys of the M columns."""
        return self.key[:, :, self.past :]

    def mean(self) -> Tensor:
        """float32 [B, M]: attention to the M columns, averaged over heads and rows that are there.

        The softmax runs over the stored keys too.
        """
        return self._attend(slice(None), self.there)

    def last(self) -> Tensor:
        """The same of the last row alone, which is the last real column where none is wanted."""
        return self._attend(slice(-1, None), None)

    def each(self) -> Tensor:
        """float32 [B, T, M]: the same of every row by itself, zeros for those that are not there.

        Where none is wanted, the last row is that of the last real column.
        """
        return self._attend(slice(None), or_the_last(self.there), each=True)

    def _attend(self, rows: slice, counted: Tensor | None, each: bool = False) -> Tensor:
        position, length = self.position[:, rows], self.key.shape[2]
        if self.allowed is not None:  # says it all
            position = torch.full_like(position, length - 1)
        weights = row_attention(
            self.query[:, :, rows],
            self.key,
            inner.scaling(self.attention),
            position=position,
            counted=counted,
            mask=self.valid,
            allowed=None if self.allowed is None else self.allowed[:, rows],
            window=self.window if self.allowed is None else None,
            cap=inner.softcap(self.attention),
            each=each,
        )
        return weights[..., self.past :]


def at_the_end(which: Tensor, longest: int, real: Tensor | None) -> Tensor:
    """LongTensor [B, T], T at most max(1, longest): the columns wanted, in order and at the end of each row.

    What fills a row up in front of them are other columns, and padding only where there is no other.

    Args:
        which: bool [B, M], the columns wanted.
        longest: the most that any row wants (host integer).
        real: bool [B, M], columns that are no padding; ``None``: all.
    """
    rank = which.to(torch.int8) if real is None else which.to(torch.int8) + (which | real).to(torch.int8)
    return rank.argsort(dim=1, stable=True)[:, -max(1, longest) :]


def at_the_end_of(rows: Tensor, room: int) -> Tensor:
    """[B, K, ...], at most ``room`` rows, as [B, room, ...], zeros in front of them."""
    blank = rows.new_zeros(len(rows), room - rows.shape[1], *rows.shape[2:])
    return torch.cat([blank, rows], 1)


def or_the_last(there: Tensor) -> Tensor:
    """Bool [B, T] ``there``, and the last entry of rows that have none."""
    alone = torch.arange(there.shape[1], device=there.device) == there.shape[1] - 1
    return there | (alone & ~there.any(1, keepdim=True))
