"""ToMe: token merging, your ViT but faster (ICLR 2023, arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtc.budget import Keep, count
from vtc.methods.base import ANY_MODEL, Method, ModelFacts, Paper, Reduction, Stage
from vtc.methods.blocks import InBlocks, rising
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.ops import cosines, first_max, gathered
from vtc.ops.merging import ENTRIES
from vtc.places import Tower
from vtc.signals import TowerKeys
from vtc.tokens import VisualTokens, column
from vtc.values import flag


@register_method
@dataclass(frozen=True, kw_only=True)
class ToMe(InBlocks):
    """Merge the most similar patches, equally many in front of every block of the vision tower.

    1. Of the patches that are there, those at even places are A, the others B. Each of A has an edge to its most
       similar one of B: cosine of keys, averaged over heads. The CLS token takes no part.
    2. The r best edges merge: the one of B becomes the mean of all that meet there, each weighed by the number of
       patches it stands for. It keeps its place; those of A leave theirs, also in the prompt.
    3. ``proportional``: in all later blocks, log(number of patches) is added to the logits of a key.

    The paper merges between attention and MLP of a block, with the keys of that attention. Here tokens merge in front
    of the next block, with the keys of the block that just ran: none merge in front of the first. The paper counts
    CLS, at place 0, among A, so that its even patches are our odd ones; its output is not in raster order, ours is.

    r is the same everywhere, with what cannot be shared out evenly in the first blocks, so that ``keep`` of the patches
    are left behind the last. A step merges half of them at most; where more have to go (a small ``keep``, few blocks),
    more steps follow at once, with the means of keys. The paper would keep more instead.

    In the language model, ``calibration="size"`` weighs them too. CLS rows that another method reads are without
    logarithms.

    Attributes:
        keep: of the patches of each picture, behind the tower.
        blocks: in front of which to merge, counted from 0, at least 1, or shares of the depth that the language model
            gets to see; ``None``: all of that but the first.
        proportional: add the logarithms; that takes an attention that adds masks (``sdpa``, ``eager``).
    """

    keep: Keep = 0.25
    blocks: tuple[float, ...] | None = option(None, rising)
    proportional: bool = option(True, flag)

    name: ClassVar[str] = "tome"
    paper: ClassVar[Paper] = Paper("Token Merging: Your ViT But Faster", "ICLR", 2023, "2210.09461")
    merges: ClassVar[bool] = True

    def settle(self, facts: ModelFacts) -> Method:
        """Names the blocks."""
        if self.blocks is None and facts.tower_depth < ANY_MODEL.tower_depth:
            return replace(self, blocks=tuple(range(1, max(2, facts.tower_depth))))
        return replace(self, blocks=self.places(facts))

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """One in front of each block; before it is known how many there are, one."""
        return tuple(
            Stage(Tower(block, restore=False, proportional=self.proportional), (TowerKeys(layer=block - 1),))
            for block in self.places(model) or (1,)
        )

    def quota(self, n: int, stage: Stage) -> int:
        """What remains of the division goes first."""
        each, more = divmod(n - count(self.keep, n), self.steps)
        return n - self.passed(stage) * each - min(self.passed(stage), more)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """As many steps as it takes: one as a rule."""
        assert budget is not None
        there, x, counts = tokens.mask, tokens.features.detach(), tokens.counts
        size = torch.ones_like(there, dtype=torch.double) if tokens.size is None else tokens.size.double()
        rows = torch.cat([x.double(), tokens.signals["keys"].double(), torch.ones_like(size)[..., None]], -1)
        rows = (rows * size[..., None]).masked_fill(~there[..., None], 0.0)
        place = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, : max([0, *counts])]  # ascending, then others
        rows = _at(rows, place)
        while counts != budget:
            left = tuple(max(k, n - n // 2) for k, n in zip(budget, counts, strict=True))
            rows, stays = _merged(rows, x.shape[-1], counts, left)
            place, rows, counts = place.gather(1, stays), _at(rows, stays), left
        features = rows[..., : x.shape[-1]] / rows[..., -1:]
        return Reduction(place, features.to(x), size=rows[..., -1].float(), ordered=False)


def _merged(rows: Tensor, width: int, counts: tuple[int, ...], left: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One step from ``counts`` rows to ``left``, at least half of them: new sums, and which stay: LongTensor [G, K].

    Rows are float64 [G, M, width + dh + 1]: sums of features and of keys, and how many; those that are there first.
    """
    real = torch.arange(rows.shape[1], device=rows.device) < column(counts, rows.device)
    metric = rows[..., width:-1] / rows[..., -1:].clamp(min=1)
    some = max(1, 4 * ENTRIES // rows.shape[1] ** 2)  # images at a time
    parts = zip(metric.split(some), real.split(some), strict=True)
    like = [cosines(z[:, ::2], z[:, 1::2]).masked_fill(~there[:, None, 1::2], -torch.inf) for z, there in parts]
    best, to = (torch.cat([f(part) for part in like]) for f in (lambda x: x.amax(-1), first_max))
    rank = best.masked_fill(~real[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    leaves = rank < column([n - k for n, k in zip(counts, left, strict=True)], rows.device)
    targets = rows.shape[1] // 2
    group = to.masked_fill(~leaves, targets)
    parts = zip(rows[:, ::2].split(some), group.split(some), strict=True)
    rows, stays = rows.clone(), real.clone()
    rows[:, 1::2] += torch.cat([gathered(values, joins, targets)[0] for values, joins in parts])
    stays[:, ::2] &= ~leaves
    return rows, (~stays).to(torch.int8).argsort(dim=1, stable=True)[:, : max(left)]


def _at(rows: Tensor, place: Tensor) -> Tensor:
    """Rows [G, N, c] at LongTensor [G, K]."""
    return rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))
