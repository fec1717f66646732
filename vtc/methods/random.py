"""Random tokens: the baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Scorer, Stage, image_seed
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.tokens import VisualTokens
from vtc.values import whole


@register_method
@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """Keep a uniform random subset of each image's tokens.

    The order drawn depends on the seed, the image's ordinal in its sample and its number of tokens, and on nothing
    else: not on the global random state, the device, the rest of the batch or ``keep``. So a smaller ``keep`` keeps a
    subset of what a larger one does.

    Attributes:
        seed: any int.
    """

    seed: int = option(0, whole, "it may be any int")

    name: ClassVar[str] = "random"

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """Places in a random permutation, the first the highest."""
        scores = torch.zeros(tokens.features.shape[:2])
        for row, n, ordinal in zip(scores, tokens.lengths, tokens.ordinals, strict=True):
            generator = torch.Generator().manual_seed(image_seed(self.seed, ordinal, n))
            row[torch.randperm(n, generator=generator)] = -torch.arange(n, dtype=torch.float32)
        return scores.to(tokens.features.device, non_blocking=True)
