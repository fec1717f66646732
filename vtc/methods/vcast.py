"""V-CAST: video curvature-aware spatio-temporal pruning for efficient video LLMs (arXiv 2603.27650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.budget import count
from vtc.methods.base import Paper
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.video import Cut, Video, VideoMethod
from vtc.ops.frames import highest_of_each, in_shares, matched_cosines
from vtc.values import one_of

TEMPERATURE = 0.7
EPS = 1e-6


@register_method
@dataclass(frozen=True, kw_only=True)
class VCast(VideoMethod):
    """Give larger budgets to frames where the video turns, and keep what stands out in each frame.

    1. A frame is the direction of the mean of its tokens. Its curvature: one minus the cosine between the step to it
       and the step from it; 1 for the first and the last frame.
    2. Every frame gets one token; the rest of ``round(keep * N)`` is shared out by softmax(curvature / 0.7).
    3. A token's score: one minus its cosine to its frame's direction, plus its norm, scaled from 0 to 1 within the
       frame. In each frame the highest stay, ties to the first.

    The released code gives all that rounding down leaves over to one frame, the one with the largest remainder, and
    when that is full to the next (``leftover="one"``; 17 tokens of 1568 for 32 frames of 196). Here it is one token for
    each of the largest remainders, and what a full frame cannot take is divided among the others in proportion. It
    leaves pictures and videos of one frame whole, as here, and batches too. It is released for Qwen3-VL; positions are
    the original ones. In a still video all frames get the same. Fewer tokens than frames, which only an integer
    ``keep`` of ``vtc.select`` asks for, are shared out without the one for each.

    Published: ``keep=0.25``, 64 frames.

    Headline: Qwen3-VL-8B at ``keep=0.25`` keeps 98.6 % of its score.

    Attributes:
        leftover: "largest" or "one".
    """

    leftover: Literal["largest", "one"] = option("largest", one_of, "largest", "one")

    name: ClassVar[str] = "vcast"
    paper: ClassVar[Paper] = Paper(
        "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models",
        "arXiv",
        2026,
        "2603.27650",
    )

    def total(self, frames: int, size: int) -> int:
        """At least a token a frame."""
        return max(frames, count(self.keep, frames * size))

    def cut(self, video: Video, k: int | None) -> Cut:
        """Steps 1 to 3."""
        assert k is not None
        x = video.x.detach()
        frames, size = x.shape[:2]
        direction = directions(x)
        least = min(1, k // frames)
        shares = in_shares if self.leftover == "largest" else to_one
        counts = least + shares(curvature(direction), k - frames * least, size - least)
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
        low, high = norm.aminmax(dim=1, keepdim=True)
        scores = 1.0 - matched_cosines(x, direction[:, None]) + (norm - low) / (high - low + EPS)
        return Cut(highest_of_each(scores.nan_to_num(), counts), k)


def directions(x: Tensor) -> Tensor:
    """Of float [T, P, d]: the direction of each frame, float64 [T, d]."""
    return torch.nn.functional.normalize(x.detach().mean(1, dtype=torch.float64).nan_to_num(), dim=-1, eps=EPS)


def curvature(direction: Tensor) -> Tensor:
    """Step 1 and the softmax of step 2: float64 [T], which sum up to one."""
    steps = direction.diff(dim=0)
    turns = 1.0 - torch.nn.functional.cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=EPS)
    ends = turns.new_ones(1)
    return (torch.cat([ends, turns, ends])[: len(direction)] / TEMPERATURE).softmax(0)


def to_one(weights: Tensor, total: int, most: int) -> Tensor:
    """As the released code divides: LongTensor [T], all that is left over to the largest remainder until it is full."""
    raw = weights * total
    counts = raw.floor().clamp(max=most).long()
    order = (raw - raw.floor()).masked_fill(counts == most, -1.0).sort(descending=True, stable=True).indices
    room = (most - counts)[order]
    left = total - counts.sum()
    more = torch.minimum(room, (left - room.cumsum(0) + room).clamp(min=0))
    return counts.scatter_add(0, order, more)
