"""What methods for videos need: cosines from frame to frame, ranks within frames, and how frames share a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.merging import UNIT, unit_rows

STEP = 2.0**-23
"""Cosines are multiples of it, as fine as float32 below one: a row has exactly 1 to an equal one."""
ENTRIES = 2**26
"""Of the float64 copies that are made at a time."""


def matched_cosines(rows: Tensor, others: Tensor) -> Tensor:
    """The cosine of each row to the other row at its place, the same bits in every batch and on every device.

    Args:
        rows: float [..., d].
        others: float [..., d], or what expands to it.

    Returns:
        float64 [...], in multiples of :data:`STEP`; 0 where a row has no direction.
    """
    others = others.expand_as(rows)
    flat, their, size = rows.flatten(0, -2), others.flatten(0, -2), max(1, ENTRIES // max(1, rows.shape[-1]))
    parts = zip(flat.split(size), their.split(size), strict=True)
    products = torch.cat([(unit_rows(a) * unit_rows(b)).sum(-1) for a, b in parts]) * UNIT**-2
    return products.div_(STEP).round_().mul_(STEP).view(rows.shape[:-1])


def highest_of_each(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Bool [..., N]: the ``counts`` highest of each row of scores, ties to the lowest index.

    Args:
        scores: real [..., N], no NaN.
        counts: LongTensor [...], or one number for all.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rank) < (
        counts if isinstance(counts, int) else counts[..., None]
    )


def in_shares(weights: Tensor, total: int, most: int) -> Tensor:
    """Divide a whole number in proportion to weights, as exactly as whole numbers can.

    What somebody with ``most`` cannot take is divided among the others in the same proportion; the largest remainders
    get what is left over, ties to the first.

    Args:
        weights: float [T], above 0.
        total: at most T * most.
        most: what one can take.

    Returns:
        LongTensor [T], which sums up to ``total``.
    """
    falling, order = weights.double().sort(descending=True, stable=True)
    theirs = falling.flip(0).cumsum(0).flip(0)  # of this one and all behind it
    left = total - most * torch.arange(len(falling), device=falling.device)
    full = (falling * left >= most * theirs).long().cumprod(0)  # the heaviest are, as far as one is
    first = full.sum().clamp(max=len(falling) - 1)[None]
    unit = (left.gather(0, first) / theirs.gather(0, first)).clamp(min=0.0)
    exact = torch.where(full.bool(), most, (falling * unit).clamp(max=most))
    exact = torch.empty_like(exact).scatter_(0, order, exact)
    counts = exact.floor().long()
    remainder = (exact - counts).masked_fill(counts == most, -1.0)
    return counts + highest_of_each(remainder, total - counts.sum())


def still_windows(still: Tensor, longest: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Cut a video into windows so that places that stand still in a whole window save the most tokens.

    A place that stands still in a window of w frames saves w - 1. Of equal savings the shorter last window is taken.

    Args:
        still: bool [T - 1, P] on the CPU, which places stand still from a frame to the next.
        longest: frames of a window at most.

    Returns:
        Frames (a, b) of each window, a to b - 1, and bool [windows, P], which places stand still in all of it; none in
        a window of one frame.
    """
    frames = len(still) + 1
    run = torch.zeros(frames, still.shape[1], dtype=torch.long)  # for how many frames more a place stands still
    for t in reversed(range(frames - 1)):
        run[t] = (run[t + 1] + 1) * still[t]
    longest = min(longest, frames)
    saves = {w: ((run >= w - 1).sum(1) * (w - 1)).tolist() for w in range(2, longest + 1)}
    saved, starts = [0], [0]
    for end in range(1, frames + 1):
        best, start = saved[-1], end - 1
        for w in range(2, min(longest, end) + 1):
            if saved[end - w] + saves[w][end - w] > best:
                best, start = saved[end - w] + saves[w][end - w], end - w
        saved.append(best)
        starts.append(start)
    windows: list[tuple[int, int]] = []
    end = frames
    while end:
        windows.insert(0, (starts[end], end))
        end = starts[end]
    return windows, torch.stack([(run[a] >= b - a - 1) & (b - a > 1) for a, b in windows])
