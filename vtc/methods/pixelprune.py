"""PixelPrune: pixel-level adaptive visual token reduction via predictive coding (arXiv 2604.00886)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.places import Tower
from vtc.signals import Pixels
from vtc.tokens import Layout, VisualTokens
from vtc.values import number


@register_method
@dataclass(frozen=True, kw_only=True)
class PixelPrune(Method):
    """Before the vision tower, drop what a neighbour's pixels predict: white paper, bars, flat screens.

    Written from the paper's rule, not from its code. On the grid of tokens (Qwen3-VL: 32x32 pixels), frame by frame:

    1. A token is predicted by its left neighbour A, or the one above, B: by B where the one between them (above and to
       the left, C) is like A and not like B, so that an edge runs on; else by A. The first row has A alone, the first
       column B, and the first token nothing.
    2. A token like its prediction leaves before the first block: it costs no tower and no language model.

    Alike are tokens no value of which is further apart than ``tau``. With 0 nothing is lost in pixels; answers can
    change all the same, because copies had positions and took part in attention. With more, errors may add up along a
    row: neighbours count as they are, whether they stayed or not.

    How many stay, the picture decides (one wait for the device): no ``keep`` is looked at but 1.0, with which a patched
    model keeps all. A photo keeps nearly everything, a page of text far less.

    Attributes:
        tau: in the values that the processor hands over. The paper's is in pixels from 0 to 1: divide it by the
            processor's ``image_std`` (0.5 with Qwen3-VL).
    """

    tau: float = option(0.0, number, "the largest difference of pixel values that counts as none, 0 or more", 0.0)

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[Paper | None] = Paper(
        "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", "arXiv", 2026, "2604.00886"
    )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Before the tower."""
        return (Stage(Tower(0), needs=(Pixels(),)),)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """The pixels decide."""
        return None

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Both steps, for each frame of each picture."""
        pixels = tokens.signals["pixels"]
        stays = tokens.mask.clone()
        for row, layout in enumerate(tokens.layouts):
            for segment in layout.segments:
                at = slice(segment.start, segment.stop)
                grid = segment.grid or (1, segment.length)
                stays[row, at] = ~predicted(pixels[row, at].unflatten(0, grid), self.tau).flatten()
        stays &= tokens.mask
        return Reduction.of_mask(stays, tuple(stays.sum(1).tolist()))

    @property
    def remedy(self) -> str:
        """What compares embeddings."""
        return "vtc.Adaptive(vtc.DivPrune()), which lets embeddings decide how many stay"


def predicted(x: Tensor, tau: float) -> Tensor:
    """Bool [rows, columns]: True where cells [rows, columns, c] are like their prediction."""

    def like(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(-1) <= tau

    beside, below = like(x[:, 1:], x[:, :-1]), like(x[1:], x[:-1])  # like the left one, like the one above
    found = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    found[0, 1:] = beside[0]
    found[1:, 0] = below[:, 0]
    runs_on = below[:, :-1] & ~beside[:-1]  # C is like A, which is below it, and not like B, which is beside it
    found[1:, 1:] = torch.where(runs_on, below[:, 1:], beside[1:])
    return found
