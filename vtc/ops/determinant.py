"""Greedy picks by the determinant of their kernel: maximum a posteriori of a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.merging import cosines
from vtc.ops.recursion import first_max

STEP = 2.0**-26  # of coefficients below one: sums of products of two of them are exact in float64
ALIKE = 2.0**-20  # of a token's variance: with less left, those picked say all that it says
NOTHING = 2.0**-40  # what such tokens are worth, times their squared weight
ENTRIES = 2**26  # of all matrices of cosines that are made at a time; an image alone may have more


def max_determinant(features: Tensor, weights: Tensor, k: int, *, mask: Tensor) -> Tensor:
    """Each pick adds most to the determinant of ``weight_i * cosine(i, j) * weight_j`` over the picks.

    CDPruner (arXiv 2506.10967). That is the highest squared weight times the part of a token's variance that those
    picked do not explain. Those that are explained come last, by weight; the lowest index on ties, none twice.

    The picks are pivots of a Cholesky factorisation, which is made row by row. Weights scale rows and columns of the
    kernel, so that they only enter the choice of the pivot. Coefficients are rounded to multiples of STEP: all sums of
    their products are then exact, and no batch, padding or device changes a pick. A pick takes time as N times the
    picks before it. Memory is an N x N matrix of float64 for each image; images are worked off in parts of 512 MiB.

    Args:
        features: float [G, N, d]. A row of zeros, or with an entry that is not finite, has cosine 0 to all.
        weights: float [G, N], finite.
        k: how many to pick.
        mask: bool [G, N], False for padding. What is picked once no other token is left has no meaning.

    Returns:
        LongTensor [G, k], in pick order.
    """
    n = features.shape[1]
    size = max(1, ENTRIES // max(1, n * n))
    squares = weights.detach().double().square()
    parts = zip(features.detach().split(size), squares.split(size), mask.split(size), strict=True)
    return torch.cat([_picks(*part, k) for part in parts])


def _picks(rows: Tensor, weight: Tensor, mask: Tensor, k: int) -> Tensor:
    like = cosines(rows.masked_fill(~mask[..., None], 0.0))
    variance = like.diagonal(dim1=1, dim2=2).round()  # not yet explained: 1, and 0 without a direction
    factor = torch.zeros(len(rows), k, rows.shape[1], dtype=like.dtype, device=like.device)
    images, free, picks = torch.arange(len(rows), device=like.device), mask.clone(), []
    for t in range(k):
        worth = weight * torch.where(variance > ALIKE, variance, NOTHING)
        pick = first_max(worth.masked_fill(~free, -torch.inf))
        free.scatter_(1, pick[:, None], False)
        picks.append(pick)
        explained = (factor[images, :t, pick][:, None] @ factor[:, :t])[:, 0]
        left = variance.gather(1, pick[:, None])
        new = ((like[images, pick] - explained) / left.clamp(min=ALIKE).sqrt() / STEP).round() * STEP
        factor[:, t] = new.masked_fill(left <= ALIKE, 0.0)
        variance = variance - factor[:, t].square()
    return torch.stack(picks, 1)
