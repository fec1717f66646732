"""One greedy recursion over unit-norm rows, three update rules.

With z_i the rows scaled to length one and S the tokens picked so far, every pick is::

    argmax over i not in S of   base_i - weight * penalty_i(S)

    farthest-first (DivPrune, ToDRE v1)   base 0                      penalty  max over c in S of z_i.z_c
    max-sum (ToDRE v2)                    base 0                      penalty  sum over c in S of z_i.z_c
    marginal relevance (IDPruner)         balance * importance_i      penalty  max over c in S of z_i.z_c

The penalty is a running maximum or sum, so a pick costs one row of similarities. Picks are nested: the first j of
k are the picks for j.

**Exact similarities.** The picks of an image must not depend on its neighbours in the batch, yet the order in which
a matrix product adds up depends on the shape of the batch. So z is rounded to multiples of 2**-26 (finer than
float32 near one) and multiplied as integers in float64: every partial sum stays below 2**53, so none is rounded, and
every order of summation, batch shape, device and blocking gives the same bits. The result is rounded once, to
float32. Float64 is also out of the reach of autocast and TF32. (Devices without float64 use float32 and lose the
guarantee, not the function.)

**Two regimes, same picks.** With the Gram matrix a pick is a gather of one row; without it, a matrix-vector product.
A matrix-vector product runs at the speed of memory and costs as much as about 24 rows of the (symmetric) Gram matrix
on the CPU we measured, so the matrix is built for N <= 24 k, and whenever the first pick needs all pairs anyway, as
long as it has at most 2**28 entries (N = 16384). Batches above that size are worked off in parts.

Nothing here reads a tensor's value on the host, and all of it traces into one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GRAM_ENTRIES = 2**28
GRAM_ROWS_PER_PICK = 24
BLOCK = 256
_UNIT = 2.0**26
_PADDING = -1e30  # the base of a padding row: below every token, above what is picked already
_LONE = -2.0  # the similarity of a token to its nearest neighbour when it has none


def farthest_first(
    features: Tensor, k: int, start: int | Tensor | None = None, *, mask: Tensor | None = None
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

    Returns:
        LongTensor [k] or [B, k], distinct indices in pick order.

    Raises:
        ValueError: k or start out of range, or shapes that do not fit.
        TypeError: features not of a float type, mask not bool, start not an integer.
    """
    return _pick(features, k, mask, start=start)


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
        raise ValueError(f"balance={balance!r} must lie in [0, 1]")
    if importance.shape != features.shape[:-1]:
        raise ValueError(f"importance {tuple(importance.shape)} does not fit features {tuple(features.shape)}")
    return _pick(features, k, mask, importance=importance, balance=balance)


def first_max(score: Tensor) -> Tensor:
    """Index of the largest entry along the last dimension, the lowest one on ties, on every device.

    Args:
        score: any real dtype [..., N], no NaN.

    Returns:
        LongTensor [...].
    """
    n = score.shape[-1]
    index = torch.arange(n, device=score.device)
    return torch.where(score == score.amax(-1, keepdim=True), index, n - 1).amin(-1)


