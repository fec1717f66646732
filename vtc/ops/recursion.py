"""The torch reference of the greedy family: batched, free of host synchronisation, traceable into one graph.

**Exact similarities.** The picks of an image must not depend on its neighbours in the batch, yet the order in which
a matrix product adds up depends on the shape of the batch. So z is rounded to multiples of 1/UNIT (as fine as
float32 near one) and multiplied as integers in float64: every partial sum stays below 2**53, so none is rounded, and
every order of summation, batch shape, device and blocking gives the same bits. The result is rounded to float32 at the
end. Float64 is also out of the reach of autocast and TF32. (Devices without float64 use float32 and lose the
guarantee, not the function.) UNIT is the largest integer that three digits of eight bits can write, so that the
kernels get the very same integers out of int8 matrix units.

**Two regimes, same picks.** With the Gram matrix a pick is a gather of one row; without it, a matrix-vector product.
A matrix-vector product runs at the speed of memory and costs as much as about 24 rows of the (symmetric) Gram matrix
on the CPU we measured, so the matrix is built for N <= 24 k, and whenever the first pick needs all pairs anyway, as
long as it has at most 2**28 entries (N = 16384). Batches above that size are worked off in parts.

Eager CPU tensors take other ways to the same picks, which branch on values: ``vtc.ops.cpu`` for a small share of a
large image, ``vtc.ops.filtered`` where otherwise the Gram matrix would be built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc.ops import cpu, filtered

GRAM_ENTRIES = 2**28
GRAM_ROWS_PER_PICK = 24
BLOCK = 256
CACHED = 2**17  # entries of rows that stay in the cache while they are scaled
UNIT = 127.0 * (1 + 256 + 65536)  # 8355711: three balanced digits of base 256
LAZY_TOKENS = 1536  # with fewer, the lazy picks of vtc.ops.cpu cost more than they skip
LAZY_SHARE = 1 / 4  # of the tokens picked; above it they skip too little
FILTERED_BATCH = 2**27  # products of an image from which on a batch is faster one by one
FILTERED_SUM = (1 / 8, 1024)  # share picked, and width, up to which sums are filtered: beyond, too many are exact
MOST = 1.0  # of a cosine, where distances are weighted: one below 0 would favour what weighs least
_PADDING = -1e30  # the base of a padding row: below every token, above what is picked already
_LONE = -2.0  # the similarity of a token to its nearest neighbour when it has none


_PLAIN: ContextVar[bool] = ContextVar("vtc_plain_recursion", default=False)


@contextmanager
def unbranched() -> Iterator[None]:
    """The recursion itself for a while (in this thread), as on other devices, even where another way is faster."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


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


@dataclass(frozen=True)
class Job:
    """Images, and how to pick from them; arguments have been checked by ``vtc.ops.greedy``.

    Attributes:
        x: float [B, N, d].
        k: 1 <= k <= N.
        mask: bool [B, N], False for padding.
        start: LongTensor [B], the first picks; None: the most isolated tokens, or the most important ones.
        importance: float32 [B, N] without NaN, or None.
        balance: weight of the importance.
        running_sum: the penalty is a sum instead of a maximum.
        weights: float32 [B, N], finite, at least 0, and 0 for padding: of each token's distance. None: 1 for all.
    """

    x: Tensor
    k: int
    mask: Tensor
    start: Tensor | None
    importance: Tensor | None
    balance: float
    running_sum: bool
    weights: Tensor | None = None

    @property
    def all_pairs(self) -> bool:
        """Whether the first pick asks for the similarities of all pairs."""
        return self.start is None and self.importance is None

    def parts(self, size: int) -> Iterator[Job]:
        """The same for at most ``size`` images at a time; once, if there is none."""
        for at in range(0, max(len(self.x), 1), size):
            of = slice(at, at + size)
            start = None if self.start is None else self.start[of]
            importance = None if self.importance is None else self.importance[of]
            weights = None if self.weights is None else self.weights[of]
            yield replace(self, x=self.x[of], mask=self.mask[of], start=start, importance=importance, weights=weights)


