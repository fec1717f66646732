"""Where tokens stand in the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtc.signals.base import DecoderSignal, LayerView


@dataclass(frozen=True)
class Columns(DecoderSignal):
    """Columns of the sample, padding not counted, as the sequence stands at a layer: LongTensor [G, N], or [G, T].

    Attributes:
        layer: counted from 0.
        of: ``visual``: of the images' tokens; ``text``: of the text behind the last image, as in :class:`LayerText`.
    """

    of: Literal["visual", "text"] = "visual"

    kind: ClassVar[str] = "columns"
    needs_rows: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """``columns``, or ``text_columns``."""
        return self.name or (f"text_{self.kind}" if self.of == "text" else self.kind)

    @property
    def axes(self) -> dict[str, int | None]:
        """Text has none of visual tokens."""
        return {self.key: None} if self.of == "text" else {}

    def read(self, view: LayerView) -> Tensor:
        """Counted."""
        columns = view.valid.cumsum(1) - 1
        return view.per_text(columns) if self.of == "text" else view.per_token(columns)
