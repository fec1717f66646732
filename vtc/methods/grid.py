"""Uniform subsampling: the baseline that knows nothing but the raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, register_method
from vtc.tokens import VisualTokens, column


@register_method
@dataclass(frozen=True, kw_only=True)
class Grid(Method):
    """Keep every n/k-th token of the raster order, centred: pick i stands at ``floor((i + 1/2) n / k)``.

    The k picks are distinct, ascending and as evenly spaced as integers allow. They are not nested. Along the raster
    order, not on a two-dimensional grid: where the stride divides the row length, whole columns stay.
    """

    name: ClassVar[str] = "grid"

    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """Ascending, hence in raster order."""
        device = tokens.features.device
        lengths, counts = column(tokens.lengths, device), column(budget, device)
        return (2 * torch.arange(max(budget), device=device) + 1) * lengths // (2 * counts)  # read up to budget[g]
