"""PyramidDrop: accelerating LVLMs via pyramid visual redundancy reduction (CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.registry import register_method
from vtc.methods.schedule import Scheduled
from vtc.places import Layer
from vtc.signals import Rows
from vtc.tokens import VisualTokens

RATIOS = (0.5, 0.25, 0.125)


@register_method
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Scheduled, Scorer):
    """Halve the visual tokens three times inside the language model: those that the prompt's last token needs least.

    1. Everything enters. After layers 8, 16 and 24 of 32, 50, 25 and 12.5 % of the visual tokens go on.
    2. Score: attention that the last token of the prompt pays to the token in the next layer, averaged over heads. It
       is computed from that layer's norm, queries and keys before the layer runs; the softmax runs over all tokens.
    3. The highest stay, in their old order.

    In a model of L layers the stages come after layers round(L/4), round(L/2) and round(3L/4) (28 layers: 7, 14, 21);
    with fewer than 4 layers, give ``layers`` and ``ratios``. ``keep`` is what is left after the last stage (default
    12.5 %, as published), not the average over layers, which is 46.9 % with the published schedule and 32 layers.
    Another value bends the schedule in proportion: stage s keeps ``1 - (1 - ratio_s) * (1 - keep) / (1 - 0.125)``.
    Counts are cut to integers, at least 1, as in the code.

    Paper and code agree. The code renumbers positions after each stage (``positions="compact"``), which here keep
    their places, and knows multi-head attention only. The paper also trains with it; here it is for inference. A prompt
    that ends in its image is judged by its last token all the same.

    Headline: LLaVA-1.5-7B at 46.6 % of the FLOPs (1.78 of 3.82 TFLOPs) is near lossless. To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme,mmbench_en_dev
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=pyramiddrop,keep=0.125

    Attributes:
        keep: share of the tokens after the last stage, or their number; ``None``: the last ratio.
        layers: how many layers run before each stage; ``None``: the published ones, scaled to the model's depth.
        ratios: the share of the tokens given that each stage keeps when ``keep`` is the last of them.
    """

    ratios: tuple[float, ...] | None = RATIOS

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[Paper] = Paper(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        "CVPR",
        2025,
        "2410.17247",
    )
    query_aware: ClassVar[bool] = True
    published: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Each with one attention row of the next layer."""
        return tuple(Stage(Layer(after), needs=(Rows(after, of="last"),)) for after in self.places(model.depth))

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """Step 2."""
        return tokens.signals["last"].nan_to_num()
