"""TransPrune: token transition pruning for efficient large vision-language models (CVPR 2026, arXiv 2507.20630)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.schedule import Scheduled
from vtc.places import Layer
from vtc.signals import Rows, Transitions
from vtc.tokens import VisualTokens
from vtc.values import one_of, share, shown, whole

RATIOS = (0.875, 0.625, 0.125)


@register_method
@dataclass(frozen=True, kw_only=True)
class TransPrune(Scheduled, Scorer):
    """Drop tokens inside the language model, in three steps: those that the layers hardly change and no word looks at.

    1. Everything enters. After layers 7, 9 and 12 of 32, 87.5, 62.5 and 12.5 % of the visual tokens go on.
    2. Transition: for the attention and the MLP of each layer from the 7th on, how much they stretch and turn a token
       (length of the output over that of the input, times a softmax of one minus their cosine), summed up to here.
    3. Instruction: attention that the text behind the image pays to the token in the next layer, averaged over heads
       and words.
    4. Both are divided by their sum over the image; the tokens with the highest sum stay, in their old order.

    Each image has its own budget and its own scores, whatever stands beside it. In a model of L layers the stages
    come after layers round(7L/32), round(9L/32) and round(12L/32), moved apart where they would meet (28 layers: 6, 8,
    11; 4 layers: 1, 2, 3); with fewer than 4 layers, give ``layers`` and ``ratios``. Transitions are summed from the
    first of the three layers to the stage at hand. ``keep`` is what is left after the last stage (default 12.5 %, as
    published); another value bends the schedule in proportion: stage s keeps
    ``1 - (1 - ratio_s) * (1 - keep) / (1 - 0.125)``. Counts are cut to integers, at least 1. So ``keep`` is not the
    average over layers: with the published schedule and 32 layers that is 41.0 % of the tokens in a layer.

    Code and paper differ: the paper takes one minus the *absolute* cosine and the softmax over image tokens only
    (``variant="paper"``), the code (``variant="code"``, the default) ``1 - cos`` and the softmax over all tokens. The
    paper weighs both scores with 0.5, which ranks as their sum does; ``alpha`` changes the weight. The code knows
    multi-head attention only, one prompt at a time, and renumbers positions after each stage
    (``positions="compact"``). Newlines are tokens like any other. The published "Low" schedule is not released.

    Headline: LLaVA-1.5-7B at 40.8 % of the FLOPs keeps 100.0 % of its accuracy over 8 benchmarks (GQA 61.4, TextVQA
    57.8, POPE 85.0, MME 1540). To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks mme,vqav2_val,seedbench,textvqa_val,pope,gqa
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=transprune,keep=0.125

    Attributes:
        layers: how many layers run before each stage; ``None``: the published ones, scaled to the model's depth.
        ratios: the share of the tokens given that each stage keeps when ``keep`` is the last of them.
        since: the first layer, from 1, whose transitions count; ``None``: the first of ``layers``.
        variant: ``code`` or ``paper``.
        alpha: weight of the transition, in [0, 1]; the instruction has the rest.
    """

    ratios: tuple[float, ...] | None = RATIOS
    since: int | None = option(None, whole, "it is a layer number, counted from 1")
    variant: Literal["code", "paper"] = option("code", one_of, "code", "paper")
    alpha: float = option(0.5, share, "it must lie in [0, 1]")

    name: ClassVar[str] = "transprune"
    paper: ClassVar[Paper] = Paper(
        "TransPrune: token transition pruning for efficient large vision-language models", "CVPR", 2026, "2507.20630"
    )
    query_aware: ClassVar[bool] = True
    published: ClassVar[tuple[int, ...]] = (7, 9, 12)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.since is not None and (self.layers is None or not 1 <= self.since <= self.layers[0]):
            raise ValueError(
                f"since={shown(self.since)} must lie in [1, layers[0]], and layers={shown(self.layers)} be given"
            )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """After layers 7, 9 and 12 of 32, or what the options say."""
        layers = self.places(model.depth)
        since = layers[0] if self.since is None else self.since
        paper = self.variant == "paper"
        return tuple(
            Stage(Layer(after), needs=(Transitions(since - 1, until=after, absolute=paper), Rows(after, of="text")))
            for after in layers
        )

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """Steps 2 to 4; summed in float64, so that padding does not change it."""
        parts = []
        for name in ("transition", "instruction"):
            signal = tokens.signals[name].double().nan_to_num().masked_fill(~tokens.mask, 0.0)
            parts.append(signal / (signal.sum(-1, keepdim=True) + 1e-8))
        return (self.alpha * parts[0] + (1.0 - self.alpha) * parts[1]).float()
