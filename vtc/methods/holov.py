"""HoloV: don't just chase highlighted tokens, retain the holistic visual context (NeurIPS 2025, arXiv 2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Reduction, Stage
from vtc.methods.grids import runs
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient, highest_of_groups
from vtc.methods.scope import ENTRIES
from vtc.ops import cosines, gathered
from vtc.places import Entry
from vtc.tokens import VisualTokens, column
from vtc.values import one_of, whole

FINE, COARSE = 2.0**-36, 2.0**-20  # of attention, of cosines: sums of multiples, and of squares of multiples, are exact
TINY = 1e-30  # keeps 0 / 0 away


@register_method
@dataclass(frozen=True, kw_only=True)
class HoloV(Salient):
    """Share the budget out over the image by how much each part is looked at, and keep the best tokens of each part.

    1. The tokens are cut into crops: runs of equal length in raster order (stripes, not squares).
    2. A crop's quota of the K tokens to keep is its share of the mean CLS attention per token (in the layer that LLaVA
       takes its features from; without a CLS token, attention received in the last one), cut to an integer; the crops
       with the highest means get one more until nothing is left over.
    3. What exceeds a crop's length goes to the crops with the highest means, as far as they have room.
    4. Each crop keeps its most attended tokens.

    In the paper a token's score is attention plus the variance of its cosines to the rest of its crop, scaled to the
    same mean, and all that is left over in step 2 goes to the crop with the highest mean (``variant="paper"``); the
    released code ranks by attention alone (``variant="code"``). In both the variance cancels out of the quotas, because
    it is scaled crop by crop. The code fills what exceeds a crop with vectors of zeros, and the paper divides it by
    mean times room; here it is step 3, and K tokens stay. All crops of LLaVA-NeXT are one sequence, as there. The code
    drops newlines; here nobody looks at them, so that they leave. It orders tokens by crop and attention and renumbers
    positions (``positions="compact"``); here they stay in raster order. Refetching of dropped tokens was not released.

    Headline: LLaVA-1.5-7B keeps 95.8 % of its accuracy with 64 tokens (in a re-run by others 92.2 %). To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,pope,mmbench_en_dev,mme,scienceqa_img
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=holov,keep=64

    Attributes:
        crops: how many; ``None``: as published, 1024 / K for 576 tokens, more for more.
        variant: ``code`` or ``paper``.
    """

    crops: int | None = option(None, whole, "it counts the crops of an image", least=1)
    variant: Literal["code", "paper"] = option("code", one_of, "code", "paper")

    name: ClassVar[str] = "holov"
    paper: ClassVar[Paper] = Paper(
        'Don\'t just chase "highlighted tokens" in MLLMs: revisiting visual holistic context retention',
        "NeurIPS",
        2025,
        "2510.02912",
    )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=(self.salience(),)),)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 4. They are not nested, and have no order."""
        assert budget is not None
        mask, pairs = tokens.mask, zip(tokens.counts, budget, strict=True)
        crops = [max(1, min(n, self.crops or 1024 * n // (576 * max(1, k)))) for n, k in pairs]
        crop, lengths = runs(mask, tokens.counts, crops)
        score = _fine(self.scores(tokens).double()).masked_fill(~mask, 0.0)
        means = _means(score, crop, lengths)
        if self.variant == "paper":
            spread = variance(tokens.features, crop)
            scale = means / (_means(spread, crop, lengths) + TINY)
            score = score + spread * torch.nn.functional.pad(scale, (0, 1)).gather(1, crop)
        quotas = self._quotas(means, lengths, column(budget, mask.device))
        return Reduction.of_mask(highest_of_groups(score.masked_fill(~mask, -torch.inf), crop, quotas), budget)

    def _quotas(self, means: Tensor, lengths: Tensor, k: Tensor) -> Tensor:
        """Steps 2 and 3: LongTensor [G, P], k [G, 1] of each image."""
        order = means.masked_fill(lengths == 0, -1.0).sort(dim=1, descending=True, stable=True).indices
        quotas = (means / (means.sum(1, keepdim=True) + TINY) * k).floor().long()
        if self.variant == "code":
            quotas += order.argsort(1) < k - quotas.sum(1, keepdim=True)
        quotas = torch.minimum(quotas, lengths)
        room = (lengths - quotas).gather(1, order)
        rest = (k - quotas.sum(1, keepdim=True) - (room.cumsum(1) - room)).clamp(min=0)
        return quotas.scatter_add(1, order, torch.minimum(rest, room))


def _fine(values: Tensor) -> Tensor:
    return (values / FINE).round().mul(FINE)


def _means(values: Tensor, crop: Tensor, lengths: Tensor) -> Tensor:
    return _fine(gathered(values[..., None], crop, lengths.shape[1])[0][..., 0] / lengths.clamp(min=1))


def variance(features: Tensor, crop: Tensor) -> Tensor:
    """Of a token's cosines to the others of its crop: float64 [G, N], multiples of FINE, 0 where it is alone."""
    found, some = [], max(1, ENTRIES // crop.shape[1] ** 2)  # images at a time
    for x, own in zip(features.detach().split(some), crop.split(some), strict=True):
        same = (own[:, :, None] == own[:, None]) & ~torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
        like = (cosines(x) / COARSE).round_().mul_(COARSE * same)
        others = same.sum(-1).clamp(min=1)
        found.append(((like * like).sum(-1) - like.sum(-1) ** 2 / others) / others)
    return _fine(torch.cat(found)).clamp(min=0.0)
