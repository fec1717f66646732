"""Which patch each column of an embedded prompt is: the seam is asked again, with numbers in place of features.

The first call hears what ``encode_images`` returned. In a second one that method answers by itself: every token of
every tile carries its own number through splitting, unpadding, newlines, truncation and padding, and no vision tower
runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MARK = 54321.0
"""Stands beside every number. Half precision would change it, so that numbers which were rounded are not believed."""
_CHANNELS = 3


class Probe:
    """One prompt's two calls.

    Attributes:
        tiles: how many were encoded.
        each: tokens of a tile, 0 where ``encode_images`` was not called or returned something else than [tiles, n, d].
    """

    def __init__(self) -> None:
        self._heard: list[tuple[tuple[int, ...], torch.device]] = []
        self._answers: Iterator[Tensor] | None = None
        self.tiles = self.each = 0

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """While the seam does its work."""
        before = _PROBE.set(self)
        try:
            yield
        finally:
            _PROBE.reset(before)
        shapes = [shape for shape, _ in self._heard]
        if shapes and all(len(shape) == 3 and shape[1] == shapes[0][1] and shape[2] >= _CHANNELS for shape in shapes):
            self.tiles, self.each = sum(shape[0] for shape in shapes), shapes[0][1]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While it is asked again."""
        self._answers = self._numbers() if self.each else None
        with torch.no_grad():
            before = _PROBE.set(self)
            try:
                yield
            finally:
                _PROBE.reset(before)

    def encode(self, encode: Callable[[], Any]) -> Any:
        """What ``encode_images`` returns meanwhile."""
        if self._answers is not None:
            return next(self._answers)
        output = encode()
        self._heard.append((tuple(output.shape), output.device) if isinstance(output, Tensor) else ((), _HOST))
        return output

    def _numbers(self) -> Iterator[Tensor]:
        """For each call float32 [tiles, n, d]: 1 + number, the mark, and a hash that no mean of others has."""
        start = 0
        for shape, device in self._heard:
            number = torch.arange(start, start + shape[0] * shape[1], device=device)
            answer = torch.zeros(*shape, device=device)
            for channel, values in enumerate((1 + number, torch.full_like(number, int(_MARK)), _hash(number))):
                answer[..., channel] = values.view(shape[:2]).float()
            start += len(number)
            yield answer


_PROBE: ContextVar[Probe | None] = ContextVar("vtc_llava", default=None)
_HOST = torch.device("cpu")


def overheard(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``encode_images``: outside of the seam nothing changes."""

    @functools.wraps(encode)
    def call(*args: Any, **kwargs: Any) -> Any:
        probe = _PROBE.get()
        return encode(*args, **kwargs) if probe is None else probe.encode(lambda: encode(*args, **kwargs))

    return call


@dataclass(frozen=True)
class Numbers:
    """What came back in the columns of one prompt, on the host.

    Attributes:
        number: LongTensor [B, N], tile * each + token; of a mean of several tokens of a tile one between them.
        patch: bool [B, N], False at newlines and text.
        exact: bool [B, N], a patch alone; False where several were pooled or interpolated.
    """

    number: Tensor
    patch: Tensor
    exact: Tensor

    @classmethod
    def read(cls, embeds: Tensor) -> Numbers:
        """From the second call's embeddings [B, N, d]: the only wait for the device."""
        first, mark, code = embeds[..., :_CHANNELS].float().cpu().unbind(-1)
        number = (first - 1).floor().clamp(min=0).long()
        patch = (mark - _MARK).abs() < 1
        return cls(number, patch, patch & (first == 1 + number) & (code == _hash(number)))


def _hash(number: Tensor) -> Tensor:
    """16 bits of Knuth's multiplicative hash (The Art of Computer Programming 3, 6.4)."""
    return number * 2654435761 % 2**32 // 2**16
