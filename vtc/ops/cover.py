"""Greedy facility location without looking at everybody in every step (Minoux 1978)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.ops.recursion import first_max

FRESH = 32
"""Candidates whose gain is computed anew at a time."""


def cover_lazily(
    likeness: Tensor, weight: Tensor, mask: Tensor, k: int, worth: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The k rows that cover all rows best, one after the other: the same picks as if every gain were always computed.

    The gain of a row is how much it would add to the cover: to the sum, over all rows, of the largest likeness to a
    pick. It falls as picks are made, so that what a row was worth once is a bound on what it is worth now, and whoever
    is worth most by a value of this step is the pick. Waits for the device at every pick: for CPUs.

    Args:
        likeness: float64 [N, N], multiples of one number, so that sums are exact.
        weight: float64 [N].
        mask: bool [N], rows that may be picked.
        k: how many.
        worth: of gains and weights; it must not rise where the gain falls.

    Returns:
        LongTensor [k], in pick order, ties by lowest index; 0 where no row is left.
    """
    cover, picks = torch.zeros_like(weight), torch.zeros(k, dtype=torch.long)
    bound = worth(likeness.clamp(min=0.0).sum(-1), weight).masked_fill(~mask, -torch.inf)
    known = torch.zeros_like(mask, dtype=torch.long)  # the step that a bound is of
    for step in range(min(k, int(mask.sum()))):
        while known[best := int(first_max(bound[None])[0])] < step:
            some = bound.topk(min(FRESH, len(bound))).indices
            some = torch.cat([torch.tensor([best]), some[(known[some] < step) & (bound[some] > -torch.inf)]])
            gain = torch.maximum(likeness[some], cover).sum(-1) - cover.sum()
            bound[some], known[some] = worth(gain, weight[some]), step
        picks[step] = best
        cover = torch.maximum(cover, likeness[best])
        bound[best] = -torch.inf
    return picks
