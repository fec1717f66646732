"""VisionZip: longer is better but not necessary in vision language models (CVPR 2025, arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vtc.methods.base import Method, ModelFacts, Newlines, Paper, Reduction, Stage, first_of, highest
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient
from vtc.ops import cosines, gathered, nearest
from vtc.places import Entry, Projector
from vtc.signals import ProjectorInput, TowerKeys
from vtc.tokens import VisualTokens, column
from vtc.values import one_of, whole


@register_method
@dataclass(frozen=True, kw_only=True)
class VisionZip(Salient):
    """Keep the tokens that CLS looks at, and melt the others into a few that are spread over the image.

    1. Dominant: the highest CLS attention in the layer that LLaVA takes its features from. A tower without a CLS
       token: the highest attention received, in the last layer.
    2. Contextual: of the others, in raster order, every M // C-th is a target. Each of the rest goes to the target with
       the most similar key (cosine of that layer's keys, averaged over heads); a target becomes itself plus the mean of
       its members. All this before the projector, or behind it (as the port in AngelSlim does) where tokens and what
       enters the projector cannot be matched: Qwen-VL, InternVL, Pixtral.

    Published for LLaVA-1.5: 64 tokens are 54 dominant and 10 contextual; here that share goes with any ``keep``. The
    released code also emits the CLS token's feature, which has no place in the image: here one patch more is dominant.
    It appends contextual tokens at the end and renumbers positions; here they stand at their targets' places.

    Attributes:
        contextual: how many of the budget are contextual; ``None``: 10 of 64.
        place: ``projector`` (before it) or ``entry`` (behind it); ``None``: before it, where the model allows.
    """

    newlines: Newlines = option("keep", one_of, "keep", rule="a newline has no features to merge")
    contextual: int | None = option(None, whole, "it counts the merged tokens of an image", least=0)
    place: Literal["projector", "entry"] | None = option(None, one_of, None, "projector", "entry")

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[Paper] = Paper(
        "VisionZip: longer is better but not necessary in vision language models", "CVPR", 2025, "2412.04467"
    )
    merges: ClassVar[bool] = True

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses saliency and place, if they were left open."""
        served: Literal["projector", "entry"] = "projector" if ProjectorInput.kind in facts.signals else "entry"
        return super().settle(facts) if self.place else replace(self, place=served).settle(facts)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """With attention and keys of one layer."""
        salience = self.salience()
        at = Entry() if self.place == "entry" else Projector()
        return (Stage(at, needs=(salience, TowerKeys(layer=salience.layer))),)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Both steps; similarities and means in float64, so that a batch does not change them."""
        assert budget is not None
        merged = tuple(min(k - 1, round(k * 10 / 64) if self.contextual is None else self.contextual) for k in budget)
        scores = self.scores(tokens).masked_fill(~tokens.mask, -torch.inf)
        dominant = tuple(k - c for k, c in zip(budget, merged, strict=True))
        keeps = first_of(highest(scores, max(dominant)), dominant, scores.shape[1])
        if not any(merged):
            return Reduction.of_mask(keeps, budget)
        others = tokens.mask & ~keeps
        left = tuple(n - k for n, k in zip(tokens.counts, dominant, strict=True))
        step = column([max(1, m // max(1, c)) for m, c in zip(left, merged, strict=True)], scores.device)
        rank = others.cumsum(1) - 1
        target = others & (rank % step == 0) & (rank < step * column(merged, scores.device))
        found = Reduction.of_mask(keeps | target, budget)
        at = Reduction.of_mask(target, merged).index  # [G, C]
        keys, x = tokens.signals["keys"], tokens.features.double()
        there = torch.arange(at.shape[1], device=at.device) < column(merged, at.device)
        like = cosines(keys, keys.gather(1, at[..., None].expand(-1, -1, keys.shape[-1])))
        total, joined = gathered(x, nearest(like, others & ~target, there), at.shape[1])
        mean = total / joined.clamp(min=1)[..., None]
        values = x.scatter_add(1, at[..., None].expand_as(mean), mean)
        sizes = torch.ones_like(scores).scatter_add(1, at, joined.float())
        rows = found.index[..., None].expand(-1, -1, x.shape[-1])
        return replace(found, features=values.gather(1, rows).to(tokens.features), size=sizes.gather(1, found.index))
