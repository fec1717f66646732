"""DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc import ops
from vtc.methods.base import ModelFacts, Paper, Reduction, Stage
from vtc.methods.centering import Centred
from vtc.methods.registry import register_method
from vtc.places import Entry
from vtc.tokens import VisualTokens


@register_method
@dataclass(frozen=True, kw_only=True)
class DivPrune(Centred):
    """Keep the tokens that are farthest apart (section 3.3, max-min diversity).

    1. Cosine distances between all tokens of an image, as they enter the language model.
    2. First pick: the token whose nearest neighbour is farthest.
    3. Every next pick: the token farthest from its nearest pick.
    4. The picks stay in their old order; the question is never looked at.

    The paper calls this exact; code and vtc do the greedy farthest-first traversal, a 2-approximation. The released
    code computes distances in the model's half precision, where a few hundred distinct values leave the choice to
    ties, divides by zero on a zero row, picks a token twice once the distinct ones are used up, and prunes the first
    image of the first prompt only. vtc computes exactly (``vtc.ops.recursion``), never picks twice, and prunes every
    image by itself. The code re-numbers positions: ``positions="compact"``. Newlines compete like any token, as there
    (being duplicates, about one survives); ``newlines="keep"`` spares them, which kept the answers about places of
    our LLaVA-NeXT-shaped model (benchmarks/README.md).

    ``centered=True`` is Cen-Prune: the distances of step 1 are those of centred rows, and from step 3 on a token's
    distance is multiplied with its distinctiveness (:class:`vtc.methods.centering.Centred`). Published at 20, 10 and
    5 % on Qwen2.5-VL-7B: 92.1 -> 94.5, 85.1 -> 88.9, 75.6 -> 80.5 % of the accuracy. It treats each crop of LLaVA-NeXT
    by itself: ``vtc.Allocate(selector=vtc.DivPrune(centered=True))``.

    Defaults: the same for every family, no signal is needed. Published: ``keep=0.098`` for images (56 of LLaVA-1.5's
    576 tokens), 0.1 for video.

    Headline: LLaVA-1.5-7B at 15.6 % of the FLOPs has GQA 56.85 (unpruned 61.96), POPE 86.02 (85.84), MMBench 59.19
    (64.09), ScienceQA 68.27 (69.41). To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,pope,mmbench_en_dev,mme,scienceqa_img
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=divprune,keep=0.098
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[Paper] = Paper(
        "DivPrune: diversity-based visual token pruning for large multimodal models", "CVPR", 2025, "2503.02175"
    )
    nested: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=self.geometry_needs),)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3; nested in the budget."""
        assert budget is not None
        rows, weights = self.geometry(tokens)
        return Reduction(ops.farthest_first(rows, max(budget), mask=tokens.mask, weights=weights))
