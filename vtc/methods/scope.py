"""SCOPE: saliency-coverage oriented token pruning for efficient multimodal LLMs (NeurIPS 2025, arXiv 2510.24214)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Reduction, Stage
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient
from vtc.ops import cosines, first_max
from vtc.ops.cover import cover_lazily
from vtc.places import Entry
from vtc.tokens import VisualTokens
from vtc.values import number, one_of

STEP = 2.0**-23  # of cosines, as fine as float32 below one: sums of them are exact, and a token to itself is 1
MANY = 2**18  # picks times tokens from which laziness pays
ENTRIES = 2**26  # of all matrices of cosines that are made at a time; an image alone may have more


@register_method
@dataclass(frozen=True, kw_only=True)
class SCOPE(Salient):
    """Keep salient tokens that cover the image: greedy facility location, weighed with what the tower looks at.

    1. Saliency p of a token: what the vision tower's CLS token pays it, in the layer that LLaVA takes its features
       from, to the power of ``alpha``. A tower without one: what its patches pay it, in the last layer (not in the
       paper).
    2. Cover of a token: the largest cosine to a pick, at least 0.
    3. Every pick: the token with the highest ``gain * p`` (``combined="multi"``) or ``gain + p`` (``"add"``), where
       its gain is how much it would add to the cover of all tokens together. The lowest index on ties.

    The released code compares hidden states before the projector (layer -2); here it is the embeddings that enter
    the language model. It sums CLS attention over heads where this is the mean: that changes nothing with "multi";
    with "add" p weighs less. It gives every crop of LLaVA-NeXT the same number of tokens and drops newlines; here an
    image has one budget, and its tokens one cover (``vtc.Allocate`` divides both). It renumbers positions:
    ``positions="compact"``. Tokens stay in raster order there and here.

    Cosines are rounded to 2**-23 so that their sums are exact: picks do not depend on the batch, and equal gains are
    equal. A pick takes time as N^2; on a CPU much less, because gains only fall, so that only tokens which were worth
    most are looked at again. Memory is two N x N matrices of float64 for each image; images are worked off in parts of
    up to 1 GiB.

    Attributes:
        alpha: exponent of the saliency, at least 0; 0: coverage alone (with "multi").
        combined: "multi" or "add".
    """

    alpha: float = option(1.0, number, "an exponent, finite and at least 0", least=0.0, below=math.inf)
    combined: Literal["multi", "add"] = option("multi", one_of, "multi", "add")

    name: ClassVar[str] = "scope"
    paper: ClassVar[Paper] = Paper(
        "SCOPE: saliency-coverage oriented token pruning for efficient multimodal LLMs", "NeurIPS", 2025, "2510.24214"
    )
    nested: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=(self.salience(),)),)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3; nested in the budget."""
        assert budget is not None
        saliency = self.scores(tokens).double() ** self.alpha
        n = tokens.mask.shape[1]
        size = max(1, ENTRIES // max(1, n * n))
        parts = zip(tokens.features.detach().split(size), saliency.split(size), tokens.mask.split(size), strict=True)
        return Reduction(torch.cat([self._picks(*part, max(budget)) for part in parts]))

    def _picks(self, features: Tensor, saliency: Tensor, mask: Tensor, k: int) -> Tensor:
        """The first k picks of every image: LongTensor [G, k], in pick order."""
        cosines = rounded_cosines(features, mask)
        if features.device.type == "cpu" and k * mask.shape[1] > MANY:
            each = zip(cosines, saliency, mask, strict=True)
            return torch.stack([cover_lazily(*image, k, self._worth) for image in each])
        cover = torch.zeros_like(saliency)
        free, rest = mask.clone(), torch.empty_like(cosines)
        images = torch.arange(len(mask), device=mask.device)
        picks = []
        for _ in range(k):
            covered = torch.maximum(cosines, cover[:, None], out=rest).sum(-1)  # by the picks and one more
            gain = covered - cover.sum(-1, keepdim=True)
            pick = first_max(self._worth(gain, saliency).masked_fill(~free, -torch.inf))
            free.scatter_(1, pick[:, None], False)
            cover = torch.maximum(cover, cosines[images, pick])
            picks.append(pick)
        return torch.stack(picks, 1)

    def _worth(self, gain: Tensor, saliency: Tensor) -> Tensor:
        """Step 3; it falls as picks are made, because the gain does."""
        return gain * saliency if self.combined == "multi" else gain + saliency


def rounded_cosines(features: Tensor, mask: Tensor) -> Tensor:
    """Float64 [G, N, N]: cosines in multiples of STEP. Zero for padding, and for a row without a direction."""
    return cosines(features.masked_fill(~mask[..., None], 0.0)).div_(STEP).round_().mul_(STEP)
