"""FasterVLM: [CLS] attention is all you need for training-free visual token pruning (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient
from vtc.places import Entry
from vtc.tokens import VisualTokens


@register_method
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Salient, Scorer):
    """Keep the tokens that the vision tower's CLS token looks at most, in the layer that LLaVA takes its features from.

    A tower without a CLS token: those that its patches look at most, in its last layer (not in the paper).

    The released code drops all newlines and gives every crop of LLaVA-NeXT the same number of tokens: that is
    ``vtc.Allocate(selector=vtc.FasterVLM())``. It renumbers positions: ``positions="compact"``.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[Paper] = Paper(
        "[CLS] attention is all you need for training-free visual token pruning", "arXiv", 2024, "2412.01818"
    )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=(self.salience(),)),)

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """The row itself."""
        return self.scores(tokens)
