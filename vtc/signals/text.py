"""The text of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.signals.base import PromptSignal


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

    def read(self, embeds: Tensor, text: Tensor, samples: Sequence[int]) -> dict[str, Tensor]:
        """Gathered to the left; as many columns as the prompt has, so that nobody waits for the device."""
        order = (~text).to(torch.int8).argsort(dim=1, stable=True)
        rows = torch.tensor(samples, device=embeds.device)
        gathered = embeds.detach().gather(1, order[..., None].expand_as(embeds))
        return {self.key: gathered[rows], f"{self.key}_mask": text.gather(1, order)[rows]}
