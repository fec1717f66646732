"""DyCoke: dynamic compression of tokens for fast video large language models (CVPR 2025, arXiv 2411.15024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.budget import apportioned, count
from vtc.methods.base import Paper
from vtc.methods.registry import register_method
from vtc.methods.video import Cut, Video, VideoMethod
from vtc.ops.frames import highest_of_each, matched_cosines
from vtc.values import share as share_of
from vtc.values import shown

WHOLE = "of every four frames one stays whole"


@register_method
@dataclass(frozen=True, kw_only=True)
class DyCoke(VideoMethod):
    """Keep one frame of four whole, and of the others what differs from it (token temporal merging, in the prefill).

    1. Frames go in pairs: of the second, the tokens stay that are least like the first at the same place (cosine).
    2. Pairs go in fours: the same for the first frame of the second pair, compared with the first frame of all. Frames
       are compared as they came, before anything leaves.

    It is called merging; nothing is merged. As in the released code the last four frames, or what is left of four,
    skip step 2. It loses the last frame of an odd number, fails at four frames or fewer, and lets the tokens of a
    pruned frame follow each other by similarity; here a frame without a partner stays whole, two to four frames are
    pairs, and all stays in raster order. It renumbers positions: ``positions="compact"``. What it does while decoding
    (a cache that is chosen anew) is not part of this. Pictures and videos of one frame stay whole.

    ``keep`` counts exactly: ``round(keep * N)``, of which the whole frames have theirs and the pruned ones share the
    rest evenly, the first getting what is over. A keep below the whole frames (9 of 32) is out of reach, and refused.
    ``drop`` is the released code's knob instead: of P tokens of a pruned frame ``int((1 - drop) * P)`` stay (2 of 30
    with 0.9, by round-off, as there). ``keep``
    then becomes what that amounts to in a long video, ``(1 + 3 * (1 - drop)) / 4``, whatever was given.

    Published: ``drop=0.7`` and ``drop=0.3`` (LLaVA-OneVision); 32 frames of 196 keep 3098 of 6272 with 0.7.

    Headline: 1.5 times as fast with the part that is not here.

    Attributes:
        drop: share of a pruned frame's tokens that leaves; ``None``: what ``keep`` asks for.
    """

    keep: float | int = 0.5
    drop: float | None = None

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[Paper] = Paper(
        "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", "CVPR", 2025, "2411.15024"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop is not None:
            drop = share_of("drop", self.drop, "the share of a pruned frame's tokens that leaves lies in [0, 1]")
            object.__setattr__(self, "drop", drop)
            object.__setattr__(self, "keep", (1.0 + 3.0 * (1.0 - drop)) / 4.0)
        elif isinstance(self.keep, float) and self.keep < 0.25:
            raise ValueError(f"keep={shown(self.keep)}: {WHOLE}; give 0.3 or more, or another method")

    def total(self, frames: int, size: int) -> int:
        """The whole frames, and what the others keep."""
        whole, n = size * (frames - len(partners(frames))), frames * size
        if self.drop is not None:
            return whole + len(partners(frames)) * int((1.0 - self.drop) * size)
        return reachable(count(self.keep, n), whole, n)

    def cut(self, video: Video, k: int | None) -> Cut:
        """Both steps."""
        assert k is not None
        x = video.x
        frames, size = x.shape[:2]
        partner = partners(frames)
        pruned = torch.tensor([*partner]).to(x.device, non_blocking=True)
        first = torch.tensor([*partner.values()]).to(x.device, non_blocking=True)
        whole = size * (frames - len(partner))
        shares = apportioned(reachable(k, whole, frames * size) - whole, [size] * len(partner))
        counts = torch.tensor(shares).to(x.device, non_blocking=True)
        keeps = torch.ones(frames, size, dtype=torch.bool, device=x.device)
        return Cut(keeps.index_copy(0, pruned, highest_of_each(-matched_cosines(x[pruned], x[first]), counts)), k)


def partners(frames: int) -> dict[int, int]:
    """Of each frame that is pruned, the one that it is compared with."""
    pairs = {i + 1: i for i in range(0, frames - 1, 2)}
    return pairs | {i + 2: i for i in range(0, frames - 4, 4)}


def reachable(k: int, whole: int, n: int) -> int:
    """The count, if the whole frames fit in.

    Raises:
        ValueError: they do not.
    """
    if k < whole:
        raise ValueError(
            f"dycoke cannot keep {k} of {n} tokens: {WHOLE}, here {whole} tokens. What would work: keep of at least "
            f"{whole / n:.3f}, or another method"
        )
    return k
