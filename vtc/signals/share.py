"""How much attention of the language model goes from text to images, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.signals.base import DecoderSignal, LayerView


@dataclass(frozen=True)
class Share(DecoderSignal):
    """Of the attention of some rows, averaged over heads and rows, the part that goes to the other side: [G].

    Equal for all images of a sample. NaN for ``text`` where no text stands behind the last image.

    Attributes:
        layer: counted from 0.
        of: whose rows: ``text`` (behind the last image) towards visual tokens, or ``visual`` towards that text.
    """

    of: Literal["text", "visual"] = "text"

    kind: ClassVar[str] = "share"

    @property
    def key(self) -> str:
        """``text_to_visual`` or ``visual_to_text``."""
        return self.name or ("text_to_visual" if self.of == "text" else "visual_to_text")

    def blank(self, images: int, tokens: int) -> Tensor:
        """One for each image."""
        return torch.zeros(images)

    def read(self, view: LayerView) -> Tensor:
        """Sums of attention rows."""
        if self.of == "text":
            share = (view.rows("text").mean() * view.visual).sum(1)
            return view.per_image(share.where(view.text.any(1), torch.nan))
        if not view.bidirectional:  # causal, and the text is behind: nothing to see
            return view.per_image(torch.zeros(len(view.text), device=view.text.device))
        return view.per_image((view.rows("visual").mean() * view.text).sum(1))
