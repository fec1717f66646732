"""The text of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.signals.base import DecoderSignal, LayerView, PromptSignal


@dataclass(frozen=True, kw_only=True)
class Text(PromptSignal):
    """Embeddings of the text tokens of an image's sample, in order: [G, T, d]; beside it bool [G, T], which are real.

    The second is found under ``text_mask`` (or ``NAME_mask``).
    """

    kind: ClassVar[str] = "text"

    @property
    def axes(self) -> dict[str, int | None]:
        """It has none of visual tokens."""
        return {self.key: None, f"{self.key}_mask": None}

    def drawn(self, images: int, tokens: int, width: int) -> dict[str, Tensor]:
        """Of one word."""
        return _one_word(self.key, images, width)

    def read(self, embeds: Tensor, text: Tensor, samples: Sequence[int]) -> dict[str, Tensor]:
        """Gathered to the left; as many columns as the prompt has, so that nobody waits for the device."""
        order = (~text).to(torch.int8).argsort(dim=1, stable=True)
        rows = torch.tensor(samples, device=embeds.device)
        gathered = embeds.detach().gather(1, order[..., None].expand_as(embeds))
        return {self.key: gathered[rows], f"{self.key}_mask": text.gather(1, order)[rows]}


@dataclass(frozen=True)
class LayerText(DecoderSignal):
    """Hidden states of the text behind the last image, as they enter a layer of the language model: [G, T, d].

    They stand at the end, zeros in front of them; beside them bool [G, T], which are real, under ``text_mask`` (or
    ``NAME_mask``).
    """

    kind: ClassVar[str] = "text"
    needs_rows: ClassVar[bool] = False

    @property
    def axes(self) -> dict[str, int | None]:
        """It has none of visual tokens."""
        return {self.key: None, f"{self.key}_mask": None}

    def drawn(self, images: int, tokens: int, width: int) -> dict[str, Tensor]:
        """Of one word."""
        return _one_word(self.key, images, width)

    def read(self, view: LayerView) -> dict[str, Tensor]:
        """Gathered."""
        return {self.key: view.per_text(view.hidden), f"{self.key}_mask": view.per_text(view.text)}


def _one_word(key: str, images: int, width: int) -> dict[str, Tensor]:
    return {key: torch.rand(images, 1, width), f"{key}_mask": torch.ones(images, 1, dtype=torch.bool)}
