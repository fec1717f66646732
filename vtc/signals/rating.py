"""Which words of the prompt the image speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.signals.base import DecoderSignal, LayerView

FINE = 2.0**-40  # of exponentials, and below it of shares: so rounded, their sums are exact in float64
COARSE = 2.0**-28
ENTRIES = 2**26  # float64 numbers that are worked on at a time; one image alone may have more


@dataclass(frozen=True)
class Rating(DecoderSignal):
    """Raters (SparseVLM, section 3.2): text behind the last image that its visual tokens point at: bool [G, T].

    Every visual token shares itself out among the text tokens, by the softmax of the dot products of what enters the
    layer (embeddings, at layer 0). Raters are those that get more than the mean; all of them where none does.

    Rows stand as in :class:`TextRows`; where no text is behind the image, the last one is a rater.
    """

    kind: ClassVar[str] = "rating"
    needs_rows: ClassVar[bool] = False

    @property
    def axes(self) -> dict[str, int | None]:
        """It has none of visual tokens."""
        return {self.key: None}

    def blank(self, images: int, tokens: int) -> Tensor:
        """One rater."""
        return torch.ones(images, 1, dtype=torch.bool)

    def read(self, view: LayerView) -> Tensor:
        """From the hidden states of both."""
        hidden = view.hidden
        there = view.per_text(view.text)
        found = raters(view.per_token(hidden), view.per_token(view.visual), view.per_text(hidden), there)
        last = torch.arange(there.shape[1], device=there.device) == there.shape[1] - 1
        return found | (last & ~there.any(1, keepdim=True))

    def bare(self, features: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
        """From features and text; without text every row of a signal [1, T, N] is a rater's."""
        if (text := given.get("text")) is not None:
            return raters(features, features.new_ones(features.shape[:2], dtype=torch.bool), text, given["text_mask"])
        rows = given.get("raters")
        return None if rows is None else rows.new_ones(rows.shape[:2], dtype=torch.bool)


def raters(visual: Tensor, real: Tensor, text: Tensor, there: Tensor) -> Tensor:
    """Text tokens that get more than the mean of what visual tokens share out among them; all where none does.

    Dot products are cosines times lengths, and sums are exact: neither a batch nor padding changes a bit.

    Args:
        visual: float [G, N, d].
        real: bool [G, N], which count.
        text: float [G, T, d].
        there: bool [G, T], which count.

    Returns:
        Bool [G, T].
    """
    size = max(1, ENTRIES // max(1, visual.shape[1] * visual.shape[2]))
    parts = zip(*(each.split(size) for each in (visual, real, text, there)), strict=True)
    return torch.cat([_raters(*part) for part in parts])


def _raters(visual: Tensor, real: Tensor, text: Tensor, there: Tensor) -> Tensor:
    v, t = visual.double().masked_fill(~real[..., None], 0.0), text.double().masked_fill(~there[..., None], 0.0)
    lengths = (torch.linalg.vector_norm(each, dim=-1) for each in (v, t))
    of_v, of_t = lengths
    dots = ops.cosines(v, t) * of_v[..., None] * of_t[:, None]
    dots = dots.masked_fill(~there[:, None], -torch.inf)
    top = dots.amax(-1, keepdim=True).clamp_min(torch.finfo(dots.dtype).min)  # no text at all
    weight = (torch.exp(dots - top) / FINE).round_()
    share = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)
    got = (share / COARSE).round_().masked_fill(~real[..., None], 0.0).sum(1)  # [G, T]
    count = there.sum(-1, keepdim=True)
    above = there & (got * count > got.sum(-1, keepdim=True))
    return torch.where(above.any(-1, keepdim=True), above, there)
