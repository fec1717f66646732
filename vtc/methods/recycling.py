"""Recycling (SparseVLM, section 3.4): the best of the pruned tokens are clustered, and their means stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Reduction, first_of, marked
from vtc.tokens import VisualTokens, column


def recycle(tokens: VisualTokens, ranked: Tensor, budget: tuple[int, ...]) -> Reduction:
    """Keep the best, and melt the next best into the rest of the budget: means of clusters, at their centres' places.

    Args:
        tokens: all of them.
        ranked: LongTensor [G, N], by falling score, those that are there first.
        budget: how many are left of each image, merged ones included.
    """
    x, n = tokens.features, tokens.features.shape[1]
    kept = tuple(split(k, m) for k, m in zip(budget, tokens.counts, strict=True))
    among = tuple(min(m, top + recycled(m - top)[0]) for top, m in zip(kept, tokens.counts, strict=True))
    clusters = column([k - top for k, top in zip(budget, kept, strict=True)], x.device)
    tops, many = first_of(ranked, kept, n), tuple(m - top for m, top in zip(among, kept, strict=True))
    at = Reduction.of_mask(first_of(ranked, among, n) & ~tops, many).index  # [G, M]
    there = torch.arange(at.shape[1], device=x.device) < column(many, x.device)
    rows = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
    apart = ops.squared_distances(rows, there) / x.shape[-1]
    group = ops.to_peaks(apart, ops.density_peaks(apart, there, clusters.clamp_min(1)), clusters)
    total, joined = ops.gathered(rows, group, at.shape[1])
    place = at.masked_fill(joined == 0, n)
    values = _put(x, place, total / joined.clamp_min(1.0)[..., None])
    size = torch.ones_like(x[..., 0], dtype=torch.float32) if tokens.size is None else tokens.size
    size = _put(size[..., None], place, ops.gathered(size.gather(1, at)[..., None], group, at.shape[1])[0])
    found = Reduction.of_mask(tops | marked(place, n), budget)
    index = found.index[..., None]
    values = values.gather(1, index.expand(-1, -1, x.shape[-1]))
    return replace(found, features=values, size=size.gather(1, index)[..., 0])


def recycled(pruned: int) -> tuple[int, int]:
    """Of so many pruned tokens, how many are clustered, and into how many."""
    many = 3 * pruned // 10 + 1
    return many, many // 10 + 1


def split(budget: int, n: int) -> int:
    """How many of ``budget`` tokens, of ``n``, stay as they are, so that with the clusters of the others it is met."""
    return next((k for k in range(budget, 1, -1) if k + recycled(n - k)[1] <= budget), min(1, budget))


def _put(old: Tensor, place: Tensor, new: Tensor) -> Tensor:
    """[G, N, c] with [G, M, c] ``new`` at LongTensor [G, M] ``place``; N stands for nowhere."""
    room = torch.cat([old, old.new_zeros(len(old), 1, old.shape[2])], 1)
    return room.scatter(1, place[..., None].expand_as(new), new.to(old.dtype))[:, :-1]
