"""The greedy picks of one image on a CPU, without the work that cannot change them.

``vtc.ops.recursion`` computes the similarity of all pairs. Here most pairs are never looked at, and those that are
looked at are mostly multiplied in float32; float64 decides. The picks are the same, ties included:

**Lazy picks.** A score only falls when a pick is added, so an old score is an upper bound, as is a score from float32
products that leaves room for their rounding error. The tokens with the highest bounds form a panel. They are brought
up to date in float32; those still above every bound outside are computed exactly, and so are their similarities to
each other. From there the panel needs nobody else: picks are made inside it for as long as the best one beats every
bound outside. Then the next panel. (Lazy evaluation as in Minoux 1978, by panels instead of single tokens, so that the
work is matrix products.)

**The most isolated token.** One known neighbour nearer than somebody's nearest neighbour rules a token out. Tokens meet
the others chunk by chunk, and those ruled out leave. What float32 cannot tell apart is compared exactly.

**Rounding.** Rows are integers below 2**23, exact in float32. By the standard bound (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1) a product of two rows of d entries is off by no more than d u / (1 - d u) times the
product of their lengths, u = 2**-24, in whatever order it is added up.

All of it branches on values, so it is for eager CPU tensors only.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

PANEL = 256  # tokens that are brought up to date together
CHUNK = 256  # tokens that all others meet together, in search of the most isolated one
FEW = 1 / 8  # of the tokens met by all: by then enough must be ruled out, or the search is given up
_NOBODY = -3.0  # below every cosine


def exact_float32() -> bool:
    """Whether torch multiplies float32 matrices in float32, and not in a shorter type that it was allowed to use."""
    if any(os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT").upper() != "STRICT" for name in ("ONEDNN", "DNNL")):
        return False
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if (precision := getattr(matmul, "fp32_precision", None)) is not None:  # torch >= 2.9, where the older may raise
        return precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


@torch.autocast("cpu", enabled=False)
def most_isolated(z: Tensor, scale: float, mask: Tensor) -> int | None:
    """The token farthest from its nearest neighbour, the lowest index on ties.

    Args:
        z: float32 [N, d], integers.
        scale: makes cosines of products of rows.
        mask: bool [N], False for padding, which is nobody's neighbour.

    Returns:
        The index (0 if all is padding), or None if too many tokens are alike for the search to pay.
    """
    tokens = torch.arange(len(z), device=z.device)
    if not mask.all():
        tokens = tokens[mask]
        z = z[tokens]
    n = len(z)
    if n < 2:
        return int(tokens[0]) if n else 0
    error = cosine_error(z.shape[1])
    open_ = torch.arange(n, device=z.device)  # not ruled out
    rows, place = z, open_  # rows[place[i]] is token open_[i]; rows are gathered anew when half of them have left
    nearest = z.new_full((n,), _NOBODY)  # in float32, among the tokens met
    limit = math.inf  # the most isolated token has no neighbour nearer than this

    chunks = -(-n // CHUNK)
    for c in range(chunks):  # every chunks-th token, so that each chunk has seen the whole image
        cosine = (rows @ z[c::chunks].mT).mul_(scale)
        cosine = cosine[place] if len(place) < len(rows) else cosine
        met = torch.arange(c, n, chunks, device=z.device)
        nearest = torch.maximum(nearest, cosine.masked_fill_(open_[:, None] == met, _NOBODY).amax(1))
        if c & (c + 1) == 0:  # after 1, 2, 4, 8.. chunks the loneliest so far meet everybody
            lone = nearest.topk(min(16, len(nearest)), largest=False).indices
            cosine = (rows[place[lone]] @ z.mT).mul_(scale).scatter_(1, open_[lone, None], _NOBODY)
            limit = min(limit, float(cosine.amax(1).min()) + error)
        stay = (nearest - error <= limit).nonzero()[:, 0]
        open_, nearest, place = open_[stay], nearest[stay], place[stay]
        if len(open_) == 1:
            return int(tokens[open_])
        if len(open_) < len(rows) // 2:
            rows, place = z[open_], torch.arange(len(open_), device=z.device)
        if c + 1 == math.ceil(FEW * chunks) and len(open_) > n * (1 - 2 * FEW):
            return None

    limit = min(limit, float(nearest.min()) + error)
    stay = (nearest - error <= limit).nonzero()[:, 0]
    open_, nearest = open_[stay], nearest[stay]
    cosine = (z[open_] @ z.mT).mul_(scale)
    met = (cosine >= nearest[:, None] - 2 * error).any(0).nonzero()[:, 0]  # who can be the nearest of any of them
    cosine = _exact(z[open_].double(), z[met].double(), scale).masked_fill_(open_[:, None] == met, _NOBODY)
    return int(tokens[open_[cosine.amax(1).argmin()]])  # the first one on ties, on the CPU


@torch.autocast("cpu", enabled=False)
def lazy_picks(
    z: Tensor, scale: float, base: Tensor, weight: Tensor, first: int, k: int, most: float = math.inf
) -> Tensor:
    """Picks by ``base - weight * (largest cosine to a pick)``, the lowest index on ties.

    Args:
        z: float32 [N, d], integers.
        scale: makes cosines of products of rows.
        base: float32 [N].
        weight: float32 [N], not negative.
        first: the first pick.
        k: 1 <= k <= N.
        most: a greater cosine counts as this.

    Returns:
        LongTensor [k], pick order.
    """
    n, d = z.shape
    error = cosine_error(d)
    picks = torch.empty(k, dtype=torch.long, device=z.device)
    rows, exact_rows = z.new_empty(k, d), z.new_empty(k, d, dtype=torch.float64)  # of the picks
    picks[0], rows[0], exact_rows[0] = first, z[first], z[first]
    made, size = 1, PANEL
    bound = base - (z @ z[first]).mul_(scale).sub_(error).clamp_(max=most) * weight
    bound[first] = -math.inf
    known = torch.ones(n, dtype=torch.long, device=z.device)  # picks that the bound has seen

    while made < k:
        order = bound.argsort(descending=True, stable=True)
        panel = order[:size].sort().values
        rival, rival_at = (float(bound[order[size]]), int(order[size])) if size < n else (-math.inf, n)

        new = rows[int(known[panel].min()) : made]
        if len(new):
            cosine = (z[panel] @ new.mT).mul_(scale).amax(1)
            bound[panel] = torch.minimum(bound[panel], base[panel] - (cosine - error).clamp_(max=most) * weight[panel])
            known[panel] = made
        panel = panel[bound[panel] >= rival]

        exact = z[panel].double()
        score = base[panel] - _exact(exact, exact_rows[:made], scale).amax(1).clamp_(max=most) * weight[panel]
        score[bound[panel] == -math.inf] = -math.inf  # picked already
        bound[panel] = score
        ahead = ((score > rival) | ((score == rival) & (panel < rival_at))) & (score > -math.inf)
        panel, score, exact = panel[ahead], score[ahead], exact[ahead]
        if not len(panel):
            size *= 2  # the bounds were too high, or too many tokens are alike
            continue
        size = PANEL

        # Rounding keeps order, so the smallest of these is the score with the largest cosine.
        with_pick = (base[panel] - _exact(exact, exact, scale).clamp_(max=most) * weight[panel]).fill_diagonal_(
            -math.inf
        )
        chosen: list[int] = []
        at = panel.tolist()
        while made + len(chosen) < k:
            best = score.max(0)  # the first one on ties, on the CPU
            value, i = best.values.item(), int(best.indices)
            if value < rival or (value == rival and at[i] > rival_at) or value == -math.inf:
                break
            chosen.append(i)
            torch.minimum(score, with_pick[i], out=score)
        here = slice(made, made + len(chosen))
        picks[here], exact_rows[here] = panel[chosen], exact[chosen]
        rows[here] = exact_rows[here]
        bound[panel] = score
        made = here.stop
        known[panel] = made
    return picks


def cosine_error(d: int) -> float:
    """What a cosine of float32 products may be off; eight for the scaling and subtractions, 1.01 for lengths."""
    u = 2.0**-24
    return 1.01 * (d + 8) * u / (1 - (d + 8) * u)


def _exact(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Cosines [A, B] of float64 integer rows, as ``vtc.ops.recursion`` rounds them."""
    return (a @ b.mT).mul_(scale).float()
