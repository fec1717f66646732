"""How much the vision tower looks at a token: the CLS row where there is a CLS token, else what a patch receives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from vtc.methods.base import Method, ModelFacts
from vtc.signals import Cls, Received, TowerSignal
from vtc.tokens import VisualTokens
from vtc.values import shown

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

    saliency: Saliency | None = None

    published: ClassVar[Saliency] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency not in (None, *KINDS):
            raise ValueError(f"saliency={shown(self.saliency)} is none of None, {', '.join(map(repr, KINDS))}")

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

    def salience(self, layer: int | None = None, suffix: str = "") -> TowerSignal:
        """The signal to ask for.

        Args:
            layer: of the tower; default: the one before the last, which LLaVA takes its features from and papers read
                a CLS row in; for ``received`` the last, as papers do with towers that have no CLS token.
            suffix: of its name, for a second one at a stage: ``cls_shallow``.
        """
        at = {"cls": -2, "received": -1}[self.looks] if layer is None else layer
        return KINDS[self.looks](layer=at, name=f"{self.looks}_{suffix}" if suffix else "")

    def scores(self, tokens: VisualTokens, suffix: str = "") -> Tensor:
        """What it gave: float32 [G, N], finite."""
        return tokens.signals[f"{self.looks}_{suffix}" if suffix else self.looks].detach().float().nan_to_num()
