"""Uniform subsampling: the baseline that knows nothing but the raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.methods.base import Method, Reduction, Stage
from vtc.methods.registry import register_method
from vtc.tokens import VisualTokens, column


@register_method
@dataclass(frozen=True, kw_only=True)
class Grid(Method):
    """Keep every n/k-th token of the raster order, centred: pick i stands at ``floor((i + 1/2) n / k)``.

    The k picks are distinct, ascending and as evenly spaced as integers allow. They are not nested. Along the raster
    order, not on a two-dimensional grid: where the stride divides the row length, whole columns stay.
    """

    name: ClassVar[str] = "grid"

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Ascending, hence in raster order."""
        assert budget is not None
        device = tokens.features.device
        there, counts = column(tokens.counts, device), column(budget, device)
        ranks = (2 * torch.arange(max(budget), device=device) + 1) * there // (2 * counts.clamp(min=1))
        raster = (~tokens.mask).to(torch.int8).argsort(dim=1, stable=True)  # tokens that are there come first
        return Reduction(raster.gather(1, ranks.clamp(max=raster.shape[1] - 1)), ordered=False)