def picks(job: Job) -> Tensor:
    """The first k picks of every image: LongTensor [B, k], in pick order."""
    _, n, d = job.x.shape
    make = _branching(job)
    size = max(1, GRAM_ENTRIES // (n * max(n, d, 1))) if make is None else 1
    chosen = [(make or _picks)(part) for part in job.parts(size)]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _picks(job: Job) -> Tensor:
    """The recursion itself, for a part of the batch."""
    mask = job.mask
    z = _unit_integers(job.x)
    similarity = _by_gram(z) if _by_all_pairs(job) else _by_product(z)

    base, weight = _terms(job)
    pick = _given_first(job)
    if pick is None:
        pick = first_max((-_nearest(similarity, mask)).masked_fill(~mask, _PADDING))

    picks = [pick]
    most = MOST if job.weights is not None else None
    penalty: Tensor | None = None
    for _ in range(job.k - 1):
        base.scatter_(1, pick[:, None], -torch.inf)
        row = similarity(pick).clamp(max=most) if most else similarity(pick)
        if penalty is None:
            penalty = row.to(z.dtype) if job.running_sum else row
        else:
            penalty = penalty + row if job.running_sum else torch.maximum(penalty, row)
        pick = first_max(base - penalty * weight)  # two roundings on every device, never one
        picks.append(pick)
    return torch.stack(picks, 1)


def _terms(job: Job) -> tuple[Tensor, float | Tensor]:
    """Base of every token, float32 [B, N], and the weight of the penalty, one for all or [B, N]."""
    weight: float | Tensor = 1.0
    if job.weights is not None:
        base, weight = job.weights, job.weights
    elif job.importance is None:
        base = torch.zeros(job.mask.shape, dtype=torch.float32, device=job.mask.device)
    else:
        base, weight = job.balance * job.importance, 1.0 - job.balance
    return base.masked_fill(~job.mask, _PADDING), weight


def _given_first(job: Job) -> Tensor | None:
    """The first picks, LongTensor [B], where no similarity is needed for them."""
    if job.start is not None or job.importance is None:
        return job.start
    return first_max(job.importance.masked_fill(~job.mask, _PADDING))


def _branching(job: Job) -> Callable[[Job], Tensor] | None:
    """What makes the picks of one image by branching on values, where it may and pays: eager tensors on a CPU."""
    b, n, d = job.x.shape
    on_host = job.x.device.type == "cpu" and job.x.numel() > 0 and not torch.compiler.is_compiling()
    if not on_host or _PLAIN.get() or not cpu.exact_float32():
        return None
    if n >= LAZY_TOKENS and job.k <= n * LAZY_SHARE and not job.running_sum:
        return _lazy_picks
    share, width = FILTERED_SUM
    pays = (b == 1 or n * n * d >= FILTERED_BATCH) and (not job.running_sum or (job.k <= n * share and d <= width))
    return _filtered_picks if pays and _by_all_pairs(job) else None


def _by_all_pairs(job: Job) -> bool:
    """Whether the Gram matrix is worth its work."""
    n = job.x.shape[1]
    return n * n <= GRAM_ENTRIES and (job.all_pairs or n <= GRAM_ROWS_PER_PICK * job.k)


def _lazy_picks(job: Job) -> Tensor:
    """The picks of one image by ``vtc.ops.cpu``; by all pairs if no token can be ruled out cheaply."""
    z, given = _rounded(job.x[0]), _given_first(job)
    first = cpu.most_isolated(z, UNIT**-2, job.mask[0]) if given is None else int(given)
    if first is None:
        return _filtered_picks(job) if _by_all_pairs(job) else _picks(job)
    base, weight = _terms(job)
    each = weight[0] if isinstance(weight, Tensor) else torch.full_like(base[0], weight)
    return cpu.lazy_picks(z, UNIT**-2, base[0], each, first, job.k, _most(job))[None]


def _filtered_picks(job: Job) -> Tensor:
    """The picks of one image by ``vtc.ops.filtered``, or by the recursion above if too many tokens are alike."""
    cosines, given = filtered.Cosines(_rounded(job.x[0]), UNIT**-2), _given_first(job)
    base, weight = _terms(job)
    try:
        first = filtered.most_isolated(cosines, job.mask[0]) if given is None else int(given)
        if job.running_sum:
            return filtered.sum_picks(cosines, base[0], first, job.k)[None]
        each = weight[0] if isinstance(weight, Tensor) else weight
        return filtered.nearest_picks(cosines, base[0], each, first, job.k, _most(job))[None]
    except filtered.TooMuchAlikeError:
        return _picks(job)


def _most(job: Job) -> float:
    """The greatest cosine that counts."""
    return math.inf if job.weights is None else MOST


def _rounded(x: Tensor) -> Tensor:
    """Float32 [N, d], the integers of rows [N, d]; a few rows at a time."""
    z = torch.empty(x.shape, device=x.device, dtype=torch.float32)
    rows = max(1, CACHED // x.shape[1])
    for s in range(0, len(z), rows):
        z[s : s + rows] = _unit_integers(x[s : s + rows])
    return z


def _unit_integers(x: Tensor) -> Tensor:
    """Rows scaled to length UNIT and rounded to integers, in float64; zero where a row has no direction."""
    z = x.to(torch.float32 if x.device.type == "mps" else torch.float64, copy=True)
    scale = UNIT / torch.linalg.vector_norm(z, dim=-1, keepdim=True)  # NaN, inf or 0: that row has no direction
    usable = torch.isfinite(scale) & (scale > 0)
    return z.mul_(scale).masked_fill_(~usable, 0.0).round_()


# Both regimes give a function: picks LongTensor [B], or a range of tokens, to the float32 cosines [B, N], or
# [B, range, N], of these tokens to all.
_Similarity = Callable[[Tensor | slice], Tensor]


def _by_gram(z: Tensor) -> _Similarity:
    b, n, _ = z.shape
    gram = torch.empty(b, n, n, dtype=torch.float32, device=z.device)
    for s in range(0, n, BLOCK):
        e = min(s + BLOCK, n)
        block = (z[:, s:e] @ z[:, s:].mT).mul_(UNIT**-2)
        gram[:, s:e, s:] = block
        gram[:, e:, s:e] = block[:, :, e - s :].mT
    batch = torch.arange(b, device=z.device)
    return lambda of: gram[:, of] if isinstance(of, slice) else gram[batch, of]


def _by_product(z: Tensor) -> _Similarity:
    batch = torch.arange(z.shape[0], device=z.device)

    def similarity(of: Tensor | slice) -> Tensor:
        if isinstance(of, slice):
            return (z[:, of] @ z.mT).mul_(UNIT**-2).float()
        return (z @ z[batch, of][..., None])[..., 0].mul_(UNIT**-2).float()

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
