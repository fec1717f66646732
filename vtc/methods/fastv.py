"""FastV: an image is worth 1/2 tokens after layer 2 (ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Scorer, Stage
from vtc.methods.registry import register_method
from vtc.places import Layer
from vtc.signals import Rows
from vtc.tokens import VisualTokens
from vtc.values import whole


@register_method
@dataclass(frozen=True, kw_only=True)
class FastV(Scorer):
    """After ``layer`` layers, keep the tokens that the prompt's last token looked at most in the layer just done.

    Published: ``keep=0.5``, ``layer=2``. The paper averages over all queries, the code reads the last row, as here.
    """

    layer: int = 2
    name: ClassVar[str] = "fastv"
    paper: ClassVar[Paper] = Paper(
        "An image is worth 1/2 tokens after layer "
        "2: plug-and-play inference acceleration for large vision-language models",
        "ECCV",
        2024,
        "2403.06764",
    )
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer", whole("layer", self.layer, "it counts the layers before", least=1))

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """With one attention row of the layer before it."""
        return (Stage(Layer(self.layer), needs=(Rows(self.layer - 1, of="last"),)),)

    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """The row."""
        return tokens.signals["last"].nan_to_num()
