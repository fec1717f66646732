"""FastVID: dynamic density pruning for fast video large language models (NeurIPS 2025, arXiv 2503.11187)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vtc.budget import apportioned, truncated
from vtc.methods.base import Paper, Reduction
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.video import Cut, Melting, Video
from vtc.ops import density_peaks, gathered, nearest, squared_distances
from vtc.ops.frames import highest_of_each, matched_cosines
from vtc.ops.merging import unit_rows
from vtc.values import number, share, whole


@register_method
@dataclass(frozen=True, kw_only=True)
class FastVID(Melting):
    """Cut a video into scenes; keep what is looked at, and melt the rest of a scene into its density peaks.

    1. Scenes: cut behind a frame whose cosine to the next is one of the ``segments - 1`` smallest, or below ``tau``.
    2. Salient: of each frame's n tokens, all but ``int(n * context)`` are those most looked at, unchanged.
    3. Anchors: in every ``stride``-th frame of a scene, counted from its end, the highest density peaks of the others
       (4 neighbours); together as many as all the scene's frames have to keep beside the salient ones.
    4. In each frame with anchors, every token of the scene that is not salient joins the anchor with the largest
       cosine. An anchor becomes w of itself and 1 - w of its members' mean, w = max(1 / (members + 1), ``beta``).
       With ``stride=1`` only tokens of its own frame join.

    The released code looks at SigLIP's pooling head, which Hugging Face's towers do not have: "cls" and "frames" (a
    vector for each) of ``vtc.select``. Without "frames" a frame is the mean of its tokens, as in the Qwen variant, and
    ``saliency`` is what the model gives. Random noise on densities is left out. Fewer frames than ``segments``, fewer
    than 4 other tokens, and more anchors than a frame has (keep=0.5) fail there; here there are as many as can be, and
    for missing anchors the most looked at stay. Positions are the original ones. A float ``keep`` counts as released,
    n = ``int(keep * P)`` less what rounding loses (607 of 608); an integer is exact. The host waits once, for scenes.

    Defaults: LLaVA-OneVision. Published: ``keep=0.1``; Qwen2.5-VL: ``keep=0.27, tau=0.84``.
    Headline: LLaVA-OneVision-7B at ``keep=0.1`` keeps 98.0 % of its score, with 8.3 % of the FLOPs.

    Attributes:
        segments: scenes at least.
        tau: cosine of two frames below which a scene ends.
        context: share of a frame's budget that anchors get.
        stride: of so many frames one has anchors.
        beta: least weight of an anchor itself.
    """

    segments: int = option(8, whole, "it counts, from 1", least=1)
    tau: float = option(0.9, number, "it is a cosine")
    context: float = option(0.4, share, "it is a share, in [0, 1]")
    stride: int = option(4, whole, "it counts, from 1", least=1)
    beta: float = option(0.6, share, "it is a share, in [0, 1]")

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[Paper] = Paper(
        "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", "NeurIPS", 2025, "2503.11187"
    )

    def cut(self, video: Video, k: int | None) -> Cut:
        """Steps 1 to 4."""
        x, (frames, size) = video.x, video.x.shape[:2]
        pooled = video.signals.get("frames", x.mean(1, dtype=torch.float64))
        scenes = self._scenes(pooled.reshape(frames, -1))
        n = max(1, truncated(float(self.keep), size)) if k is None else k // frames
        salient = n - truncated(self.context, n)
        wanted = self._anchors(scenes, n - salient, size, None if k is None else k - frames * salient)
        anchors = [min(each, size - salient) for each in wanted]
        looked = video.scores(self.looks)
        keeps = highest_of_each(looked, salient)
        peaks = density_peaks(squared_distances(x, ~keeps) / x.shape[-1], ~keeps, neighbors=4)
        centre = highest_of_each(peaks, torch.tensor(anchors).to(x.device, non_blocking=True))
        left = looked.masked_fill(keeps | centre, -torch.inf).flatten()
        keeps |= highest_of_each(left, sum(wanted) - sum(anchors)).view_as(keeps)
        values, sizes, z = x.to(torch.float64, copy=True), torch.ones_like(looked), unit_rows(x)
        for a, b in scenes:
            for t in (t for t in range(a, b) if anchors[t]):
                at = Reduction.of_mask(centre[t, None], (anchors[t],)).index
                like = (z[a:b].flatten(0, 1) @ z[t, at[0]].mT)[None]
                joins = nearest(like, ~keeps[a:b].flatten()[None], torch.ones_like(at, dtype=torch.bool))
                total, members = (of[0] for of in gathered(x[a:b].flatten(0, 1)[None], joins, anchors[t]))
                weight = (1.0 / (members + 1.0)).clamp(min=self.beta)[:, None]
                mean = total / members.clamp(min=1.0)[:, None]
                values[t] = values[t].index_copy(0, at[0], weight * x[t, at[0]] + (1.0 - weight) * mean)
                part = (members / sum(map(bool, anchors[a:b]))).clamp(min=1.0)  # members join in each such frame
                sizes[t] = sizes[t].index_copy(0, at[0], part.float())
        return Cut(keeps | centre, frames * salient + sum(wanted), values, sizes)

    def _scenes(self, frames: Tensor) -> list[tuple[int, int]]:
        alike = matched_cosines(frames[:-1], frames[1:])
        cuts = highest_of_each(-alike, self.segments - 1) | (alike < self.tau)
        ends = [t + 1 for t, cut in enumerate(cuts.tolist()) if cut or self.stride == 1]
        return list(pairwise([0, *ends, len(frames)]))

    def _anchors(self, scenes: list[tuple[int, int]], context: int, size: int, total: int | None) -> list[int]:
        """How many each frame should have: ``total`` together, or of each scene what rounding down leaves."""
        lengths = [(b - a) * size for a, b in scenes]
        found: list[int] = []
        for (a, b), length, own in zip(scenes, lengths, apportioned(total or 0, lengths), strict=True):
            holders = [t for t in range(a, b) if (b - 1 - t) % self.stride == 0]
            even = iter(apportioned(own, [length] * len(holders)))
            rounded = context * (b - a) // len(holders)
            found += [0 if t not in holders else next(even) if total is not None else rounded for t in range(a, b)]
        return found
