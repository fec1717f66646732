"""SparseVLM: visual token sparsification for efficient VLM inference (ICML 2025, arXiv 2410.04417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage, highest
from vtc.methods.options import option
from vtc.methods.recycling import recycle, recycled
from vtc.methods.registry import register_method
from vtc.methods.schedule import Scheduled
from vtc.places import Layer
from vtc.signals import Rating, TextRows
from vtc.tokens import VisualTokens
from vtc.values import flag, one_of

TOKENS = 576
SCHEDULES: dict[str, dict[int, tuple[int, ...]]] = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
EXACT = 2.0**44  # attention in multiples of its inverse: sums over raters are exact


@register_method
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Scheduled, Method):
    """Drop inside the language model what the words that speak of the image do not look at, and melt some of it down.

    1. Raters: text tokens to which the visual tokens, as embeddings, give more than the mean of a softmax of dot
       products (equation 3); all of them where none gets more.
    2. After layers 3, 7 and 16 of 32, the score of a token: attention that raters pay it in the layer just done,
       averaged over heads and raters. The highest stay.
    3. Recycling (v1): of the p others the 0.3 p + 1 highest are clustered (DPC-kNN of their hidden states) into a tenth
       as many, plus one. The mean of a cluster stands at the place of its centre.

    The paper sets how many stay by the rank of the attention; the released code has tables for 576 tokens instead, as
    here, named by the mean over layers that they aim at. ``schedule`` picks one, its shares hold for any image and
    ``keep`` is what is left after the last stage, merged tokens included (192 of v1: 300 + 9, 204, 113 of 576).
    Another ``keep`` bends it, as in TransPrune: ``1 - (1 - ratio_s) * (1 - keep) / (1 - ratio_last)``. In a model
    of L layers the stages come after round(3L/32) and so on; with fewer than 4, give ``layers`` and ``ratios``.

    Raters are among the text behind the last image, as text before it cannot see it; a prompt that ends in its image
    is rated by its last token. The code breaks ties among clusters with random noise, and puts merged tokens behind
    the others, with new positions in v1 (``positions="compact"``); here the lowest index wins, and places keep
    their positions. v2 averages over the 14 heads that look at the image most; here over all.

    Headline: LLaVA-1.5-7B with v1's 192 / 128 / 64 tokens keeps 99.1 / 96.7 / 89.3 % of its accuracy. To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme,mmbench_en_dev
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=sparsevlm,method.schedule=192

    Attributes:
        keep: share of the tokens after the last stage, or their number; ``None``: that of the schedule.
        layers: how many layers run before each stage; ``None``: the published ones, scaled to the model's depth.
        ratios: shares of the tokens given that the stages keep; ``None``: those of the schedule.
        schedule: 192, 128, 96 or 64.
        version: ``v1`` or ``v2``.
        recycle: step 3; ``None``: as the version does, ``v1`` with it.
    """

    schedule: int = option(192, one_of, *SCHEDULES["v1"])
    version: Literal["v1", "v2"] = option("v1", one_of, "v1", "v2")
    recycle: bool | None = option(None, flag)

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[Paper] = Paper(
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        "ICML",
        2025,
        "2410.04417",
    )
    query_aware: ClassVar[bool] = True
    published: ClassVar[tuple[int, ...]] = (3, 7, 16)

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """With recycling."""
        return self.version == "v1" if self.recycle is None else self.recycle

    @property
    def shares(self) -> tuple[float, ...]:
        """The ratios, or what the published tables come to, recycled tokens included."""
        if self.ratios is not None:
            return self.ratios
        left, n = [], TOKENS
        for kept in SCHEDULES[self.version][self.schedule]:
            n = kept + (recycled(n - kept)[1] if self.merges else 0)
            left.append(n / TOKENS)
        return tuple(left)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Each with rows of the layer just done; raters are those of the embeddings."""
        return tuple(
            Stage(Layer(after), needs=(TextRows(after - 1, name="raters"), Rating(0)))
            for after in self.places(model.depth)
        )

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 2 and 3."""
        assert budget is not None
        rows = tokens.signals["raters"].double().nan_to_num().masked_fill(~tokens.signals["rating"][..., None], 0.0)
        scores = (rows * EXACT).round().sum(1).masked_fill(~tokens.mask, -torch.inf)  # their mean ranks alike
        if not self.merges:
            return Reduction(highest(scores, max(budget)))
        return recycle(tokens, highest(scores, scores.shape[1]), budget)
