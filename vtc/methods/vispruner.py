"""VisPruner: exploiting visual cues for effective token pruning in VLMs (ICCV 2025, arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import truncated
from vtc.methods.base import ModelFacts, Paper, Reduction, Stage, first_of, highest, marked
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient
from vtc.methods.scope import ENTRIES
from vtc.places import Entry
from vtc.tokens import VisualTokens, column
from vtc.values import flag, share

AT_ONCE = 8


@register_method
@dataclass(frozen=True, kw_only=True)
class VisPruner(Salient):
    """Keep the tokens that the vision tower looks at most, and of the others those that are not alike.

    1. Important: a share of the budget goes to the highest CLS attention, in the layer that LLaVA takes its features
       from. A tower without a CLS token: to the highest attention received, in its last layer.
    2. Diverse: of the others, every other one may leave; the up to 8 that are most similar (cosine) to one that may
       not leave do. Again, with those that are left, until the budget is met.

    The released code keeps the others by falling attention, and those that may leave by falling similarity each time
    (``released=True``); the port in AngelSlim keeps raster order, as here; they share 9 of 16 recorded tokens. The code
    stops with an error where the others are odd in number; here one more of them may leave. It compares hidden states
    before the projector; here it is the embeddings that enter the language model. It gives every crop of LLaVA-NeXT the
    same number of tokens and drops newlines; here an image has one budget (``vtc.Allocate`` divides it), and newlines,
    which nothing looks at, leave as the duplicates that they are. It renumbers positions: ``positions="compact"``.

    Who leaves decides who may leave next: in 5 of 15 recorded runs the code in float32 keeps 10 to 38 other tokens than
    in float64. Here cosines are exact to about 2**-26, those of float64 features to about 2**-44, whatever the batch.

    Headline: LLaVA-1.5-7B keeps 97.5, 96.3 and 92.8 % of its accuracy with 192, 128 and 64 tokens (a re-run by others).

    Attributes:
        important: the share of the budget for step 1, in [0, 1]; cut to an integer.
        released: the order of the released code.
    """

    important: float = option(0.5, share, "it must lie in [0, 1]")
    released: bool = option(False, flag)

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[Paper] = Paper(
        "Beyond text-visual attention: exploiting visual cues for effective token pruning in VLMs",
        "ICCV",
        2025,
        "2412.01818",
    )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=(self.salience(),)),)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Both steps. They are not nested, and have no order."""
        assert budget is not None
        mask, n = tokens.mask, tokens.mask.shape[1]
        important = tuple(truncated(self.important, k) for k in budget)
        order = highest(self.scores(tokens).masked_fill(~mask, -torch.inf), n)
        keeps = first_of(order, important, n)
        others = mask & ~keeps
        rest = order.masked_fill(~others.gather(1, order), n)
        features = tokens.features.detach()
        left = [have - k for have, k in zip(tokens.counts, important, strict=True)]
        wanted = [k - i for k, i in zip(budget, important, strict=True)]
        size = max(1, ENTRIES // max(1, n * n))
        for at in range(0, len(budget), size):
            of = slice(at, at + size)
            keeps[of] |= marked(self._diverse(features[of], rest[of], left[of], wanted[of]), n)
        return Reduction.of_mask(keeps, budget)

    def _diverse(self, features: Tensor, rest: Tensor, left: list[int], wanted: list[int]) -> Tensor:
        """Step 2: of LongTensor ``rest`` [G, M], ``left`` of each row and then N for none, the ``wanted`` that stay."""
        none = features.shape[1]
        like = fine_cosines(features) if features.dtype == torch.float64 else ops.cosines(features)
        images = torch.arange(len(like), device=like.device)[:, None, None]
        rest = self._compact(rest, none, left)
        while any(n > k > 0 for n, k in zip(left, wanted, strict=True)):
            leaves = [max(0, min(AT_ONCE, n // 2, n - k)) for n, k in zip(left, wanted, strict=True)]
            a, b = rest[:, ::2], rest[:, 1::2]
            pairs = like[images, a[..., None].clamp(max=none - 1), b[:, None].clamp(max=none - 1)]
            closest = pairs.masked_fill((b == none)[:, None], -torch.inf).amax(-1).masked_fill(a == none, -torch.inf)
            a = a.gather(1, highest(closest, a.shape[1]))
            gone = torch.arange(a.shape[1], device=a.device) < column(leaves, a.device)
            left = [n - d for n, d in zip(left, leaves, strict=True)]
            rest = self._compact(torch.cat([a.masked_fill(gone, none), b], 1), none, left)
        return rest.masked_fill(column([k == 0 for k in wanted], rest.device) > 0, none)

    def _compact(self, rest: Tensor, none: int, left: list[int]) -> Tensor:
        """Those that stay, in front: as they stand, or in raster order."""
        order = (rest == none).to(torch.int8) if self.released else rest
        return rest.gather(1, order.sort(dim=1, stable=True).indices)[:, : max(left)]


def fine_cosines(rows: Tensor) -> Tensor:
    """As :func:`vtc.ops.cosines`, of float64 rows in two digits: sums of whole numbers below 2**53 are exact."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    z = torch.where(torch.isfinite(length) & (length > 0), rows / length, 0.0) * 2.0**26
    coarse = z.round()
    fine = ((z - coarse) * 2.0**20).round()
    return coarse @ coarse.mT * 2.0**-52 + (coarse @ fine.mT + fine @ coarse.mT) * 2.0**-72
