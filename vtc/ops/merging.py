"""What merging needs: cosines that no batch changes, who is near, to whom a token goes, sums over who joined."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.ops.recursion import first_max

UNIT = 2.0**26
"""Length of a row as whole numbers: a product of two is below 2**52, and so is every partial sum of it. Sums are then
exact in float64, so that neither their order, nor padding, nor the device changes a bit."""
ENTRIES = 2**25
"""Of a matrix of cosines that is made at a time: 256 MiB."""


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to length :data:`UNIT` and rounded to whole numbers.

    Args:
        rows: float [..., N, d].

    Returns:
        float64 [..., N, d]; a row of zeros, or with an entry that is not finite, is zeros.
    """
    z = rows.detach().double()
    scale = UNIT / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    usable = torch.isfinite(scale) & (scale > 0)
    return (z * scale).masked_fill(~usable, 0.0).round_()


def cosines(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosines between all rows and all others, the same bits in every batch and on every device; equal rows tie.

    Args:
        rows: float [..., N, d].
        others: float [..., M, d]; default: the same rows.

    Returns:
        float64 [..., N, M]; 0 where a row has no direction.
    """
    z = unit_rows(rows)
    return (z @ (z if others is None else unit_rows(others)).mT).mul_(UNIT**-2)


def cosines_to(rows: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of all rows to some of them, a part of the rows at a time, as many as :data:`ENTRIES` allow.

    Args:
        rows: float [G, N, d].
        index: LongTensor [G, K], in [0, N).

    Yields:
        Which rows, and what :func:`cosines` says of them: float64 [G, part, K].
    """
    some = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
    size = max(1, ENTRIES // max(1, index.numel()))
    for at in range(0, rows.shape[1], size):
        part = slice(at, min(at + size, rows.shape[1]))
        yield part, cosines(rows[:, part], some)


def nearest(like: Tensor, joins: Tensor, there: Tensor) -> Tensor:
    """To which target each token goes: the most alike, the lowest index on ties.

    Args:
        like: float [G, N, K], no NaN.
        joins: bool [G, N], tokens that go to somebody.
        there: bool [G, K], targets that take somebody.

    Returns:
        LongTensor [G, N]; K where a token joins nobody.
    """
    k = like.shape[-1]
    if not k:
        return torch.zeros(like.shape[:-1], dtype=torch.long, device=like.device)
    best = first_max(like.masked_fill(~there[:, None], -torch.inf))
    return best.masked_fill(~joins | ~there.any(1, keepdim=True), k)


def first_near(rows: Tensor, picks: Tensor, near: float) -> Tensor:
    """By how many picks each token is covered first: itself picked, or near to one.

    Args:
        rows: float [G, N, d].
        picks: LongTensor [G, K], distinct, in the order of picking; N stands for none.
        near: the least cosine of what is near.

    Returns:
        LongTensor [G, N], the number of the pick, from 0; K where there is none.
    """
    (g, n), k = rows.shape[:2], picks.shape[1]
    numbers = torch.arange(k, device=picks.device).expand(g, k)
    first = torch.full((g, n + 1), k, device=picks.device).scatter(1, picks, numbers)[:, :n]
    others = []
    for _, like in cosines_to(rows, picks.clamp(max=n - 1)):
        covers = (like >= near) & (picks < n)[:, None]
        others.append(first_max(covers.to(torch.int8)).masked_fill(~covers.any(-1), k))
    return torch.minimum(first, torch.cat(others, 1))


def gathered(values: Tensor, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each group.

    Args:
        values: float [G, N, d]; what belongs to no group may be anything, NaN too.
        group: LongTensor [G, N], in [0, k]; k belongs to none.
        k: number of groups.

    Returns:
        float64 [G, k, d], and how many joined, float64 [G, k].
    """
    member = (group[:, None] == torch.arange(k, device=group.device)[:, None]).double()  # [G, k, N]
    inside = values.double().masked_fill((group == k)[..., None], 0.0)
    return member @ inside, member.sum(-1)  # unlike a scatter on a GPU, a product adds in the same order every time
