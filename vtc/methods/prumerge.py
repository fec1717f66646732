"""LLaVA-PruMerge: adaptive token reduction for efficient large multimodal models (ICCV 2025, arXiv 2403.15388)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, ModelFacts, Newlines, Paper, Reduction, Stage, first_of, highest
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.ops import cosines, first_max
from vtc.places import Projector
from vtc.signals import ClsWide, KeysWide
from vtc.tokens import Layout, VisualTokens, column
from vtc.values import flag, one_of

NEIGHBOURS = 32


@register_method
@dataclass(frozen=True, kw_only=True)
class PruMerge(Method):
    """Keep the outliers of the CLS row, and add to each what is like it, weighed with that row.

    1. The CLS row a of the tower's last layer, computed as one head of the layer's whole width.
    2. Kept: the highest of it. ``adaptive``: the image's outliers, above Q3 + 1.5 (Q3 - Q1). ``plus``: also a grid.
    3. A kept token becomes itself plus the sum of ``a * token`` over its 32 nearest (of all but itself, by the cosine
       of that layer's keys). The sum is not divided by anything. All this before the projector.

    The paper speaks of clusters and averages; the code does the above, as here. The code's extra token (the sum of
    ``a * token`` over the dropped) has no place in the image and is left out. The code takes outliers over the whole
    batch, emits tokens by falling attention and renumbers them; here every image is by itself, in raster order.

    ``adaptive`` reads from the device how many tokens stay (one wait), and looks at no ``keep`` but 1.0, with which a
    patched model keeps all. Its grid is every s-th token, s a third of N / outliers: about four times as many. Counts
    are exact else; with ``plus`` a quarter are the highest, the others spread over the rest (ours: the code takes
    tokens twice). Merged tokens have no sizes: their neighbours overlap.

    Published for LLaVA-1.5-7B, untrained, adaptive (about 32 tokens): ScienceQA 68.5, TextVQA 53.5, POPE 70.7. Again:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks scienceqa_img,textvqa_val,pope
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=prumerge,adaptive=True

    Attributes:
        adaptive: outliers decide how many stay.
        plus: a grid beside the highest.
    """

    newlines: Newlines = option("keep", one_of, "keep", rule="a newline has no features to merge")
    adaptive: bool = option(False, flag)
    plus: bool = option(False, flag)

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[Paper | None] = Paper(
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", "ICCV", 2025, "2403.15388"
    )
    merges: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Both signals are of the last layer."""
        return (Stage(Projector(), needs=(ClsWide(), KeysWide())),)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Known, unless outliers decide."""
        return None if self.adaptive else super().counts(layouts, stage, given)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 2 and 3; similarities and sums in float64, so that a batch does not change them."""
        a = tokens.signals["cls"].detach().double().nan_to_num()
        scores = a.masked_fill(~tokens.mask, -torch.inf)
        if self.adaptive:
            keeps = self._outliers(scores, tokens)
            counts = tuple(keeps.sum(1).tolist())  # the one wait for the device
        else:
            assert budget is not None
            keeps, counts = self._highest(scores, tokens, budget), budget
        found = Reduction.of_mask(keeps, counts)
        keys, index = tokens.signals["keys"].detach(), found.index[..., None]
        like = cosines(keys.gather(1, index.expand(-1, -1, keys.shape[-1])), keys)  # [G, K, N]
        like = like.masked_fill(~tokens.mask[:, None], -torch.inf).scatter(2, index, -torch.inf)
        around = like.sort(dim=-1, descending=True, stable=True).indices[..., :NEIGHBOURS]
        weight = a[:, None].expand_as(like).gather(2, around) * (like.gather(2, around) > -torch.inf)
        weight = torch.zeros_like(like).scatter(2, around, weight).scatter(2, index, 1.0)  # itself counts in full
        x = tokens.features.detach().double().masked_fill(~tokens.mask[..., None], 0.0)
        return replace(found, features=(weight @ x).to(tokens.features.dtype))

    def _outliers(self, scores: Tensor, tokens: VisualTokens) -> Tensor:
        """Bool [G, N], as ``adaptive`` says."""
        quarters, n = scores.new_tensor([0.25, 0.75]), column(tokens.counts, scores.device)
        low, high = scores.masked_fill(~tokens.mask, torch.nan).nanquantile(quarters, dim=1, keepdim=True)
        keeps = scores > high + 1.5 * (high - low)
        best = torch.zeros_like(keeps).scatter(1, first_max(scores)[:, None], True)
        keeps = torch.where(keeps.any(1, keepdim=True), keeps, best)
        if not self.plus:
            return keeps
        step = (1 / (keeps.sum(1, keepdim=True).double() / n)).long().div(3, rounding_mode="floor").clamp(min=1)
        place = tokens.mask.cumsum(1) - 1
        return keeps | (tokens.mask & (place % step == 0) & (place < n - 1))

    def _highest(self, scores: Tensor, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """Bool [G, N], ``budget`` of each image."""
        important = tuple(max(1, k // 4) for k in budget) if self.plus else budget
        keeps = first_of(highest(scores, max(important)), important, scores.shape[1])
        others = tokens.mask & ~keeps
        left = column([max(1, n - k) for n, k in zip(tokens.counts, important, strict=True)], scores.device)
        more = column([k - i for k, i in zip(budget, important, strict=True)], scores.device)
        place = others.cumsum(1) * more  # who takes it past a multiple of what is left is one of them
        return keeps | (others & (place // left > (place - more) // left))
