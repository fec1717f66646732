"""Original positions inside vLLM: kept tokens stay where they were, the text behind an image stays behind all of it.

vLLM's frontend knows the text's positions, since an image's extent follows from its size, but not which tokens stay.
So text gets its final positions at once, and image tokens hold the place where their image begins, marked by being
negative: ``-1 - begin``. The encoder's output carries, beside each kept embedding, the token's offset in its image;
when a chunk of a prompt is about to run, the offsets of its tokens are added. That needs nothing from chunks before or
after, so chunked prefill, prefix-cache hits and preemption cannot disturb it, and doing it twice changes nothing.

Positions are LongTensor [3, N]: (time, height, width) for models with M-RoPE. For others only row 0 is a position; row
1 holds the position that follows (behind the whole image, for its tokens), from which decoding goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BASE = 256
"""Offsets travel as two digits of embedding dtype: 0 to 255 are exact in bfloat16, larger integers are not."""


@dataclass(frozen=True)
class Span:
    """The place of one image in a prompt.

    Attributes:
        start: of its first placeholder.
        kept: how many placeholders it has.
        extent: how many positions it takes; with M-RoPE that is the longest side of its grid.
    """

    start: int
    kept: int
    extent: int


def digits(offsets: Tensor) -> Tensor:
    """LongTensor offsets [n, R] to their digits [n, 2R], what is put behind the embeddings.

    Raises:
        ValueError: an offset that two digits do not hold.
    """
    if offsets.numel() and int(offsets.max()) >= _BASE**2:
        raise ValueError(f"an offset of {int(offsets.max())} within an image is more than {_BASE**2 - 1}")
    return torch.cat([offsets // _BASE, offsets % _BASE], dim=1)


def detach(columns: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings with digits behind them [k, d + 2R] to embeddings [k, d] and LongTensor offsets [k, R]."""
    embeddings, high, low = columns[:, : -2 * rows], columns[:, -2 * rows : -rows], columns[:, -rows:]
    return embeddings, high.long() * _BASE + low.long()


def provisional(length: int, spans: Sequence[Span], rows: int) -> tuple[Tensor, int]:
    """Positions before any image was encoded.

    Args:
        length: N, tokens of the prompt, placeholders of kept tokens among them.
        spans: of the images, in order.
        rows: 3 with M-RoPE, 1 without.

    Returns:
        LongTensor [3, N], and what to add to a token's index to get its position once the prompt is over.
    """
    positions = torch.zeros(3, length, dtype=torch.long)
    at = then = 0
    for span in [*spans, Span(length, 0, 0)]:
        text = torch.arange(then, then + span.start - at)
        positions[:, at : span.start] = text
        if rows == 1:
            positions[1, at : span.start] += 1
        begin = then + span.start - at
        at, then = span.start + span.kept, begin + span.extent
        positions[:, span.start : at] = -1 - begin
        if rows == 1:
            positions[1, span.start : at] = then
    return positions, then - length


def filled(positions: Tensor, media: Tensor, offsets: Tensor, start: int, rows: int) -> tuple[Tensor, int]:
    """Positions with those of a chunk's image tokens made final.

    Args:
        positions: LongTensor [3, N].
        media: bool [N], True at placeholders.
        offsets: LongTensor [k, R] of the k kept tokens that the chunk holds.
        start: the chunk's first token.
        rows: 3 with M-RoPE, 1 without.

    Returns:
        As :func:`provisional`.
    """
    index = media[start:].nonzero()[: len(offsets), 0] + start
    now = positions[:rows, index]
    positions = positions.clone()
    positions[:rows, index] = torch.where(now < 0, offsets.T.to(now) - 1 - now, now)
    return positions, ahead(positions, rows)


def ahead(positions: Tensor, rows: int) -> int:
    """What to add to a token's index behind the prompt; with M-RoPE the prompt ends with text."""
    end = positions[:, -1]
    return int(end[1] if rows == 1 else end.max() + 1) - positions.shape[1]
