"""Hidden states on the way through the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import TowerSignal


@dataclass(frozen=True, kw_only=True)
class TowerFeatures(TowerSignal):
    """What a layer of the vision tower returns for a patch: [G, N, width]."""

    kind: ClassVar[str] = "tower_features"
    wide: ClassVar[bool] = True
    reads: ClassVar[Literal["input", "output"]] = "output"

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer."""
        return tower.layers[self.layer]

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """As it is."""
        return hidden[:, tower.special :].float()


@dataclass(frozen=True, kw_only=True)
class Left(TowerSignal):
    """1 for a patch that left inside the tower, else 0. The engine makes it (:mod:`vtc.engine.tower`)."""

    kind: ClassVar[str] = "left"

    def module(self, tower: Tower) -> nn.Module | None:
        """None: it is not read from one."""
        return None

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """Is not asked."""
        raise NotImplementedError


LEFT = Left()


@dataclass(frozen=True, kw_only=True)
class Size(Left):
    """How many patches one stands for where some merged inside the tower, 0 where one left. The engine makes it."""

    kind: ClassVar[str] = "size"


SIZE = Size()


@dataclass(frozen=True, kw_only=True)
class ProjectorInput(TowerSignal):
    """What enters the projector for a patch: [G, N, width]. The features at the place ``Projector()``."""

    kind: ClassVar[str] = "projector_input"
    wide: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The projector, where a patch becomes a token there."""
        return tower.projector

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """As it is; the special tokens are gone by then."""
        return hidden
