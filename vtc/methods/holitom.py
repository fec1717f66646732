"""HoliTom: holistic token merging for fast video large language models (NeurIPS 2025, arXiv 2505.21334)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.budget import apportioned
from vtc.methods.base import Paper, Reduction
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Saliency
from vtc.methods.video import Cut, Melting, Video
from vtc.ops import density_peaks, gathered, nearest, squared_distances
from vtc.ops.frames import highest_of_each, matched_cosines, still_windows
from vtc.values import number, share, whole


@register_method
@dataclass(frozen=True, kw_only=True)
class HoliTom(Melting):
    """Merge over time what stands still, then merge that over space; of the rest keep what is looked at (outer part).

    1. A place stands still from a frame to the next if the cosine is above ``tau``. Windows of at most ``window``
       frames are chosen so that as many tokens as possible are saved (dynamic programming): a place is static if it
       stands still in its whole window, and needs one token instead of one for each frame.
    2. What this saves is given back: the share of all others grows from ``keep`` to keep * N / (N - saved).
    3. Dynamic tokens: of each frame the share most looked at stays, unchanged.
    4. Static tokens, each the mean of its window: the share with the highest density peaks are centres; the others go
       to the nearest (Euclidean). A centre becomes ``beta`` of itself and 1 - beta of the mean of the others.

    Static tokens stand in their window's first frame; the released code puts them in front of the window, and
    renumbers (``positions="compact"``). Its option D, a second kind of dynamic tokens, cannot run and is left out, as
    is random noise on densities, and that a second video takes over the first one's share. The part inside the
    language model (drop half of the tokens at layer 18) is not part of this. A float ``keep`` counts as released:
    dynamic tokens of a frame are rounded up, static ones to the nearest: 650 for 627.2. An integer is exact, in
    proportion to what there is, by largest remainder; where more is asked for than there is after step 1, the most
    looked at of what would have been merged stay as well. The host waits once, for what stands still.

    Published: LLaVA-OneVision, ``keep=0.1, tau=0.65`` to ``keep=0.25``.
    Headline: LLaVA-OneVision-7B with 6.9 % of the FLOPs keeps 99.1 % of its score, inner part included.

    Attributes:
        tau: cosine above which a place stands still.
        beta: weight of a centre itself; ``None``: it becomes the plain mean.
        neighbors: of the density peaks, at most as many as there are centres.
        window: frames of a window at most.
    """

    tau: float = option(0.8, number, "it is a cosine")
    beta: float | None = option(0.6, share, "it is a share, in [0, 1], or None")
    neighbors: int = option(7, whole, "it counts, from 1", least=1)
    window: int = option(1024, whole, "it counts, from 1", least=1)

    name: ClassVar[str] = "holitom"
    paper: ClassVar[Paper] = Paper(
        "HoliTom: Holistic Token Merging for Fast Video Large Language Models", "NeurIPS", 2025, "2505.21334"
    )
    published: ClassVar[Saliency] = "received"

    def cut(self, video: Video, k: int | None) -> Cut:
        """Steps 1 to 4."""
        x, looked, (frames, size) = video.x, video.scores(self.looks), video.x.shape[:2]
        windows, static = still_windows((matched_cosines(x[:-1], x[1:]) > self.tau).cpu(), self.window)
        spans = [b - a for a, b in windows]
        dynamic = [n for row, span in zip(static, spans, strict=True) for n in [size - int(row.sum())] * span]
        centres, dynamic, more = self._budgets([int(row.sum()) for row in static], dynamic, frames * size, k)
        static = static.to(x.device, non_blocking=True)
        later = torch.cat([row.expand(span, -1) for row, span in zip(static, spans, strict=True)])
        moving = looked.masked_fill(later, -torch.inf)
        keeps = highest_of_each(moving, torch.tensor(dynamic).to(x.device, non_blocking=True))
        later = later.index_fill(0, torch.tensor([a for a, _ in windows]).to(x.device, non_blocking=True), False)
        again = looked.masked_fill(~later, -torch.inf).flatten()
        keeps |= highest_of_each(again, more).view_as(keeps)
        held, values, sizes = keeps.clone(), x.to(torch.float64, copy=True), torch.ones_like(looked)
        for (a, b), m, still in zip(windows, centres, static, strict=True):
            if m:
                weight = (~keeps[a:b]).double()  # what stays by itself is in no mean
                heavy = weight.sum(0).clamp(min=1.0)[:, None]
                mean = (x[a:b] * weight[..., None]).sum(0) / heavy
                gaps = squared_distances(mean, still)
                peaks = density_peaks(gaps / x.shape[-1], still, min(self.neighbors, m))
                centre = highest_of_each(peaks, m)
                at = Reduction.of_mask(centre[None], (m,)).index
                joins = nearest(-gaps[None, :, at[0]], (still & ~centre)[None], torch.ones_like(at, dtype=torch.bool))
                total, others = (part[0] for part in gathered(torch.cat([mean, heavy], 1)[None], joins, m))
                own, others = mean[at[0]], others[:, None]
                beta = 1.0 / (others + 1.0) if self.beta is None else self.beta
                theirs = torch.where(others > 0, total[:, :-1] / others.clamp(min=1.0), own)
                values[a] = values[a].index_copy(0, at[0], beta * own + (1.0 - beta) * theirs)
                sizes[a] = sizes[a].index_copy(0, at[0], (heavy[at[0], 0] + total[:, -1]).float())
                held[a] = held[a] | centre
        return Cut(held, sum(centres) + sum(dynamic) + more, values, sizes)

    def _budgets(
        self, static: list[int], dynamic: list[int], n: int, k: int | None
    ) -> tuple[list[int], list[int], int]:
        """Of each window's static tokens, of each frame's dynamic ones, and of those that would have been merged."""
        left = sum(static) + sum(dynamic)
        if k is None:
            part = min(float(self.keep) / (left / n), 1.0)
            return [min(s, max(1, round(s * part))) for s in static], [math.ceil(s * part) for s in dynamic], 0
        found = apportioned(min(k, left), static + dynamic)
        return list(found[: len(static)]), list(found[len(static) :]), max(0, k - left)
