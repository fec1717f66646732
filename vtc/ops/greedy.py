"""One greedy recursion over unit-norm rows, three update rules.

With z_i the rows scaled to length one and S the tokens picked so far, every pick is::

    argmax over i not in S of   base_i - weight * penalty_i(S)

    farthest-first (DivPrune, ToDRE v1)   base 0                      penalty  max over c in S of z_i.z_c
    the same, weighted (Cen-Prune)        base and weight w_i         penalty  max over c in S of z_i.z_c
    max-sum (ToDRE v2)                    base 0                      penalty  sum over c in S of z_i.z_c
    marginal relevance (IDPruner)         balance * importance_i      penalty  max over c in S of z_i.z_c

The penalty is a running maximum or sum, so a pick costs one row of similarities. Picks are nested: the first j of
k are the picks for j.

This file checks the arguments and chooses who computes: ``vtc.ops.recursion`` is the readable torch reference, and
``vtc.ops.kernels.greedy`` does the same on a GPU, with the same picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops import recursion
from vtc.ops.backend import backend
from vtc.ops.proof import proved
from vtc.values import shown

HEAVIEST = 1e30
"""The greatest weight of a token: twice as much is still finite."""


def farthest_first(
    features: Tensor,
    k: int,
    start: int | Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Farthest-first traversal under the cosine distance: each pick is the token farthest from those picked.

    DivPrune (arXiv 2503.02175, section 3.3) with ``start=None``; greedy k-center, ToDRE v1 (arXiv 2505.18757v1),
    from a given token.

    Args:
        features: float [N, d] or [B, N, d]. A row of zeros, or with an entry that is not finite, has cosine 0 to all.
        k: how many to pick, 1 <= k <= N.
        start: the first pick. ``None``: the token farthest from its nearest neighbour (lowest index on ties, as
            everywhere). An int: that token of every row of the batch. LongTensor [B]: one for each row; its values
            are not checked, since that would wait for the device.
        mask: bool [N] or [B, N], False for padding, which is picked only when no other token is left.
        weights: float [N] or [B, N]: each pick but the first is the token with the greatest weight times distance. The
            first is the most isolated one whatever it weighs. NaN and what is negative count as 0.

    Returns:
        LongTensor [k] or [B, k], distinct indices in pick order.

    Raises:
        ValueError: k or start out of range, or shapes that do not fit.
        TypeError: features not of a float type, mask not bool, start not an integer.
    """
    if weights is not None and weights.shape != features.shape[:-1]:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit features {tuple(features.shape)}")
    return _pick(features, k, mask, start=start, weights=weights)


def max_sum(features: Tensor, k: int, start: int | Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Max-sum dispersion: each pick is the token with the least summed cosine to those picked.

    ToDRE v2 (arXiv 2505.18757v2, algorithm 1). Arguments, result and errors as :func:`farthest_first`, but ``start``
    must be given.
    """
    if start is None:
        raise TypeError("max_sum needs a start: an int or a LongTensor [B]; only farthest_first finds its own")
    return _pick(features, k, mask, start=start, running_sum=True)


def max_marginal_relevance(
    features: Tensor, importance: Tensor, k: int, balance: float = 0.5, *, mask: Tensor | None = None
) -> Tensor:
    """Maximal marginal relevance: important tokens that do not resemble those picked.

    IDPruner (arXiv 2602.13315, section 3): the first pick has the highest importance, each later one the highest
    ``balance * importance - (1 - balance) * (largest cosine to a pick)``.

    Args:
        features: as for :func:`farthest_first`.
        importance: float [N] or [B, N], already scaled to [0, 1]; NaN counts as 0.
        k: as for :func:`farthest_first`.
        balance: weight of the importance, in [0, 1]; 0 is farthest-first from the most important token.
        mask: as for :func:`farthest_first`.

    Returns, raises: as :func:`farthest_first`; ValueError for a balance outside [0, 1].
    """
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance={shown(balance)} must lie in [0, 1]")
    if importance.shape != features.shape[:-1]:
        raise ValueError(f"importance {tuple(importance.shape)} does not fit features {tuple(features.shape)}")
    return _pick(features, k, mask, importance=importance, balance=balance)


def _pick(
    features: Tensor,
    k: int,
    mask: Tensor | None,
    *,
    start: int | Tensor | None = None,
    importance: Tensor | None = None,
    balance: float = 0.0,
    running_sum: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Check the arguments, give all of them a batch dimension, and have the picks made."""
    if features.ndim not in (2, 3):
        raise ValueError(f"features must be [N, d] or [B, N, d], not {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"features must be of a float type, not {features.dtype}")
    n, d = features.shape[-2:]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} tokens cannot be picked out of {n}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, not {mask.dtype}")
    if mask is not None and mask.shape != features.shape[:-1]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit features {tuple(features.shape)}")
    for name, given in (("mask", mask), ("importance", importance), ("weights", weights)):
        if given is not None and given.device != features.device:
            raise ValueError(f"{name} is on {given.device}, features are on {features.device}; move one to the other")

    x = features.detach().reshape(-1, n, d)
    b = x.shape[0]
    if isinstance(start, Tensor):
        if start.dtype != torch.long:
            raise TypeError(f"start must be an int or a LongTensor, not a tensor of {start.dtype}")
        if start.numel() != b:
            raise ValueError(f"start {tuple(start.shape)} does not fit a batch of {b}")
        start = start.reshape(b).to(x.device, non_blocking=True)
    elif start is not None:
        if not isinstance(start, int) or isinstance(start, bool):
            raise TypeError(f"start={shown(start)} must be an int or a LongTensor")
        if not 0 <= start < n:
            raise ValueError(f"start={start} is not the index of one of {n} tokens")
        start = torch.full((b,), start, device=x.device)
    mask = x.new_ones(b, n, dtype=torch.bool) if mask is None else mask.reshape(b, n)
    if importance is not None:
        importance = importance.detach().reshape(b, n).float().nan_to_num(nan=0.0)
    if weights is not None:
        weights = weights.detach().reshape(b, n).float().nan_to_num(nan=0.0, posinf=HEAVIEST).clamp(0.0, HEAVIEST)
        weights = weights.masked_fill(~mask, 0.0)

    job = recursion.Job(x, k, mask, start, importance, balance, running_sum, weights)
    picks = _made(job)
    return picks[0] if features.ndim == 2 else picks


def _made(job: recursion.Job) -> Tensor:
    if backend(job.x.device) == "triton":
        from vtc.ops.kernels import greedy as kernels

        if proved(job.x.device, lambda: kernels.case(job), recursion.picks):
            return kernels.picks(job)
    return recursion.picks(job)
