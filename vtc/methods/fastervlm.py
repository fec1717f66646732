"""FasterVLM: [CLS] attention is all you need for training-free visual token pruning (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.base import ModelFacts, Scorer, Stage
from vtc.methods.registry import register_method
from vtc.places import Entry
from vtc.signals import Cls
from vtc.tokens import VisualTokens


@register_method
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer):
    """Keep the tokens that the vision tower's CLS token looks at most, in the layer that LLaVA takes its features from.

    The released code drops all newlines and gives every crop of LLaVA-NeXT the same number of tokens: that is
    ``vtc.Allocate(selector=vtc.FasterVLM())``. It renumbers positions: ``positions="compact"``.
    """

    name: ClassVar[str] = "fastervlm"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance, with the CLS row of the layer before the last."""
        return (Stage(Entry(), needs=(Cls(layer=-2),)),)

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """The row itself."""
        return tokens.signals["cls"].nan_to_num()
