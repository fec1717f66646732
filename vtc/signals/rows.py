"""What rows of the language model's attention give to the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
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


@dataclass(frozen=True)
class TextRows(DecoderSignal):
    """Attention that each text token behind the last image pays in one layer, averaged over heads: [G, T, N].

    Rows stand at the end, zeros in front of them. Where no text is behind the image, the last row is that of the
    prompt's last token.
    """

    kind: ClassVar[str] = "text_rows"

    @property
    def axes(self) -> dict[str, int | None]:
        """Tokens come last."""
        return {self.key: 2}

    def blank(self, images: int, tokens: int) -> Tensor:
        """One row."""
        return torch.zeros(images, 1, tokens)

    def read(self, view: LayerView) -> Tensor:
        """Memory is O(T x M): rows, never a map."""
        rows = view.per_token(view.rows("text").each().mT).mT
        return torch.nn.functional.pad(rows, (0, 0, view.room - rows.shape[1], 0))
