"""Density peaks (DPC-kNN): which tokens are the centres of clusters, exact and without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.recursion import first_max

UNIT = 2.0**24
"""Length of the longest row as whole numbers: squared distances are then below 2**51 and every partial sum of them is
exact in float64, so that neither order, nor padding, nor the device changes a bit, and equal rows have distance 0."""


def squared_distances(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between all rows of a set, the same bits in every batch and on every device.

    Entries are rounded to the length of the set's longest row times 2**-24, as fine as float32 there.

    Args:
        rows: float [..., N, d].
        mask: bool [..., N], rows that are there; the others may be anything, NaN too.

    Returns:
        float64 [..., N, N]; of rows that are not there, or not finite, as if they were zeros.
    """
    z = rows.detach().double()
    usable = torch.isfinite(z).all(-1)
    z = z.masked_fill(~(usable if mask is None else usable & mask)[..., None], 0.0)
    if not z.numel():
        return z.new_zeros(*z.shape[:-1], z.shape[-2])
    longest = torch.linalg.vector_norm(z, dim=-1).amax(-1)[..., None, None]
    scale = torch.exp2(torch.floor(torch.log2(UNIT / longest)))  # a power of two: scaling itself rounds nothing
    scale = scale.masked_fill(~torch.isfinite(scale), 1.0)  # all rows are zeros
    z = (z * scale).round_()
    square = (z * z).sum(-1)
    return (square[..., :, None] + square[..., None, :] - 2 * (z @ z.mT)) / scale**2


def density_peaks(distances: Tensor, mask: Tensor, neighbors: int | Tensor) -> Tensor:
    """How much a token is the centre of a cluster: dense, and far from everything denser.

    1. Density: ``exp(-m)`` with m the mean of the squared distances to the nearest tokens, itself among them.
    2. Separation: the distance to the nearest denser token; of the densest the largest distance of all.
    3. The score is their product.

    The originals add random noise to the density, so that one of several equal tokens leads. Here of equally dense
    tokens the first counts as denser: equal ones, and two that are each other's nearest of two.

    Args:
        distances: float64 [..., N, N], squared, from :func:`squared_distances`, over d as the method has it.
        mask: bool [..., N], tokens that are there.
        neighbors: how many nearest tokens, itself among them; at most all that are there count. An int, or LongTensor
            [..., 1], for each set.

    Returns:
        float64 [..., N], -inf where no token is.
    """
    n = distances.shape[-1]
    if not n:
        return distances.new_zeros(mask.shape)
    pairs = mask[..., :, None] & mask[..., None, :]
    most = min(neighbors, n) if isinstance(neighbors, int) else n
    near = distances.masked_fill(~pairs, torch.inf).topk(most, largest=False).values
    counted = neighbors if isinstance(neighbors, int) else neighbors[..., None]
    there = torch.isfinite(near) & (torch.arange(most, device=near.device) < counted)
    spread = near.masked_fill(~there, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
    index = torch.arange(n, device=distances.device)
    earlier = (spread[..., None, :] == spread[..., :, None]) & (index < index[:, None])
    denser = ((spread[..., None, :] < spread[..., :, None]) | earlier) & pairs
    above = distances.masked_fill(~denser, torch.inf).amin(-1)
    furthest = distances.masked_fill(~pairs, 0.0).flatten(-2).amax(-1)[..., None]
    apart = torch.where(denser.any(-1), above, furthest).sqrt()
    return (apart * (-spread).exp()).masked_fill(~mask, -torch.inf)


def to_peaks(distances: Tensor, peaks: Tensor, k: Tensor) -> Tensor:
    """The clusters: the k highest peaks are centres, and every other token goes to the nearest one.

    Args:
        distances: float64 [..., N, N], squared.
        peaks: float64 [..., N], from :func:`density_peaks`.
        k: LongTensor [..., 1], centres of each set, at most as many as tokens are there.

    Returns:
        LongTensor [..., N], the index of each token's centre, a centre's own among them, the lowest index on ties; N
        where no token is, or no centre.
    """
    n = peaks.shape[-1]
    if not n:
        return peaks.long()
    there, index = peaks > -torch.inf, torch.arange(n, device=peaks.device)
    order = peaks.sort(dim=-1, descending=True, stable=True).indices
    centre = (order.argsort(-1) < k) & there
    near = first_max((-distances).masked_fill(~centre[..., None, :], -torch.inf))
    return torch.where(centre, index, near).masked_fill(~there | ~centre.any(-1, keepdim=True), n)
