"""Weighted PageRank on attention, and leaving out what is like something more important: the steps of Zero-TPrune."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.merging import cosines

ENTRIES = 2**25
"""Of attention maps that are made at a time: 128 MiB. All heads of 1400 tokens, one of 5000."""


def pagerank(query: Tensor, key: Tensor, start: Tensor, votes: int) -> Tensor:
    """What the tokens of one picture have, when each has given away what it had as its attention says, several times.

    Args:
        query: float [heads, T, d].
        key: float [heads, T, d]; a product with a query is a logit of attention.
        start: float [T], what they have at first.
        votes: how many times.

    Returns:
        Float [heads, T], with the sum that ``start`` has. Maps are made of some heads at a time.
    """
    each = max(1, ENTRIES // max(1, query.shape[1]) ** 2)
    found = []
    for queries, keys in zip(query.split(each), key.split(each), strict=True):
        graph = (queries @ keys.mT).softmax(-1)  # [some heads, T, T], a row for who gives
        score = start.expand(len(graph), 1, -1)
        for _ in range(votes):
            score = score @ graph
        found.append(score[:, 0])
    return torch.cat(found)


def over_heads(scores: Tensor, variance: tuple[float, float] | None = None) -> Tensor:
    """Root of the mean square over heads.

    Args:
        scores: float [heads, N].
        variance: of a head's scores, least and most of heads that count; all do where none is left.

    Returns:
        Float [N].
    """
    counts = torch.ones_like(scores[:, :1])
    if variance is not None:
        spread = scores.var(1, correction=0, keepdim=True)
        inside = (spread >= variance[0]) & (spread <= variance[1])
        counts = (inside | ~inside.any()).to(scores.dtype)
    return ((scores.square() * counts).sum(0) / counts.sum()).sqrt()


def without_similar(rows: Tensor, importance: Tensor, drop: int) -> Tensor:
    """Who is left when those of the less important half leave that are most like somebody of the other half.

    Args:
        rows: float [N, d], compared by cosine.
        importance: float [N]; of equals, the first is the more important.
        drop: how many leave, at most N // 2.

    Returns:
        LongTensor [N - drop], ascending; of those that are equally alike, the first stay.
    """
    half = len(rows) // 2
    order = importance.sort(descending=True, stable=True).indices
    more, less = order[: len(rows) - half].sort().values, order[len(rows) - half :].sort().values
    closest = cosines(rows[less], rows[more]).amax(1)
    return torch.cat([more, less[closest.sort(stable=True).indices[: half - drop]]]).sort().values
