"""Where tokens may leave on the way from pixels to logits.

    pixels -> Tower(block) -> Projector() -> Entry() -> Layer(after) -> logits

Places compare in this order. A method names one for each of its stages; the engine knows what has to follow there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering
from typing import ClassVar


@total_ordering
@dataclass(frozen=True)
class Place:
    """Base of the places."""

    rank: ClassVar[int]

    @property
    def depth(self) -> int:
        """What orders places of one kind."""
        return 0

    @property
    def before_the_model(self) -> bool:
        """Whether what leaves here never enters the language model."""
        return self.rank < Layer.rank

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Place):
            return NotImplemented
        return (self.rank, self.depth) < (other.rank, other.depth)


@dataclass(frozen=True)
class Tower(Place):
    """Inside the vision tower: patches leave, and later blocks do not see them.

    In the Qwen-VL line and GLM-V what leaves are the patches of a token, and the token with them: nothing comes back.

    Attributes:
        block: how many blocks run before; 0: before the tower.
        restore: patches that left come back behind the tower, moved as their nearest neighbours among those that
            stayed, so that every token is there again; ``None``: only where a token is made of several patches that
            stand apart.
        proportional: what was merged here weighs as a key what it stands for: log(size) is added to the logits of
            attention, in every block behind.
    """

    block: int
    restore: bool | None = None
    proportional: bool = False
    rank: ClassVar[int] = 0

    @property
    def depth(self) -> int:
        """The block."""
        return self.block


@dataclass(frozen=True)
class Projector(Place):
    """Behind the vision tower: features as they enter the projector. New values go through it as the old ones did."""

    rank: ClassVar[int] = 1


@dataclass(frozen=True)
class Entry(Place):
    """Between projector and language model: features in its embedding space."""

    rank: ClassVar[int] = 2


@dataclass(frozen=True)
class Layer(Place):
    """Between two layers of the language model.

    Attributes:
        after: how many layers run before, at least 1 (papers count layers from 1: "after layer 7").
    """

    after: int
    rank: ClassVar[int] = 3

    @property
    def depth(self) -> int:
        """The layers before."""
        return self.after
