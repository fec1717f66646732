"""Leave columns out of everything that is aligned with the sequence: pure functions, no model, no host sync.

A :class:`Compaction` says which of N columns stay in each row of a batch. Rows may keep different counts; the shorter
ones get holes on the side where the batch is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.ops.gather import gather_columns
from vtc.tokens import column


@dataclass(frozen=True)
class Columns:
    """Some columns of each row of a batch, in order.

    Attributes:
        index: LongTensor [B, M], ascending column numbers; holes point at some column that is not meant.
        valid: bool [B, M], False at holes.
    """

    index: Tensor
    valid: Tensor

    @property
    def length(self) -> int:
        """M, the columns after."""
        return self.index.shape[1]

    def slots(self, width: int) -> Tensor:
        """LongTensor [B, width]: where each column stands now, -1 where it does not."""
        place = self.index.masked_fill(~self.valid, width)
        here = torch.arange(self.length, device=place.device).expand_as(place)
        return place.new_full((len(place), width + 1), -1).scatter(1, place, here)[:, :width]

    def sequence(self, tensor: Tensor) -> Tensor:
        """[B, N, ...] → [B, M, ...]. A bool tensor is False at holes."""
        return self.sequences(tensor)[0]

    def sequences(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same for several tensors at once."""
        return tuple(
            x & self.valid.to(x.device) if x.dtype == torch.bool and x.dim() == 2 else x
            for x in gather_columns(tensors, self.index)
        )

    def positions(self, ids: Tensor) -> Tensor:
        """Position ids [B or 1, N] or [axes, B or 1, N] → the same with M columns."""
        index = self.index.to(ids.device)
        index = index.expand(*ids.shape[:-2], *index.shape)
        return ids.expand(*ids.shape[:-2], index.shape[-2], ids.shape[-1]).gather(-1, index)

    def labels(self, labels: Tensor, ignore: int = -100) -> Tensor:
        """Labels [B, N] → [B, M], ``ignore`` at holes."""
        return self.sequence(labels).masked_fill(~self.valid.to(labels.device), ignore)

    def attention(self, mask: Tensor, past: int, length: int) -> Tensor:
        """A prepared 4-D mask [B or 1, heads, N, keys] → [B, heads, M, length].

        Args:
            mask: bool (True: may attend) or float (added to the scores).
            past: keys stored before these columns; columns ``past .. past + N`` of the mask belong to them.
            length: keys the attention will see; what lies beyond the new ones is masked.

        A hole sees itself and nothing else: no row is empty (softmax of nothing is NaN), and nobody sees it.
        """
        batch, device = self.index.shape[0], mask.device
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        open_ = True if mask.dtype == torch.bool else 0.0
        index, valid = self.index.to(device), self.valid.to(device)
        mask = mask.expand(batch, *mask.shape[1:])
        heads = mask.shape[1]
        rows = mask.gather(2, index[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
        new = rows.gather(3, (past + index)[:, None, None, :].expand(-1, heads, self.length, -1))
        new = new.masked_fill(~valid[:, None, None, :], blocked)
        itself = torch.eye(self.length, dtype=torch.bool, device=device) & ~valid[:, :, None]
        new = new.masked_fill(itself[:, None], open_)
        beyond = rows.new_full((batch, heads, self.length, length - past - self.length), blocked)
        return torch.cat([rows[..., :past], new, beyond], dim=3)


@dataclass(frozen=True)
class Compaction(Columns):
    """Which columns stay.

    Attributes:
        keep: bool [B, N], the columns that stay.
        counts: valid columns of each row (host integers).
        dropped: real columns each row loses (host integers; padding is not counted).
    """

    keep: Tensor
    counts: tuple[int, ...]
    dropped: tuple[int, ...]

    @classmethod
    def of(cls, keep: Tensor, counts: list[int], dropped: list[int], pad_right: bool) -> Compaction:
        """From a bool mask ``keep`` [B, N] whose row sums, ``counts``, are known on the host."""
        width, longest = keep.shape[1], max(counts)
        if pad_right:
            index = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        else:
            index = keep.to(torch.int8).argsort(dim=1, stable=True)[:, width - longest :]
        slot = torch.arange(longest, device=keep.device)
        kept = column(counts, keep.device)
        valid = slot < kept if pad_right else slot >= longest - kept
        return cls(index, valid, keep, tuple(counts), tuple(dropped))

    @property
    def holes(self) -> bool:
        """Whether some row keeps fewer columns than the longest."""
        return min(self.counts) < self.index.shape[1]

    @property
    def width(self) -> int:
        """N, the columns before."""
        return self.keep.shape[1]

    def first_position(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Where each row's positions begin, padding left out: [B or 1, N], 2-D padding mask → [B or 1]."""
        if mask is not None:
            real = mask[:, -self.width :].bool().to(ids.device)
            ids = ids.expand(real.shape[0], -1).masked_fill(~real, torch.iinfo(ids.dtype).max)
        return ids.amin(1)

    def renumber(self, ids: Tensor, start: Tensor) -> Tensor:
        """Kept positions [B, M] → consecutive ones from ``start`` [B or 1]."""
        valid = self.valid.to(ids.device)
        return torch.where(valid, start[:, None] + valid.cumsum(1) - 1, ids)


@dataclass(frozen=True)
class StageResult(Columns):
    """Columns of the call that were left after one stage.

    Attributes:
        after: layers run before it.
        alive: bool [G, N], tokens of each image.
    """

    after: int
    alive: Tensor
