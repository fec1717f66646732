"""How much the vision tower looks at a token: the CLS row where there is a CLS token, else what a patch receives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.methods.base import Method, ModelFacts, highest
from vtc.methods.options import option
from vtc.signals import Cls, Received, TowerSignal
from vtc.tokens import VisualTokens
from vtc.values import one_of

Saliency = Literal["cls", "received"]
KINDS: dict[Saliency, type[TowerSignal]] = {"cls": Cls, "received": Received}


@dataclass(frozen=True, kw_only=True)
class Salient(Method):
    """Base of the methods that ask what the vision tower looks at.

    Attributes:
        saliency: ``cls``: attention that the tower's CLS token pays; ``received``: attention that a patch gets from all
            of them, which towers without a CLS token (Qwen-VL, SigLIP) have too. ``None``: what the method was
            published with, where the model gives it, else the other.
    """

    saliency: Saliency | None = option(None, one_of, None, *KINDS)

    published: ClassVar[Saliency] = "cls"

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses the saliency, if that was left open."""
        if self.saliency is not None:
            return self
        given = [kind for kind in (self.published, *KINDS) if kind in facts.signals]
        return replace(self, saliency=given[0] if given else self.published)

    @property
    def looks(self) -> Saliency:
        """The saliency; before it is settled, the published one."""
        return self.saliency or self.published

    def salience(self, layer: float | None = None, suffix: str = "") -> TowerSignal:
        """The signal to ask for.

        Args:
            layer: of the tower, an int or a share of its depth; default: the one before the last, which LLaVA takes
                its features from and papers read a CLS row in; for ``received`` the last, as papers do with towers
                that have no CLS token.
            suffix: of its name, for a second one at a stage: ``cls_shallow``.
        """
        at = {"cls": -2, "received": -1}[self.looks] if layer is None else layer
        return KINDS[self.looks](layer=at, name=f"{self.looks}_{suffix}" if suffix else "")

    def scores(self, tokens: VisualTokens, suffix: str = "") -> Tensor:
        """What it gave: [G, N], float32 or better, finite."""
        given = tokens.signals[f"{self.looks}_{suffix}" if suffix else self.looks].detach()
        return given.to(torch.promote_types(given.dtype, torch.float32)).nan_to_num()


def tiered(tier: Tensor, scores: Tensor, k: int) -> Tensor:
    """LongTensor [G, k]: the highest tiers first, the highest scores within a tier, ties by lowest index.

    Args:
        tier: whole numbers [G, N].
        scores: float [G, N].
        k: how many.
    """
    order = highest(scores, scores.shape[1])
    return order.gather(1, highest(tier.gather(1, order), k))


def highest_of_groups(scores: Tensor, group: Tensor, quota: Tensor) -> Tensor:
    """Bool [G, N]: True at the ``quota`` highest of each group, ties by lowest index.

    Args:
        scores: float [G, N].
        group: LongTensor [G, N], in [0, P]; P belongs to none.
        quota: LongTensor [G, P].
    """
    order = highest(scores, scores.shape[1])
    order = order.gather(1, group.gather(1, order).sort(dim=1, stable=True).indices)  # group by group
    group = group.gather(1, order)
    sizes = quota.new_zeros(len(quota), quota.shape[1] + 1).scatter_add(1, group, torch.ones_like(group))
    rank = torch.arange(group.shape[1], device=group.device) - (sizes.cumsum(1) - sizes).gather(1, group)
    wanted = torch.nn.functional.pad(quota, (0, 1)).gather(1, group)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, rank < wanted)
