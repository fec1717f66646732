"""Schedules: what methods share that drop tokens in several steps inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vtc import values
from vtc.budget import Keep, share, truncated
from vtc.methods.base import Method, Stage
from vtc.methods.options import check_options
from vtc.values import shown, whole

OF = 32
"""Layers of the models that published schedules are for."""


@dataclass(frozen=True, kw_only=True)
class Scheduled(Method):
    """Base of the methods with several stages between layers.

    In a model of L layers, a stage after layer p of 32 comes after layer round(pL/32); stages that would meet are moved
    apart. ``keep`` is the share that is left after the last stage; another one than the last of the ratios bends them
    all in proportion: stage s keeps ``1 - (1 - ratio_s) * (1 - keep) / (1 - ratio_last)`` of the tokens that the method
    was given. Counts are cut to integers, at least 1.

    Attributes:
        keep: share of the tokens after the last stage, or their number; ``None``: the last ratio.
        layers: how many layers run before each stage; ``None``: the published ones, scaled to the model's depth.
        ratios: the share of the tokens given that each stage keeps when ``keep`` is the last of them; ``None``: the
            published ones.
    """

    keep: Keep | None = None  # type: ignore[assignment]
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    published: ClassVar[tuple[int, ...]]
    """After how many layers of 32 its stages come."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.ratios is not None:
            object.__setattr__(self, "ratios", entries("ratios", self.ratios, values.share, "shares in (0, 1]"))
        if self.layers is not None:
            object.__setattr__(self, "layers", entries("layers", self.layers, whole, "layer numbers, counted from 1"))
        self._check_schedule()
        if self.keep is None:
            object.__setattr__(self, "keep", self.shares[-1])
        super().__post_init__()

    @property
    def shares(self) -> tuple[float, ...]:
        """The ratios, or the published ones."""
        assert self.ratios is not None
        return self.ratios

    def _check_schedule(self) -> None:
        layers, ratios = self.layers, self.shares
        if not ratios or not all(ratios) or ratios[-1] == 1:
            raise ValueError(f"ratios={shown(ratios)} must be shares in (0, 1], one for each stage, the last below 1")
        if any(b > a for a, b in pairwise(ratios)):
            raise ValueError(
                f"ratios={shown(ratios)} grow: dropped tokens cannot come back; give them in falling order"
            )
        if layers is None and len(ratios) != len(self.published):
            raise ValueError(
                f"ratios={shown(ratios)} are not for the {len(self.published)} published stages, after layers "
                f"{self.published}; give layers"
            )
        if layers is not None:
            if len(layers) != len(ratios):
                raise ValueError(
                    f"layers={shown(layers)} and ratios={shown(ratios)} must have one entry for each stage"
                )
            if layers[0] < 1 or any(b <= a for a, b in pairwise(layers)):
                raise ValueError(f"layers={shown(layers)} must be rising layer numbers, counted from 1")

    def places(self, depth: int) -> tuple[int, ...]:
        """After how many layers each stage comes in a model of ``depth``.

        Raises:
            ValueError: the schedule does not fit.
        """
        if self.layers is None:
            if depth <= len(self.published):
                raise ValueError(
                    f"{self.name} has {len(self.published)} stages, and a language model of {depth} layers has room "
                    f"for {depth - 1}; give layers and ratios of your own, such as "
                    f"vtc.{type(self).__name__}(layers=(1,), ratios=(0.25,))"
                )
            return scaled(self.published, depth)
        if self.layers[-1] >= depth:
            raise ValueError(
                f"layers={shown(self.layers)}: after layer {self.layers[-1]} nothing is left of this model's {depth} "
                f"layers to save; stages must come after layers 1 to {depth - 1}"
            )
        return self.layers

    def quota(self, n: int, stage: Stage) -> int:
        """The share of a stage, cut to an integer, at least 1."""
        return max(min(1, n), truncated(self.ratio(stage.number, n), n))

    def ratio(self, index: int, given: int) -> float:
        """The ratio of a stage, bent so that the last one is ``keep``."""
        ratios = self.shares
        return 1.0 - (1.0 - ratios[index]) * (1.0 - share(self.keep or 0.0, given)) / (1.0 - ratios[-1])


def scaled(published: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Layers of 32 in a model with ``depth`` layers, more than there are stages: rounded half up, rising, below it."""
    layers: list[int] = []
    for at, place in enumerate(published):
        place = (2 * place * depth + OF) // (2 * OF)
        layers.append(min(max(place, at + 1, layers[-1] + 1 if layers else 1), depth - len(published) + at))
    return tuple(layers)


def entries(name: str, given: Any, each: Callable[..., Any], what: str) -> tuple[Any, ...]:
    """What was given for each stage, as a tuple; ``each`` checks one and ``what`` says what they are.

    Raises:
        TypeError: not several, or of another kind.
        ValueError: as ``each`` says.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}={shown(given)} must be a tuple of {what}, one for each stage")
    found = tuple(given)
    return tuple(each(name, entry, f"{name}={shown(found)} must be {what}, one for each stage") for entry in found)
