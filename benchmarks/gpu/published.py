"""The selection loops as published, written by us from their description (shared/methods.md), to be measured against.

One image at a time, one round of small kernels for each pick: that is what public code does, and what makes it slow.
None of it was copied from any of that code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divprune(x: Tensor, k: int, start: int | None = None) -> Tensor:
    """DivPrune: the N x N distances in the features' dtype; each pick gathers the rows of *all* picks so far.

    k times up to k rows of N are read, so O(k² N). Picks are not masked.

    Args:
        x: float [N, d].
        k: how many.
        start: the first pick (greedy k-center); ``None``: the column whose second smallest distance is largest.

    Returns:
        LongTensor [k], pick order.
    """
    z = x / x.norm(dim=-1, keepdim=True)
    distances = 1.0 - z @ z.mT
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    for at in range(k):
        if at:
            nearest = distances.index_select(0, picks[:at]).amin(0)
        elif start is None:
            nearest = torch.topk(distances, 2, dim=0, largest=False).values[1]
        else:
            nearest = torch.zeros_like(distances[0])
            nearest[start] = 1.0
        picks[at] = nearest.argmax()
    return picks


def running_minimum(x: Tensor, k: int) -> Tensor:
    """DivPrune as AngelSlim's port makes it: of the N x N distances each pick reads one row, beside a running minimum.

    Args and result as :func:`divprune`; without a start.
    """
    z = torch.nn.functional.normalize(x.float(), dim=-1)
    distances = 1.0 - z @ z.mT
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    nearest = torch.topk(distances, 2, dim=0, largest=False).values[1]
    for at in range(k):
        pick = nearest.argmax()
        picks[at] = pick
        nearest = torch.minimum(nearest, distances[pick]) if at else distances[pick].clone()
        nearest[picks[: at + 1]] = -torch.inf
    return picks


def max_sum(x: Tensor, k: int, start: int) -> Tensor:
    """ToDRE, algorithm 1: a matrix-vector product with all features for each pick, in float32.

    Args and result as :func:`divprune`.
    """
    z = torch.nn.functional.normalize(x.float(), dim=-1)
    total = z @ z[start]
    total[start] = torch.inf
    picks = [torch.tensor(start, device=x.device)]
    for _ in range(k - 1):
        pick = total.argmin()
        picks.append(pick)
        total = total + z @ z[pick]
        total[pick] = torch.inf
    return torch.stack(picks)


def marginal_relevance(x: Tensor, importance: Tensor, k: int, balance: float = 0.5) -> Tensor:
    """IDPruner: the N x N cosines in float32; each pick is copied to the host before the next one.

    Args:
        x: float [N, d].
        importance: float [N], in [0, 1].
        k: how many.
        balance: weight of the importance.

    Returns:
        LongTensor [k], pick order.
    """
    z = x.float()
    z = z / (z.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = z @ z.mT
    likest = torch.full_like(importance, -2.0)
    taken = torch.zeros_like(importance, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < k:
        score = balance * importance - (1.0 - balance) * likest if picks else importance
        best = score.masked_fill(taken, -torch.inf).topk(1).indices
        picks += best.tolist()  # waits for the device
        taken[best] = True
        likest = torch.maximum(likest, cosine[:, best].amax(1))
    return torch.tensor(picks, device=x.device)


def transition_variation(before: Tensor, after: Tensor) -> Tensor:
    """TransPrune's module TTV for one prompt, one elementary operation after the other, in the model's dtype.

    Args:
        before: float [L, d].
        after: float [L, d].

    Returns:
        [L], in the dtype of the input.
    """
    length = after.norm(dim=-1) / before.norm(dim=-1)
    turn = torch.exp(1.0 - torch.nn.functional.cosine_similarity(before, after, dim=-1))
    return length * turn / turn.sum()


def instruction_attention(query: Tensor, key: Tensor, scale: float, key_slice: slice) -> Tensor:
    """TransPrune's IGA for one prompt: keys repeated for every head, and the whole T x L matrix in memory.

    Args:
        query: [H, T, dh], the last T rows.
        key: [Hkv, L, dh].
        scale: of the logits.
        key_slice: the keys whose attention is wanted.

    Returns:
        Float32 [n].
    """
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    rows, length = query.shape[1], key.shape[1]
    hidden = torch.ones(rows, length, dtype=torch.bool, device=key.device).triu(length - rows + 1)
    logits = (query @ key.mT * scale).masked_fill(hidden, torch.finfo(query.dtype).min)
    return logits.softmax(-1, dtype=torch.float32)[..., key_slice].mean(0).mean(0)
