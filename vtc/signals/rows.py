"""What rows of the language model's attention give to the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.signals.base import DecoderSignal, LayerView


@dataclass(frozen=True)
class Rows(DecoderSignal):
    """Attention that a token gets in one layer, averaged over heads and rows: [G, N].

    Attributes:
        layer: counted from 0.
        of: ``text``: all real text behind the last image; ``last``: the last of those rows alone.
    """

    of: Literal["text", "last"] = "last"

    kind: ClassVar[str] = "rows"

    @property
    def key(self) -> str:
        """``instruction`` for text, ``last`` for the last row."""
        return self.name or ("instruction" if self.of == "text" else "last")

    def read(self, view: LayerView) -> Tensor:
        """The softmax runs over all that the rows see, stored keys too."""
        rows = view.rows("text")
        return view.per_token(rows.last() if self.of == "last" else rows.mean())
