"""Uniform subsampling: the baseline that knows nothing but the raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, register_method
from vtc.tokens import VisualTokens


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
        picks = torch.zeros(len(budget), max(budget), dtype=torch.long)
        for g, (k, n) in enumerate(zip(budget, tokens.lengths, strict=True)):
            picks[g, :k] = (2 * torch.arange(k) + 1) * n // (2 * k)
        return picks.to(tokens.features.device, non_blocking=True)
