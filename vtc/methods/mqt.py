"""MQT: Matryoshka Query Transformer for large vision-language models (arXiv 2405.19315)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.registry import register_method
from vtc.tokens import VisualTokens
from vtc.values import shown


@register_method
@dataclass(frozen=True, kw_only=True)
class MQT(Scorer):
    """Keep the first tokens of a resampler that was trained so that every prefix describes the picture (section 3).

    Not pruning of just any model: LLaVA's projector is replaced by a Matryoshka Query Transformer
    (:class:`vtc.modules.MatryoshkaQueryTransformer`), whose training drew a new even m of 2 .. 256 in each step. One
    checkpoint then serves every budget. Models whose projector is another are refused; ``vtc convert mqt`` makes such
    a model of a published checkpoint, and :func:`vtc.modules.load_mqt` loads it.

    1. The resampler makes n tokens of a picture: n = 256 published, 36 in ``vtc_tinyvlm``'s.
    2. The first ``keep`` of them stay (a float: that share of n), whatever is in the picture.

    A query never sees another, so the first m of n tokens are what m queries give. All n are computed all the same: in
    the published size that is 1 % of the work of its vision tower, and the prompt keeps its n placeholders, which the
    language model never sees.

    ``positions="compact"`` is the default here and the only choice. In training the text followed at once behind the m
    tokens. Were positions kept, it would follow n - m places behind them, where the model never saw it.

    Published: 256 tokens match the 576 of LLaVA-1.5 on 11 benchmarks; 16 tokens lose 2.4 points on MMBench, 2 tokens 3
    on ScienceQA and 6 on MMMU.
    """

    name: ClassVar[str] = "mqt"
    paper: ClassVar[Paper] = Paper(
        "Matryoshka Query Transformer for large vision-language models", "NeurIPS", 2024, "2405.19315"
    )
    trained: ClassVar[bool] = True

    def check(self, facts: ModelFacts) -> None:
        """Only a resampler trained for it has tokens in this order.

        Raises:
            ValueError: the projector is another.
        """
        if not facts.matryoshka:
            raise ValueError(
                f"'mqt' keeps the first tokens of a Matryoshka Query Transformer, and the projector of this "
                f"{facts.model_type!r} model is {facts.projector or 'of another kind'}, whose first tokens are the top "
                "of the picture. What would work: a model from vtc.modules.load_mqt(folder); here, 'divprune'"
            )

    def positions_for(self, asked: str | None) -> str:
        """Compact.

        Raises:
            ValueError: others are asked for.
        """
        if asked not in (None, "compact"):
            raise ValueError(
                f"positions={shown(asked)} does not fit 'mqt': it keeps a prefix, and the model was trained with the "
                "text right behind it, not behind a gap. What would work: positions='compact', its default"
            )
        return "compact"

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """The earlier the higher."""
        groups, length = tokens.features.shape[:2]
        return -torch.arange(length, dtype=torch.float32, device=tokens.features.device).expand(groups, length)
