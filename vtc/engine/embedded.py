"""Prompts that came as embeddings, whose images are known: which columns they are, and what was recorded of them.

Some families embed a prompt in a method of their own, before the language model is called. What is known of it then is
attached to the embeddings. ``generate`` copies them for beams, and accelerate between devices: copies are found again
by their numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtc.engine.locate import Encoded

_ATTACHED = "_vtc_prompt"
_CHANNELS = 8


@dataclass(frozen=True)
class Prompt:
    """The images of embeddings [B, N, d].

    Attributes:
        placeholders: by modality, bool [B, N] on the host: True at their tokens.
        encoded: by modality, the images in the order of their columns, row by row.
    """

    placeholders: Mapping[str, Tensor]
    encoded: Mapping[str, Encoded]


class Prompts:
    """The latest prompts of one patch. A copy is looked for only where embeddings have no attribute (a host sync)."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, Prompt]] = deque(maxlen=32)

    def keep(self, embeds: Tensor, prompt: Prompt) -> None:
        """Remember what is known of embeddings [B, N, d]; of them a few channels of every column are copied."""
        setattr(embeds, _ATTACHED, prompt)
        self._kept.append((_few(embeds).clone(), prompt))

    def find(self, embeds: Tensor) -> Prompt | None:
        """What is known of these embeddings, or of those that they repeat row by row."""
        if (prompt := getattr(embeds, _ATTACHED, None)) is not None:
            return prompt
        sample = _few(embeds)
        for kept, prompt in reversed([*self._kept]):
            times, rest = divmod(len(sample), len(kept))
            same = not rest and sample.shape[1:] == kept.shape[1:]
            if same and torch.equal(kept.to(sample).repeat_interleave(times, 0), sample):
                rows = {modality: where.repeat_interleave(times, 0) for modality, where in prompt.placeholders.items()}
                return replace(prompt, placeholders=rows)
        return None


def _few(embeds: Tensor) -> Tensor:
    return embeds.detach()[..., :_CHANNELS]
