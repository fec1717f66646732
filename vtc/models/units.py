"""From the patches of a tower to tokens that are made of several, or that stand in one row with those of others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def pooled(values: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
    """The mean over squares of ``unit`` x ``unit`` patches.

    Args:
        values: [pictures, patches] or [pictures, patches, c], in raster order.
        grid: rows and columns of patches; what is left over at the edges is not pooled.
        unit: side of a square.
    """
    channels = values.flatten(2) if values.dim() > 2 else values[..., None]
    found = nn.functional.avg_pool2d(channels.mT.unflatten(-1, grid), unit).flatten(2).mT
    return found.reshape(*found.shape[:2], *values.shape[2:])


def split(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The patches [n] or [n, c] of each picture, out of the one row [1, patches of all] of a packed tower."""
    if len(values) != 1 or values.shape[1] != sum(lengths):
        raise ValueError(f"pictures of {list(lengths)} patches are not the row {list(values.shape[:2])} that was seen")
    return list(values[0].split(list(lengths)))
