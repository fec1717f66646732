"""What the device can do, measured, and what the work costs, counted: together, the time no version can beat.

FLOPs are twice the multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.timing import measure
from vtc.costs import Decoder
from vtc.feed import Picture
from vtc.models import resolve
from vtc.ops.backend import interpreted
from vtc.profiling.encoder import Encoder
from vtc.profiling.feed import feed_of

# ------------------------------------------------------------------------------------------------------------ ceilings


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Attributes:
        bandwidth: bytes per second of a large copy, read and written bytes counted.
        flops: of a large bf16 matrix product per second, on random data.
        step: seconds of one dependent pick, see ``step.py``.
    """

    bandwidth: float
    flops: float
    step: float

    def of(self, flops: float = 0.0, moved: float = 0.0, steps: int = 0) -> float:
        """Milliseconds: the slower of arithmetic and bytes, then steps one after the other."""
        return (max(flops / self.flops, moved / self.bandwidth) + steps * self.step) * 1e3


def ceilings(device: torch.device, smoke: bool) -> Ceilings:
    """Measure them; a second or two on a GPU, with tiny and meaningless sizes in a smoke run."""
    size, side, steps = (2**16, 64, 8) if smoke else (2**30, 8192, 4096)
    rounds = {"least": 1, "most": 1, "warm": 1} if smoke else {"least": 5, "most": 10, "warm": 3}
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": lambda _: target.copy_(source)}, device, 1.0, **rounds)["copy"].median
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure({"product": lambda _: a @ b}, device, 1.0, **rounds)["product"].median
    picks = measure({"steps": _steps(device, steps)}, device, 0.5, **rounds)["steps"].median
    return Ceilings(2 * size / copy * 1e3, 2 * side**3 / product * 1e3, picks / steps / 1e3)


def _steps(device: torch.device, steps: int) -> Any:
    n = 1024 if device.type == "cuda" else 16
    rows = torch.rand(n, n, device=device)
    if device.type == "cuda" or interpreted():
        from benchmarks.gpu.step import chain

        last = torch.zeros(1, dtype=torch.int32, device=device)
        return lambda _: chain[(1,)](rows, last, steps, n, num_warps=4)

    def run(_: int) -> torch.Tensor:
        state, pick = torch.full((n,), -2.0), torch.tensor(0)
        for _ in range(steps):
            state = torch.maximum(state, rows[pick])
            pick = state.argmin()
        return pick

    return run


# ------------------------------------------------------------------------------------------------------------- one op


def greedy(on: Ceilings, batch: int, tokens: int, kept: int, width: int, itemsize: int, *, all_pairs: bool) -> float:
    """Milliseconds for k picks of every image: the similarities as a matrix product, the picks as dependent steps.

    All pairs are a symmetric matrix, of which half is enough; otherwise only the rows of the picks are needed.
    Features are read once. Images are independent, so the steps of a batch run side by side.
    """
    products = batch * width * (tokens * tokens if all_pairs else 2 * tokens * kept)
    return on.of(products, batch * (tokens * width * itemsize + 8 * kept), kept)


def transition(on: Ceilings, batch: int, tokens: int, width: int, itemsize: int) -> float:
    """Milliseconds to read both tensors once and write a score for each token."""
    return on.of(6 * batch * tokens * width, batch * tokens * (2 * width * itemsize + 4))


def attention_rows(
    on: Ceilings, batch: int, heads: int, groups: int, rows: int, length: int, head: int, itemsize: int
) -> float:
    """Milliseconds to read keys and queries once, with one product of all rows with all keys."""
    moved = batch * head * itemsize * (groups * length + heads * rows) + 4 * batch * length
    return on.of(2 * batch * heads * rows * length * head, moved)


def columns(on: Ceilings, kept: int) -> float:
    """Milliseconds to read what stays, so many bytes, and write it elsewhere."""
    return on.of(moved=2 * kept)


# ---------------------------------------------------------------------------------------------------------- one model


class Costs:
    """A model and its picture in FLOPs and bytes, counted by :mod:`vtc.costs` and :mod:`vtc.profiling.encoder`.

    Args:
        model: a transformers model.
        picture: width and height of the image, in pixels.
        text: tokens of a prompt that are not visual.
    """

    def __init__(self, model: Any, picture: tuple[int, int], text: int) -> None:
        _, parts = resolve(model)
        feed, encoder = feed_of(parts, Picture(*picture)), Encoder.of(parts)
        self.vision = encoder.vision(feed).flops + encoder.projection(feed).flops
        size = next(parts.decoder.parameters()).element_size()
        self.decoder = replace(Decoder.of(parts.decoder, parts.root), size=size)
        self.text = text

    def _tokens(self, visual: Sequence[float]) -> list[int]:
        return [round(self.text + tokens) for tokens in visual]

    def prefill(self, visual: Sequence[float]) -> float:
        """FLOPs of one prompt with so many visual tokens in each layer, the vision side included."""
        return self.vision + self.decoder.prefill(self._tokens(visual)).flops

    def step(self, visual: Sequence[float], batch: int) -> float:
        """Bytes that a decode step reads: the weights once, and what is cached of each prompt."""
        return self.decoder.decode(self._tokens(visual), batch).bytes

    def cache(self, visual: Sequence[float], batch: int) -> float:
        """Bytes of keys and values."""
        return self.decoder.cache_bytes(self._tokens(visual), batch)
