"""Where tokens stand in the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.signals.base import ColumnSignal, LayerView


@dataclass(frozen=True)
class Columns(ColumnSignal):
    """Columns of the sample, padding not counted, as the sequence stands at a layer: LongTensor [G, N], or [G, T]."""

    kind: ClassVar[str] = "columns"
    needs_rows: ClassVar[bool] = False

    def blank(self, images: int, tokens: int) -> Tensor:
        """From the first column on."""
        return torch.arange(tokens).expand(images, -1)

    def read(self, view: LayerView) -> Tensor:
        """Counted."""
        return self.chosen(view, view.valid.cumsum(1) - 1)
