"""Methods with stages in front of several blocks of the vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vtc.methods.base import Method, ModelFacts, Stage
from vtc.signals.base import tower_layer
from vtc.tokens import Layout
from vtc.values import shown, whole

RULE = "blocks of the vision tower, rising: ints from 1, or floats that are shares of its depth"


@dataclass(frozen=True, kw_only=True)
class InBlocks(Method):
    """Base of methods that merge several times in the tower, where a patch is a token. ``keep`` is what is left last.

    Attributes:
        blocks: in front of which.
    """

    blocks: tuple[float, ...] | None = None

    @property
    def steps(self) -> int:
        """How many stages there are; one where that is not known yet."""
        return 1 if self.blocks is None else len(self.blocks)

    def places(self, facts: ModelFacts) -> tuple[int, ...] | None:
        """The blocks as numbers: rising, shares rounded to blocks that save something."""
        if self.blocks is None:
            return None
        last = max(1, facts.tower_depth - 1)
        found = (b if isinstance(b, int) else min(max(1, round(b * facts.tower_depth)), last) for b in self.blocks)
        return tuple(sorted(set(found)))

    def passed(self, stage: Stage) -> int:
        """How many of them are over behind a stage."""
        return self.steps if stage.number < 0 else stage.number + 1

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Of pictures in the tower; ``None`` behind it where crops lose padding in between."""
        behind = stage is None and any(len(layout.segments) > 1 for layout in layouts)
        return None if behind else super().counts(layouts, stage, given)

    @property
    def remedy(self) -> str:
        """What merges behind it, or drops there."""
        return (
            "vtc.Merge(vtc.DivPrune()), which merges behind the tower; where patches may leave in it, "
            'vtc.InTower(rule="received"), which drops them'
        )


def rising(name: str, given: Any) -> tuple[float, ...]:
    """Blocks as they were given, as a tuple.

    Raises:
        TypeError: no numbers, or no list of them.
        ValueError: none, out of bounds, or not rising.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}={shown(given)} must be a tuple of {RULE}")
    found = tuple(_block(name, each) for each in given)
    if not found or any(type(a) is type(b) and a >= b for a, b in pairwise(found)):
        raise ValueError(f"{name}={shown(given)} must be {RULE}")
    return found


def _block(name: str, given: Any) -> float:
    found = tower_layer(name, given)
    return whole(name, found, RULE, least=1) if isinstance(found, int) else found
