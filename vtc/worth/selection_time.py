"""How long a method takes to choose, measured when a model is patched, before anything of the model is touched.

On tokens drawn at random, which resemble nothing: for methods that rule tokens out this is the worst case.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vtc.methods.stages import Step
from vtc.tokens import Layout, Segment, VisualTokens
from vtc.worth.pace import best, known

SIZES = (64, 256, 1024)
"""Tokens of an image."""
IMAGES = (1, 4)
LONG = 0.02
"""Seconds: where the smallest batch takes as long, larger images are not tried."""


@dataclass(frozen=True)
class SelectionTime:
    """Of one method on one device.

    Attributes:
        tokens: of an image, rising.
        once: seconds for any batch of such images.
        each: seconds for every image on top.
    """

    tokens: tuple[int, ...]
    once: tuple[float, ...]
    each: tuple[float, ...]

    def seconds(self, images: int, tokens: int) -> float:
        """For images of so many tokens, padded to the longest.

        Between measured sizes a power law; below them as at the smallest; above them as the square of the tokens.
        """
        at = [once + images * each for once, each in zip(self.once, self.each, strict=True)]
        right = bisect_left(self.tokens, tokens)
        if right == 0:
            return at[0]
        if right == len(self.tokens):
            return at[-1] * (tokens / self.tokens[-1]) ** 2
        low, high = self.tokens[right - 1 : right + 1]
        share = math.log(tokens / low) / math.log(high / low)
        return at[right - 1] ** (1 - share) * at[right] ** share


def selection_time_of(steps: Sequence[Step], width: int, device: torch.device, dtype: torch.dtype) -> SelectionTime:
    """As it was found once for these steps, or measured now.

    Args:
        steps: of a settled method; none inside the vision tower.
        width: of the tokens.
        device: where.
        dtype: of the tokens.

    Raises:
        ValueError: the method cannot choose among tokens that were drawn at random.
    """
    what = f"{[(str(step.method), step.stage.number) for step in steps]} of width {width}"
    found = known(device, dtype, what, lambda: _measured(steps, width, device, dtype), 2 * len(SIZES))
    pairs = list(zip(found[::2], found[1::2], strict=True))
    once, each = [], []
    for few, many in pairs:
        more = max(0.0, (many - few) / (IMAGES[1] - IMAGES[0]))
        once.append(max(0.0, few - more))
        each.append(more)
    return SelectionTime(SIZES, tuple(once), tuple(each))


@torch.inference_mode()
def _measured(steps: Sequence[Step], width: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Seconds by size and number of images; of sizes that were not tried the square law's."""
    took: list[float] = []
    for at, tokens in enumerate(SIZES):
        if took and took[-2] > LONG:
            took += [seconds * (tokens / SIZES[at - 1]) ** 2 for seconds in took[-2:]]
            continue
        for images in IMAGES:
            drawn = _drawn(steps, images, tokens, width, device, dtype)
            took.append(best(partial(_choose, steps, *drawn), device, 2))
    return took


def _drawn(
    steps: Sequence[Step], images: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[VisualTokens, list[dict[str, Tensor]]]:
    """Tokens, and the signals of each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torch.randn(images, tokens, width).to(device, dtype)
        signals = [_signals(step, images, tokens, width, device) for step in steps]
    layouts = (_layout(steps, tokens),) * images
    return VisualTokens(features, layouts, (0,) * images, samples=tuple(range(images))), signals


def _signals(step: Step, images: int, tokens: int, width: int, device: torch.device) -> dict[str, Tensor]:
    drawn = (signal.drawn(images, tokens, width) for signal in step.stage.needs)
    return {name: value.to(device) for each in drawn for name, value in each.items()}


def _layout(steps: Sequence[Step], tokens: int) -> Layout:
    """A square picture; for methods that leave pictures whole a video of frames of 4 x 4 tokens."""
    side = math.isqrt(tokens)
    picture = Layout.plain(tokens, (side, side))
    left = steps[0].most((picture,), (tokens,), (tokens,))
    if left is not None and left[0] < tokens:
        return picture
    return Layout(tokens, tuple(Segment("frame", start, 16, (4, 4)) for start in range(0, tokens, 16)))


def _choose(steps: Sequence[Step], tokens: VisualTokens, signals: Sequence[dict[str, Tensor]]) -> None:
    """All steps, as the engine runs them."""
    entered: dict[int, tuple[int, ...]] = {}
    for step, given in zip(steps, signals, strict=True):
        at_entry = entered.setdefault(id(step.method), tokens.counts)
        kept = step.reduce(replace(tokens, signals=given, axes=step.axes, entered=at_entry))
        tokens = replace(tokens, alive=kept.mask, alive_counts=kept.counts)
