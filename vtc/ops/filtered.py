"""The greedy picks of one image on a CPU: float32 products say who could be next, float64 who is.

``vtc.ops.recursion`` multiplies all pairs in float64. Here all are multiplied in float32, in half of the time, and
every cosine is known to within an error (see :mod:`vtc.ops.cpu`). So every score lies between two bounds. Who cannot
reach the lower one of the best is not the next pick; if that leaves one token, it is. Else those few are computed
exactly, from the few pairs that their score can depend on. The picks are the same, ties included.

**Rounding** keeps order: a score is computed from a cosine by float32 operations that never turn two values round. So
the bounds of a score are the same operations on the bounds of its cosine, and need no room of their own.

**The error** grows with the number of products that are added up one after the other. So rows are multiplied in pieces
of ``PIECE`` entries, and the pieces added: by the same standard bound that is PIECE plus the number of pieces.

Where many tokens are alike, many have to be computed exactly. Beyond a share of all pairs that does not pay, and the
search is given up.

All of it branches on values, so it is for eager CPU tensors only. The loops are over a few hundred numbers at a time,
where NumPy's calls cost less than torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtc.ops.cpu import cosine_error

BLOCK = 256  # rows of the Gram matrix at a time
PIECE = 512  # entries of a row that are multiplied at a time
SPENT = 1 / 16  # of all pairs, in float64, before the search is given up
NOBODY = -3.0  # below every cosine
PADDING = -1e29  # above the scores of padding, which are all alike, and below every other

Array = np.ndarray[Any, Any]


class TooMuchAlikeError(Exception):
    """Float32 tells too little apart."""


class Cosines:
    """All cosines of one image: from below at once, exactly where asked.

    Args:
        z: float32 [N, d], integers.
        scale: makes cosines of products of rows.

    Attributes:
        low: float32 [N, N], at most the cosine.
        width: and at most this below it.
    """

    def __init__(self, z: Tensor, scale: float) -> None:
        n, d = z.shape
        pieces = -(-d // PIECE)
        error = cosine_error(min(d, PIECE) + pieces)
        self.z, self.scale, self.width = z.numpy(), scale, np.float32(2 * error)
        low = z.new_empty(n, n)
        for s in range(0, n, BLOCK):
            e = min(s + BLOCK, n)
            block = z[s:e, :PIECE] @ z[s:, :PIECE].mT
            for p in range(PIECE, d, PIECE):
                block += z[s:e, p : p + PIECE] @ z[s:, p : p + PIECE].mT
            low[s:e, s:] = block.mul_(scale).sub_(error)
            low[e:, s:e] = low[s:e, e:].mT
        self.low: Array = low.numpy()
        self._left = int(n * n * SPENT) + 8 * n

    def exact(self, token: Any, rows: Array) -> Array:
        """Of a token to rows [R, d], integers in float64: float32 [R], as ``vtc.ops.recursion`` rounds them.

        Raises:
            TooMuchAlikeError: too many were asked for by now.
        """
        self._left -= len(rows)
        if self._left < 0:
            raise TooMuchAlikeError
        return (rows @ self.z[token].astype(np.float64) * self.scale).astype(np.float32)

    def largest(self, token: Any, others: Array) -> np.float32:
        """The exact largest cosine of a token to others [O], one or more."""
        low = self.low[token, others]
        return self.exact(token, self.z[others[low >= low.max() - self.width]].astype(np.float64)).max()


def most_isolated(cosines: Cosines, mask: Tensor) -> int:
    """The token farthest from its nearest neighbour, the lowest index on ties; mask: bool [N], False for padding."""
    tokens: Array = mask.nonzero()[:, 0].numpy()
    if len(tokens) < 2:
        return int(tokens[0]) if len(tokens) else 0
    low = cosines.low
    itself = low.diagonal().copy()
    np.fill_diagonal(low, NOBODY)
    nearest = torch.from_numpy(low if len(tokens) == len(low) else low[np.ix_(tokens, tokens)]).amax(1).numpy()
    few = tokens[nearest <= nearest.min() + cosines.width]
    if len(few) > 1:
        few = few[np.argmin([cosines.largest(i, tokens[tokens != i]) for i in few]) :]  # the first one on ties
    np.fill_diagonal(low, itself)
    return int(few[0])


def nearest_picks(
    cosines: Cosines, base: Tensor, weight: Tensor | float, first: int, k: int, most: float = math.inf
) -> Tensor:
    """Picks by ``base - weight * (largest cosine to a pick)``, the lowest index on ties.

    Args:
        cosines: of all tokens.
        base: float32 [N].
        weight: float32 [N] or one for all, not negative.
        first: the first pick.
        k: 1 <= k <= N.
        most: a greater cosine counts as this.

    Returns:
        LongTensor [k], pick order.
    """
    of: Array = base.numpy().copy()
    by: Array = torch.as_tensor(weight, dtype=torch.float32).expand(len(of)).numpy()
    picks, low, upper = np.empty(k, dtype=np.int64), np.full_like(of, NOBODY), np.empty_like(of)

    def score(tokens: Any, cosine: Any) -> Any:
        return of[tokens] - np.minimum(cosine, np.float32(most)) * by[tokens]

    pick = first
    for made in range(1, k + 1):
        picks[made - 1] = pick
        if made == k:
            break
        of[pick] = -math.inf
        np.maximum(low, cosines.low[pick], out=low)
        np.minimum(low, most, out=upper)
        np.multiply(upper, by, out=upper)
        np.subtract(of, upper, out=upper)
        best = int(upper.argmax())
        can = np.flatnonzero(upper >= score(best, low[best] + cosines.width))
        if len(can) > 1 and upper[can].min() > PADDING:
            exact = np.array([cosines.largest(i, picks[:made]) for i in can])
            can = can[score(can, exact).argmax() :]  # the first one on ties
        pick = int(can[0])
    return torch.from_numpy(picks)


def sum_picks(cosines: Cosines, base: Tensor, first: int, k: int) -> Tensor:
    """Picks by ``base - (sum of cosines to the picks)``, the lowest index on ties.

    A rough sum is known less well with every pick. Sums that had to be computed exactly are kept, and are rough only
    from there on.

    Args:
        cosines: of all tokens.
        base: float32 [N].
        first: the first pick.
        k: 1 <= k <= N.

    Returns:
        LongTensor [k], pick order.
    """
    of: Array = base.double().numpy()
    picks, rows = np.empty(k, dtype=np.int64), np.empty((k, cosines.z.shape[1]))
    low, known = np.zeros_like(of), np.zeros(len(of), dtype=np.int64)
    exact = np.zeros_like(of)  # of the first `known` picks
    width = float(cosines.width) * (1 + 1e-6)  # and what float64 rounds
    pick = first
    for made in range(1, k + 1):
        picks[made - 1], rows[made - 1] = pick, cosines.z[pick]
        if made == k:
            break
        of[pick] = -math.inf
        low += cosines.low[pick]
        upper = of - low
        lower = upper - (made - known) * width
        can = np.flatnonzero(upper >= lower.max())
        if len(can) > 1 and upper[can].min() > PADDING:
            for i in can:
                new = cosines.exact(i, rows[known[i] : made])
                exact[i] = np.add.accumulate(np.append(exact[i], new))[-1]  # one by one, as float64 rounds
            low[can], known[can] = exact[can], made
            can = can[(of[can] - exact[can]).argmax() :]
        pick = int(can[0])
    return torch.from_numpy(picks)
