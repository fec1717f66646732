"""Which tokens of an image are side by side: neighbours and windows of its grids, runs of the raster order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.tokens import Layout, column

CPU = torch.device("cpu")  # whatever device is the default: what is here is kept


def neighbours(layouts: Sequence[Layout], n: int, wraps: bool) -> Tensor:
    """The tokens above, below, left and right of each: LongTensor [G, n, 4] on the host, -1 for none.

    Args:
        layouts: of G images.
        n: what they are padded to.
        wraps: take those one row and one token back and ahead in raster order: at the left and right edge they stand
            in other rows; beyond the upper and lower edge it is the first and the last token.
    """
    found = [_neighbours(layout, wraps) for layout in layouts]
    return torch.stack([F.pad(own, (0, 0, 0, n - len(own)), value=-1) for own in found])


@functools.lru_cache(maxsize=256)
def _neighbours(layout: Layout, wraps: bool) -> Tensor:
    found = torch.full((layout.length, 4), -1, device=CPU)
    for region in layout.regions():
        rows, columns = region.grid
        own = torch.tensor(region.tokens, device=CPU)
        if wraps:
            steps = torch.tensor([-columns, columns, -1, 1], device=CPU)
            found[own] = own[(torch.arange(len(own), device=CPU)[:, None] + steps).clamp(0, len(own) - 1)]
        else:
            framed = F.pad(own.view(rows, columns), (1, 1, 1, 1), value=-1)
            sides = framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]
            found[own] = torch.stack(sides, -1).flatten(0, 1)
    return found


def windows(layouts: Sequence[Layout], n: int, side: int) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """The window of each token, LongTensor [G, n] on the host, and of each image how many tokens each window has.

    A side of m tokens is cut into ceil(m / side) nearly equal parts; an unknown grid is one row, cut into runs of at
    most side * side.

    Args:
        layouts: of G images.
        n: what they are padded to.
        side: of a window, at most. A token in none has the largest number of windows.
    """
    found, sizes = zip(*(_windows(layout, side) for layout in layouts), strict=True)
    number = torch.stack([F.pad(own, (0, n - len(own)), value=-1) for own in found])
    return number.masked_fill(number < 0, max(map(len, sizes))), sizes


@functools.lru_cache(maxsize=256)
def _windows(layout: Layout, side: int) -> tuple[Tensor, tuple[int, ...]]:
    found = torch.full((layout.length,), -1, device=CPU)
    sizes: list[int] = []
    for region in layout.regions():
        rows, columns = region.grid
        high, wide = -(-rows // side), -(-columns // (side if rows > 1 else side**2))
        down, across = (
            torch.arange(rows, device=CPU) * high // rows,
            torch.arange(columns, device=CPU) * wide // columns,
        )
        own = (down[:, None] * wide + across).flatten()
        found[torch.tensor(region.tokens, device=CPU)] = own + len(sizes)
        sizes += own.bincount(minlength=high * wide).tolist()
    return found, tuple(sizes)


def runs(mask: Tensor, counts: tuple[int, ...], number: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut the tokens of each image into runs of equal length, of which the first ones may be longer by one.

    Args:
        mask: bool [G, N], tokens that are there.
        counts: how many those are.
        number: how many runs, at least 1.

    Returns:
        The run of each token, LongTensor [G, N], P for none; and how long each run is, LongTensor [G, P].
    """
    given, parts = column(counts, mask.device), column(number, mask.device)
    index = torch.arange(max(number), device=mask.device)
    lengths = (given // parts + (index < given % parts).long()).masked_fill(index >= parts, 0)
    rank = (mask.cumsum(1) - 1).clamp(min=0)
    return torch.searchsorted(lengths.cumsum(1), rank, right=True).masked_fill(~mask, len(index)), lengths
