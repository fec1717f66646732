"""Stages inside the vision tower: patches leave between two of its blocks, and later blocks do not see them.

Behind the tower every place is there again, so that whoever drops CLS rows, pools, packs mosaics or counts placeholders
needs to know nothing. What stands in the places of those that left depends:

- *drop*: zeros, which are not projected. Which places those are travels the way of the features, and at the entrance
  of the language model they leave.
- *restore*: their state when they left, moved by the mean of what their nearest neighbours among the others became.
  They are tokens like any other. Where a token is made of several patches that stand apart, it is the only way.

Towers come in two kinds: a row for each picture (:mod:`vtc.engine.patches`), or one for all of them, in which the
patches of a token stand together and leave together (:mod:`vtc.engine.units`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from vtc.engine.patches import PatchStages
from vtc.engine.stages import Hook
from vtc.engine.units import UnitStages
from vtc.methods.stages import Step
from vtc.models import Adapter, Parts
from vtc.models.base import MODALITIES
from vtc.signals import TowerSignal


class TowerStages:
    """Hooks of a method's stages inside the vision towers of one model."""

    def __init__(
        self, adapter: Adapter, parts: Parts, steps: Sequence[Step], travelling: Sequence[TowerSignal]
    ) -> None:
        """Look.

        Args:
            adapter: of the family.
            parts: of the model.
            steps: inside the tower, in order.
            travelling: signals that are asked for behind the tower too.
        """
        self.adapter, self.parts, self.steps = adapter, parts, tuple(steps)
        own = {s for step in steps for s in step.stage.needs if isinstance(s, TowerSignal)}
        self.passing = tuple(own - set(travelling))
        """Signals that nobody asks for behind the tower."""

    def hooks(self) -> Iterator[Hook]:
        """Module, hook, and whether it comes before the module runs."""
        if not self.steps:
            return
        done: set[nn.Module] = set()
        for modality in MODALITIES:
            tower = self.adapter.tower(self.parts.base, modality)
            if tower is None or tower.module is None or tower.module in done:
                continue
            done.add(tower.module)
            kind = UnitStages if tower.packed else PatchStages
            yield from kind(self.adapter, self.parts, tower, self.steps, self.passing).hooks()
