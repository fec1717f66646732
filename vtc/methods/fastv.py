"""FastV: an image is worth 1/2 tokens after layer 2 (ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.places import Layer
from vtc.signals import Rows
from vtc.tokens import VisualTokens
from vtc.values import whole


@register_method
@dataclass(frozen=True, kw_only=True)
class FastV(Scorer):
    """Drop, early in the language model (after ``layer`` layers), what the prompt's last token hardly looked at.

    1. Score: attention that the last token of the prompt paid the token in the layer before, averaged over heads. The
       softmax runs over all tokens. One row is computed again for it; attention maps are never asked for.
    2. The highest stay, in their old order and with their old positions, as in the code.

    The paper scores by the attention of all queries, the code reads the last row, as here. The code needs the maps of
    every layer, assumes a system prompt of 36 tokens where Vicuna's has 35, so that its window is off by one, and
    takes one prompt at a time. A prompt that ends in its image is judged by its last token all the same.

    Published: ``layer=2``, ``keep=0.5`` (288 of 576 tokens), and 0.25.
    Headline: LLaVA-1.5-7B at 52.6 % of the FLOPs (2.01 TFLOPs) is near lossless. To repeat it:
    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme,mmbench_en_dev
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=fastv,keep=0.5

    Attributes:
        layer: how many layers run before, at least 1.
    """

    layer: int = option(2, whole, "it counts the layers before", least=1)
    name: ClassVar[str] = "fastv"
    paper: ClassVar[Paper] = Paper(
        "An image is worth 1/2 tokens after layer 2: plug-and-play inference acceleration for large VLMs",
        "ECCV",
        2024,
        "2403.06764",
    )
    query_aware: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """With one attention row of the layer before it."""
        return (Stage(Layer(self.layer), needs=(Rows(self.layer - 1, of="last"),)),)

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """The row."""
        return tokens.signals["last"].nan_to_num()
