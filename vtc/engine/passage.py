"""What happens to the rows of a vision tower in one run: who left, and how they come back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.ops.density import squared_distances

NEIGHBOURS = 10
"""Of a patch that left: those whose movement it follows where it is restored."""


@dataclass(frozen=True)
class Departure:
    """What left at one stage, of M patches of every picture.

    Attributes:
        stays: LongTensor [P, K], the rows that stay, ascending.
        leaves: LongTensor [P, M - K], the others.
        state: float [P, M, width], what stood there then; ``None``: zeros come back.
        near: LongTensor [P, M - K, J], to each that left its nearest among those that stay.
    """

    stays: Tensor
    leaves: Tensor
    state: Tensor | None = None
    near: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, k: int, state: Tensor, restores: bool) -> Departure:
        """From bool [P, M], True at the ``k`` of every picture that stay, and states [P, M, width]."""
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        stays, leaves = order[:, :k], order[:, k:]
        if not restores:
            return cls(stays, leaves)
        apart = squared_distances(state).gather(1, wide(leaves, mask.shape[1])).gather(2, across(stays, leaves))
        near = apart.sort(dim=-1, stable=True).indices[..., : min(NEIGHBOURS, k)]
        return cls(stays, leaves, state, near)

    def undone(self, rows: Tensor) -> Tensor:
        """Rows [P, K, ...] of those that stayed at their places among M."""
        width = rows.shape[2]
        out = rows.new_zeros(len(rows), self.stays.shape[1] + self.leaves.shape[1], width)
        out = out.scatter(1, wide(self.stays, width), rows)
        if self.state is None or self.near is None or width != self.state.shape[2]:
            return out
        moved = rows - self.state.gather(1, wide(self.stays, width))
        followed = moved.gather(1, wide(self.near.flatten(1), width)).unflatten(1, self.near.shape[1:]).mean(2)
        return out.scatter(1, wide(self.leaves, width), self.state.gather(1, wide(self.leaves, width)) + followed)


@dataclass
class Passage:
    """One run of a tower.

    Attributes:
        special: rows in front of the patches, which never leave.
        patches: of each picture, N.
        restores: what leaves comes back.
        departures: in order.
        there: LongTensor [P, M], the patches that are there, ascending; ``None``: all.
        size: float [P, N], how many patches each stands for; ``None``: one each.
        proportional: keys weigh as many patches as they stand for.
        entered: how many there were before a method's first stage, by the identity of the method.
        front: while they are projected without those that left: rows in front of the patches; else ``None``.
    """

    special: int
    patches: int
    restores: bool
    departures: list[Departure] = field(default_factory=list)
    there: Tensor | None = None
    size: Tensor | None = None
    proportional: bool = False
    entered: dict[int, tuple[int, ...]] = field(default_factory=dict)
    front: int | None = None

    def spread(self, rows: Tensor) -> Tensor:
        """Something of the patches that are there [P, M, ...], at their places [P, N, ...]; 0 elsewhere."""
        if self.there is None or rows.shape[1] == self.patches:
            return rows
        out = rows.new_zeros(len(rows), self.patches, *rows.shape[2:])
        index = self.there.view(*self.there.shape, *(1,) * (rows.dim() - 2)).expand_as(rows)
        return out.scatter(1, index, rows)

    def whole(self, state: Tensor) -> Tensor:
        """A state [P, special + M, width] with all places [P, special + N, width]; one of no stage is left alone."""
        rows = state.shape[1] - self.special
        left = [d.stays.shape[1] for d in self.departures]
        if rows == self.patches or rows not in left:
            return state
        patches = state[:, self.special :]
        for departure in reversed(self.departures[: left.index(rows) + 1]):
            patches = departure.undone(patches)
        return torch.cat([state[:, : self.special], patches], 1)

    def columns(self, special: int) -> Tensor:
        """LongTensor [P, special + M]: the rows that are there, of ``special`` and all N patches."""
        assert self.there is not None
        front = torch.arange(special, device=self.there.device).expand(len(self.there), -1)
        return torch.cat([front, self.there + special], 1)

    def seen(self, mask: Tensor) -> Tensor:
        """A mask of the whole tower, [P or 1, T] or [P or 1, 1, T or 1, T], for the rows that are there."""
        columns = self.columns(self.special)
        if mask.dim() == 2:
            return mask.expand(len(columns), -1).gather(1, columns)
        mask = mask.expand(len(columns), -1, -1, -1)
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        if mask.shape[2] > 1:
            mask = mask.gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, columns.shape[1]))
        return mask

    def weighed(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """A mask of the rows that are there with log(size) on the patches: float, [P, 1, 1, special + M] or larger."""
        assert self.size is not None
        assert self.there is not None
        bias = self.size.gather(1, self.there).log()
        bias = torch.nn.functional.pad(bias, (self.special, 0))[:, None, None].to(dtype)
        if mask is None:
            return bias
        mask = mask[:, None, None].bool() if mask.dim() == 2 else mask
        return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def wide(index: Tensor, width: int) -> Tensor:
    """LongTensor [P, K] for gathering rows [P, K, width]."""
    return index[..., None].expand(-1, -1, width)


def across(stays: Tensor, leaves: Tensor) -> Tensor:
    """LongTensor [P, K] for gathering columns [P, M - K, K]."""
    return stays[:, None].expand(-1, leaves.shape[1], -1)
