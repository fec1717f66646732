"""Inside the vision tower: what methods share that let patches leave there, at once or in several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from vtc import values
from vtc.budget import Keep, share
from vtc.methods.base import Method, ModelFacts, Stage
from vtc.methods.options import option
from vtc.methods.schedule import entries
from vtc.places import Tower
from vtc.signals.base import tower_layer
from vtc.tokens import Layout
from vtc.values import flag, shown, whole


@dataclass(frozen=True, kw_only=True)
class InsideTower(Method):
    """Base of the methods whose stages are inside the vision tower.

    Attributes:
        restore: bring patches back behind the tower; ``None``: where a token is made of several.
    """

    restore: bool | None = option(None, flag)

    def settle(self, facts: ModelFacts) -> Method:
        """Says that patches come back where they do."""
        return replace(self, restore=True) if self.restore is None and facts.restores else self

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Of pictures in the tower, and behind it; ``None`` where crops lose padding in between."""
        if stage is not None and isinstance(stage.at, Tower):
            return super().counts(layouts, stage, given)
        if self.restore:
            return tuple(layout.length for layout in layouts)
        return super().counts(layouts) if all(len(layout.segments) == 1 for layout in layouts) else None

    @property
    def remedy(self) -> str:
        """What needs sums of attention, not maps."""
        return 'vtc.InTower(rule="received")'


@dataclass(frozen=True, kw_only=True)
class TowerSchedule(InsideTower):
    """Base of those with one stage or several.

    Attributes:
        keep: of the patches of each picture after the last stage; ``None``: the last ratio, or 0.25.
        after: how many blocks run before each stage, ints or shares of those that the language model gets to see;
            shares that meet in a tower are moved apart.
        ratios: of all patches, what each stage keeps when ``keep`` is the last of them, bent in proportion otherwise;
            ``None``: as many leave at each stage.
    """

    keep: Keep | None = None  # type: ignore[assignment]
    after: float | tuple[float, ...] = 1 / 3
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        after = one_or_each("after", self.after, _after, "blocks, counted from 1, or shares of the tower's depth")
        if not after or len(set(map(type, after))) > 1 or any(b <= a for a, b in pairwise(after)):
            raise ValueError(f"after={shown(self.after)} must rise, and be blocks or shares of the depth, not both")
        object.__setattr__(self, "after", after)
        if self.ratios is not None:
            self._check_ratios(len(after))
        if self.keep is None:
            object.__setattr__(self, "keep", self.ratios[-1] if self.ratios else 0.25)
        super().__post_init__()

    def _check_ratios(self, stages: int) -> None:
        ratios = entries("ratios", self.ratios, values.share, "shares in (0, 1]")
        if len(ratios) != stages:
            raise ValueError(f"ratios={shown(ratios)} must have one entry for each stage, after={shown(self.after)}")
        if not all(ratios) or ratios[-1] == 1 or any(b > a for a, b in pairwise(ratios)):
            raise ValueError(f"ratios={shown(ratios)} must be falling shares in (0, 1], the last below 1")
        object.__setattr__(self, "ratios", ratios)

    def spread(self, name: str, check: Callable[..., Any], what: str) -> None:
        """Make of an option, which is one value for all stages or one for each, a tuple with one for each."""
        given, stages = one_or_each(name, getattr(self, name), check, what), len(tuple_of(self.after))
        if len(given) not in (1, stages):
            raise ValueError(f"{name}={shown(given)} must be one value, or one for each stage, after={self.after}")
        object.__setattr__(self, name, given * (stages // len(given)))

    def blocks(self, facts: ModelFacts) -> tuple[int, ...]:
        """How many blocks run before each stage."""
        found: list[int] = []
        stages = tuple_of(self.after)
        for after in stages:
            first = block_of(after, facts, least=2 if len(stages) == 1 else 1)
            found.append(max(first, found[-1] + 1 if found else 1))
        return tuple(found)

    def quota(self, n: int, stage: Stage) -> int:
        """The share of a stage, bent so that the last one is ``keep``."""
        stages = len(tuple_of(self.after))
        number = range(stages)[stage.number]
        if number == stages - 1:
            return super().quota(n, stage)
        ratios = self.ratios
        gone = (number + 1) / stages if ratios is None else (1 - ratios[number]) / (1 - ratios[-1])
        return min(n, max(1, round(n * (1 - gone * (1 - share(self.keep or 0.0, n))))))


def block_of(after: float, facts: ModelFacts, least: int = 2) -> int:
    """How many blocks run before: as it was given, or a share of those that the language model gets to see.

    With a share it is at least two, where the tower has three: after one, nothing has been looked at twice.
    """
    if isinstance(after, int):
        return after
    return max(min(least, facts.tower_depth - 1), round(after * facts.tower_depth), 1)


def one_or_each(name: str, given: Any, each: Callable[..., Any], what: str) -> tuple[Any, ...]:
    """One value or several as a tuple, looked at as :func:`vtc.methods.schedule.entries` does."""
    return entries(name, tuple_of(given), each, what)


def tuple_of(given: Any) -> tuple[Any, ...]:
    """One value or several."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _after(name: str, given: Any, rule: str) -> float:
    found = tower_layer(name, given)
    return whole(name, found, rule, least=1) if isinstance(found, int) else found
