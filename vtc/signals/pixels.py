"""The pixels of a picture, as the processor handed them over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.signals.base import Signal


@dataclass(frozen=True, kw_only=True)
class Pixels(Signal):
    """What a token is made of before the vision tower: [G, N, c], all values of its patches side by side.

    As the processor resized and scaled them, before the model rounds them to its own precision. Only in front of a
    tower where a token's patches stand together (Qwen-VL, GLM-V), for stages at ``Tower(block)``.
    """

    kind: ClassVar[str] = "pixels"

    def blank(self, images: int, tokens: int) -> Tensor:
        """No two are alike."""
        return torch.arange(float(tokens)).expand(images, -1)[..., None]