def _pick(
    features: Tensor,
    k: int,
    mask: Tensor | None,
    *,
    start: int | Tensor | None = None,
    importance: Tensor | None = None,
    balance: float = 0.0,
    running_sum: bool = False,
) -> Tensor:
    """Check the arguments, give all of them a batch dimension, work the batch off in parts that fit."""
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
            raise TypeError(f"start={start!r} must be an int or a LongTensor")
        if not 0 <= start < n:
            raise ValueError(f"start={start} is not the index of one of {n} tokens")
        start = torch.full((b,), start, device=x.device)
    mask = x.new_ones(b, n, dtype=torch.bool) if mask is None else mask.reshape(b, n)
    if importance is not None:
        importance = importance.detach().reshape(b, n).float().nan_to_num(nan=0.0)

    part = max(1, GRAM_ENTRIES // (n * max(n, d, 1)))
    chosen = [
        _recursion(
            x[s : s + part],
            k,
            mask[s : s + part],
            None if start is None else start[s : s + part],
            None if importance is None else importance[s : s + part],
            balance,
            running_sum,
        )
        for s in range(0, max(b, 1), part)
    ]
    picks = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
    return picks[0] if features.ndim == 2 else picks


def _recursion(
    x: Tensor,
    k: int,
    mask: Tensor,
    start: Tensor | None,
    importance: Tensor | None,
    balance: float,
    running_sum: bool,
) -> Tensor:
    """The readable reference of the whole family: x [B, N, d] -> picks [B, k]."""
    b, n, _ = x.shape
    z = _unit_integers(x)
    all_pairs = start is None and importance is None
    gram = n * n <= GRAM_ENTRIES and (all_pairs or n <= GRAM_ROWS_PER_PICK * k)
    similarity = _by_gram(z) if gram else _by_product(z)

    weight = 1.0 - balance if importance is not None else 1.0
    base = balance * importance if importance is not None else torch.zeros(b, n, device=x.device)
    base = base.masked_fill(~mask, _PADDING)
    if start is not None:
        pick = start
    elif importance is not None:
        pick = first_max(importance.masked_fill(~mask, _PADDING))
    else:
        pick = first_max((-_nearest(similarity, mask)).masked_fill(~mask, _PADDING))

    picks = [pick]
    penalty: Tensor | None = None
    for _ in range(k - 1):
        base.scatter_(1, pick[:, None], -torch.inf)
        row = similarity(pick)
        if penalty is None:
            penalty = row.to(z.dtype) if running_sum else row
        else:
            penalty = penalty + row if running_sum else torch.maximum(penalty, row)
        pick = first_max(torch.sub(base, penalty, alpha=weight))
        picks.append(pick)
    return torch.stack(picks, 1)


def _unit_integers(x: Tensor) -> Tensor:
    """Rows scaled to length 2**26 and rounded to integers, in float64; zero where a row has no direction."""
    z = x.to(torch.float32 if x.device.type == "mps" else torch.float64, copy=True)
    scale = _UNIT / torch.linalg.vector_norm(z, dim=-1, keepdim=True)  # NaN, inf or 0: that row has no direction
    usable = torch.isfinite(scale) & (scale > 0)
    return z.mul_(scale).masked_fill_(~usable, 0.0).round_()


# Both regimes give a function: picks LongTensor [B], or a range of tokens, to the float32 cosines [B, N], or
# [B, range, N], of these tokens to all.
_Similarity = Callable[[Tensor | slice], Tensor]


def _by_gram(z: Tensor) -> _Similarity:
    b, n, _ = z.shape
    gram = torch.empty(b, n, n, device=z.device)
    for s in range(0, n, BLOCK):
        e = min(s + BLOCK, n)
        block = (z[:, s:e] @ z[:, s:].mT).mul_(_UNIT**-2)
        gram[:, s:e, s:] = block
        gram[:, e:, s:e] = block[:, :, e - s :].mT
    batch = torch.arange(b, device=z.device)
    return lambda of: gram[:, of] if isinstance(of, slice) else gram[batch, of]


def _by_product(z: Tensor) -> _Similarity:
    batch = torch.arange(z.shape[0], device=z.device)

    def similarity(of: Tensor | slice) -> Tensor:
        if isinstance(of, slice):
            return (z[:, of] @ z.mT).mul_(_UNIT**-2).float()
        return (z @ z[batch, of][..., None])[..., 0].mul_(_UNIT**-2).float()

    return similarity


def _nearest(similarity: _Similarity, mask: Tensor) -> Tensor:
    """Float32 [B, N]: the cosine of every token to its nearest neighbour, padding and itself left out.

    Minus one, this is DivPrune's second smallest distance in a column, the smallest being the token itself.
    """
    n = mask.shape[1]
    index = torch.arange(n, device=mask.device)
    nearest = []
    for s in range(0, n, BLOCK):
        rows = slice(s, min(s + BLOCK, n))
        other = (index[rows, None] != index) & mask[:, None, :]
        nearest.append(similarity(rows).masked_fill(~other, _LONE).amax(-1))
    return torch.cat(nearest, 1)
