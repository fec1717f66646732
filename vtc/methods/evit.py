"""EViT: not all patches are what you need, expediting vision transformers via token reorganizations (ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vtc.budget import Keep, count
from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage, highest
from vtc.methods.blocks import InBlocks, rising
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.places import Tower
from vtc.signals import Cls
from vtc.tokens import VisualTokens, column

PUBLISHED = (4 / 12, 7 / 12, 10 / 12)


@register_method
@dataclass(frozen=True, kw_only=True)
class EViT(InBlocks):
    """Keep what the CLS token looks at, and fuse the rest into one patch, three times in the vision tower.

    1. The CLS row of the block that just ran, mean over heads. All but one of the budget are its highest.
    2. The rest becomes one: their mean, weighed by that row. It stands at the place of the highest of the rest (the
       paper appends it behind all others) and counts in the budget; a later stage may keep it, or fuse it again.

    Published: .7 of the patches after 4, 7 and 10 of 12 blocks, with the fused one beside them. Here ``keep`` is what
    is left behind the last stage, and every stage keeps an equal share of what it gets. The paper acts between
    attention and MLP of those blocks, here it is in front of the next one. The paper's sum is not divided by what the
    weights sum up to: its models are trained with that, and towers of language models are not. Where no weight is
    above 0, all weigh the same.

    Attributes:
        keep: of the patches of each picture, behind the tower; .7 * .7 * .7 as published.
        blocks: in front of which, counted from 0, at least 1, or shares of the depth that the language model gets to
            see.
    """

    keep: Keep = 0.343
    blocks: tuple[float, ...] = option(PUBLISHED, rising)

    name: ClassVar[str] = "evit"
    paper: ClassVar[Paper] = Paper(
        "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        "ICLR",
        2022,
        "2202.07800",
    )
    merges: ClassVar[bool] = True

    def settle(self, facts: ModelFacts) -> Method:
        """Names the blocks."""
        return replace(self, blocks=self.places(facts) or PUBLISHED)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Each with the CLS row of the block in front of it."""
        return tuple(Stage(Tower(b, restore=False), (Cls(layer=b - 1),)) for b in self.places(model) or ())

    def quota(self, n: int, stage: Stage) -> int:
        """Equal powers of what is left in the end."""
        last = count(self.keep, n)
        over = self.passed(stage) / self.steps
        return last if over == 1 else max(last, round(n ** (1 - over) * last**over))

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """In the order of the row; the fused one last."""
        assert budget is not None
        there, x = tokens.mask, tokens.features.detach()
        cls = tokens.signals["cls"].double()
        order = highest(cls.masked_fill(~there, -torch.inf), max(budget))
        kept = torch.arange(order.shape[1], device=x.device) < column([k - 1 for k in budget], x.device)
        rest = there & ~torch.zeros_like(there).scatter(1, order, kept)
        size = torch.ones_like(cls) if tokens.size is None else tokens.size.double()

        weight = cls.masked_fill(~rest, 0.0)
        weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, rest.double())
        # what one patch alone fuses to is itself, in every bit
        total = (weight[:, None] @ x.double().masked_fill(~rest[..., None], 0.0)) / weight.sum(1)[:, None, None]
        features = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        features = torch.where(kept[..., None], features, total.to(x))
        size = torch.where(kept, size.gather(1, order), size.masked_fill(~rest, 0.0).sum(1, keepdim=True))
        return Reduction(order, features, size=size.float())
