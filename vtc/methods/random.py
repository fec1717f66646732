"""Random tokens: the baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, image_seed, register_method
from vtc.tokens import VisualTokens
from vtc.values import whole


@register_method
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep a uniform random subset of each image's tokens.

    The order drawn depends on the seed, the image's ordinal in its sample and its number of tokens, and on nothing
    else: not on the global random state, the device, the rest of the batch or ``keep``. So a smaller ``keep`` keeps a
    subset of what a larger one does.

    Attributes:
        seed: any int.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", whole("seed", self.seed, "it may be any int"))

    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """The first of a random permutation; nested in the budget."""
        picks = torch.zeros(len(budget), max(budget), dtype=torch.long)
        for g, (k, n, ordinal) in enumerate(zip(budget, tokens.lengths, tokens.ordinals, strict=True)):
            generator = torch.Generator().manual_seed(image_seed(self.seed, ordinal, n))
            picks[g, :k] = torch.randperm(n, generator=generator)[:k]
        return picks.to(tokens.features.device, non_blocking=True)
