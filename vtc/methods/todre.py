"""ToDRE: token diversity and task relevance (arXiv 2505.18757; v1 May 2025, v2 later). Stage 1, before the LLM."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, image_seed, register_method
from vtc.tokens import VisualTokens


@register_method
@dataclass(frozen=True, kw_only=True)
class ToDRE(Method):
    """Keep a diverse set grown from the token the vision tower looks at most (stage 1).

    1. Pivot: the token with the most CLS attention in the tower's last layer, among the thumbnail's where the image
       has one (any-resolution models), else among all.
    2. Every next pick: the token with the least summed cosine to the picks (``max_sum``, algorithm 1 of v2), or the
       one farthest from its nearest pick (``k_center``, as v1 is titled).
    3. The picks stay in their old order.

    There is no released code. Open in the paper and decided here: rounding (that of DivPrune), order (raster),
    newlines (candidates, though never the pivot), positions (the original ones). v1's k-center is our reading of its
    abstract. Max-sum does not avoid duplicates by itself: only a picked token is barred, not its copies. The paper's
    ablation finds little between pivots and takes a random one for towers without CLS; of its "centre" and
    "farthest" pivots it gives no definition, so they are not offered. Stage 2 (task relevance) is not part of this.

    Attributes:
        variant: ``max_sum`` or ``k_center``.
        pivot: ``cls`` (needs the signal of that name) or ``random``.
        seed: of the random pivot; the draw depends on it, the image's ordinal and its length alone.
    """

    variant: Literal["max_sum", "k_center"] = "max_sum"
    pivot: Literal["cls", "random"] = "cls"
    seed: int = 0

    name: ClassVar[str] = "todre"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("max_sum", "k_center"):
            raise ValueError(f"variant={self.variant!r} is neither 'max_sum' nor 'k_center'")
        if self.pivot not in ("cls", "random"):
            raise ValueError(f"pivot={self.pivot!r} is neither 'cls' nor 'random'")

    @property
    def needs(self) -> frozenset[str]:
        """``cls`` with the pivot of that name, else nothing."""
        return frozenset({"cls"}) if self.pivot == "cls" else frozenset()

    @property
    def remedy(self) -> str:
        """The pivot that needs no signal."""
        return 'vtc.ToDRE(pivot="random"), as the paper does for towers without a CLS token'

    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """Steps 1 and 2; nested in the budget."""
        start = self._cls_pivot(tokens) if self.pivot == "cls" else self._random_pivot(tokens)
        pick = ops.max_sum if self.variant == "max_sum" else ops.farthest_first
        return pick(tokens.features, max(budget), start, mask=tokens.mask)

    def _cls_pivot(self, tokens: VisualTokens) -> Tensor:
        allowed = tokens.where("image", "thumbnail", "crops", "frame")
        if any(layout.of_kind("thumbnail") for layout in tokens.layouts):
            has = torch.tensor([[bool(layout.of_kind("thumbnail"))] for layout in tokens.layouts])
            allowed &= tokens.where("thumbnail") | ~has.to(allowed.device, non_blocking=True)
        return ops.first_max(tokens.signals["cls"].nan_to_num().masked_fill(~allowed, -torch.inf))

    def _random_pivot(self, tokens: VisualTokens) -> Tensor:
        starts = []
        for layout, ordinal in zip(tokens.layouts, tokens.ordinals, strict=True):
            newlines = set(layout.newlines())
            candidates = [i for i in range(layout.length) if i not in newlines] or [0]
            starts.append(random.Random(image_seed(self.seed, ordinal, layout.length)).choice(candidates))
        return torch.tensor(starts).to(tokens.features.device, non_blocking=True)
