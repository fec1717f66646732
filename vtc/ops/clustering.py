"""Clusters around density peaks (DPC-kNN), without random noise, and the same in every batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.recursion import first_max

BITS = 22
"""Of an image's longest row as whole numbers: squared distances, and sums of some 100, are then exact in float64."""


def squared_distances(rows: Tensor, mask: Tensor) -> Tensor:
    """Squared distances between the rows of each image: exact for rows rounded to 2**-22 of the longest one.

    Equal rows have 0, and neither a batch nor padding changes a bit.

    Args:
        rows: float [G, N, d].
        mask: bool [G, N], which count; the others may be anything, NaN too.

    Returns:
        float64 [G, N, N], infinite where one of the two does not count.
    """
    z = rows.detach().double().masked_fill(~mask[..., None], 0.0).nan_to_num(0.0, 0.0, 0.0)
    longest = torch.linalg.vector_norm(z, dim=-1).amax(-1)[:, None, None]
    step = torch.ldexp(torch.ones_like(longest), torch.frexp(longest).exponent - BITS)
    z = (z / step).round_()
    length = z.square().sum(-1)
    apart = (length[..., None] + length[:, None] - 2.0 * (z @ z.mT)) * step.square()
    return apart.masked_fill(~(mask[..., None] & mask[:, None]), torch.inf)


def density_peaks(rows: Tensor, mask: Tensor, clusters: Tensor, neighbours: Tensor) -> Tensor:
    """To which centre each row goes (DPC-kNN).

    Density of a row: ``exp`` of minus the mean squared distance, divided by d, to its nearest rows, itself among them.
    Reach: the distance to the nearest row that is denser (of two equal ones the first is), for the densest the largest
    distance of all. Centres have the highest density times reach; the others go to the nearest centre. The published
    code breaks ties with random noise; here the lowest index wins.

    Args:
        rows: float [G, N, d].
        mask: bool [G, N], which count; they stand in front.
        clusters: LongTensor [G, 1], how many centres, at most as many as rows count.
        neighbours: LongTensor [G, 1], how many nearest rows make the density.

    Returns:
        LongTensor [G, N], the index of each row's centre, a centre's own among them; N where a row does not count
        or there is no centre.
    """
    n = rows.shape[1]
    if not n:
        return mask.long()
    index = torch.arange(n, device=rows.device)
    apart = squared_distances(rows, mask)
    near = apart.sort(-1).values.masked_fill(index >= neighbours[..., None], 0.0)
    sparse = near.sum(-1) / neighbours / rows.shape[-1]  # minus the logarithm of the density
    denser = (sparse[:, None] < sparse[..., None]) | ((sparse[:, None] == sparse[..., None]) & (index < index[:, None]))
    finite = apart.masked_fill(torch.isinf(apart), 0.0)
    reach = apart.masked_fill(~denser, torch.inf).amin(-1)
    reach = torch.where(torch.isinf(reach), finite.amax((1, 2))[:, None], reach)
    peak = (reach.log() / 2.0 - sparse).masked_fill(~mask, -torch.inf)
    first = peak.argsort(dim=1, descending=True, stable=True)
    centre = (first.argsort(1) < clusters) & mask
    nearest = first_max((-apart).masked_fill(~centre[:, None], -torch.inf))
    return torch.where(centre, index, nearest).masked_fill(~mask | ~centre.any(1, keepdim=True), n)
