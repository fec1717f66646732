"""What happens in one run of a vision tower whose pictures share a row: which units left, and what that cuts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.tokens import Layout


@dataclass
class Row:
    """One run of a tower in which the patches of all pictures stand in one row, unit by unit.

    A unit is what becomes a token: consecutive patches, which leave together. Units need not stand in the order of
    tokens (Qwen2.5-VL puts them window by window), but those of a picture stand together.

    Attributes:
        unit: patches of a unit.
        layouts: of the pictures, a token for each unit.
        place: LongTensor [U], the unit of the row that becomes each token, picture after picture.
        counts: units of each picture that are there (host integers).
        there: LongTensor [M], the units that are there, ascending; ``None``: all.
        history: ``there`` after each stage.
        entered: how many there were before a method's first stage, by the identity of the method.
    """

    unit: int
    layouts: tuple[Layout, ...]
    place: Tensor
    counts: tuple[int, ...]
    there: Tensor | None = None
    history: list[Tensor] = field(default_factory=list)
    entered: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _cut: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Of all pictures, whether they are there or not."""
        return len(self.place)

    # -- to and from the method -----------------------------------------------------------------------------------

    def per_picture(self, values: Tensor) -> Tensor:
        """Means over units of patches that are there [M * unit, ...], as the method sees them: [P, N, ...].

        0 where units left, and behind the end of a picture.
        """
        means = _spread(values.float().unflatten(0, (-1, self.unit)).mean(1), self.there, self.units)
        return self._padded(means[self.place.to(means.device)])

    def of_tokens(self, values: Tensor) -> Tensor:
        """Values of all patches in the order of tokens [T, c], a token's side by side: [P, N, unit * c]."""
        return self._padded(values.unflatten(0, (-1, self.unit)).flatten(1))

    def alive(self) -> Tensor:
        """Bool [P, N], True at the units that are there."""
        there = self.place.new_ones(self.units) if self.there is None else self._marks(self.there)
        return self._padded(there[self.place]).bool()

    def _padded(self, tokens: Tensor) -> Tensor:
        """Tokens [U, ...] picture by picture: [P, N, ...]."""
        lengths = [layout.length for layout in self.layouts]
        return nn.utils.rnn.pad_sequence(list(tokens.split(lengths)), batch_first=True)

    def keep(self, mask: Tensor, counts: Sequence[int]) -> Tensor:
        """Let all others leave.

        Args:
            mask: bool [P, N], True at the units that stay.
            counts: how many those are of each picture.

        Returns:
            LongTensor [K * unit], the rows that stay among those that were there.
        """
        width = mask.shape[1]
        ends = [range(p * width, p * width + layout.length) for p, layout in enumerate(self.layouts)]
        device = self.place.device
        tokens = torch.tensor([*itertools.chain(*ends)]).to(device, non_blocking=True)
        mask = mask.to(device)
        marks = torch.zeros_like(self.place, dtype=torch.bool).scatter(0, self.place, mask.flatten()[tokens])
        marks = marks if self.there is None else marks[self.there]
        stays = (~marks).to(torch.int8).argsort(stable=True)[: sum(counts)]
        self.there = stays if self.there is None else self.there[stays]
        self.counts = tuple(counts)
        self.history.append(self.there)
        self._cut = {}
        return self.patches(stays)

    def patches(self, units: Tensor) -> Tensor:
        """LongTensor [K * unit], the rows of units [K]."""
        return (units[:, None] * self.unit + torch.arange(self.unit, device=units.device)).flatten()

    # -- for blocks behind a stage --------------------------------------------------------------------------------

    def rotary(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cos and sin [T, r] of all rows, for those that are there; made once for all blocks."""
        assert self.there is not None
        there = self.there
        return self._once(given, lambda: tuple(x[self.patches(there).to(x.device)] for x in given))

    def ends(self, given: Tensor) -> tuple[Tensor, int]:
        """Where sequences end, [n + 1], for the rows that are there; and how long the longest is. Made once.

        Sequences of which nothing is left are no sequences any more.
        """
        return self._once(given, lambda: self._ends(given))

    def _ends(self, given: Tensor) -> tuple[Tensor, int]:
        assert self.there is not None
        before = nn.functional.pad(self._marks(self.there).cumsum(0), (1, 0)) * self.unit
        ends = before[given.to(before.device) // self.unit].to(given)
        if len(given) - 1 == len(self.counts) and min(self.counts) > 0:  # a sequence a picture
            return ends, max(self.counts) * self.unit
        # How many units a window or a frame keeps, and whether any, only the content tells. So this waits for the
        # device: once a stage for windows, and once for the frames of videos. (Unless it attends by flash attention,
        # the tower itself waits in every block, to cut its row.)
        host = [0, *(b for a, b in itertools.pairwise(ends.tolist()) if b > a)]
        longest = max((b - a for a, b in itertools.pairwise(host)), default=0)
        return torch.tensor(host, dtype=given.dtype).to(given.device, non_blocking=True), longest

    def _once(self, given: Any, make: Any) -> Any:
        """What a stage makes of something that the tower hands to every block: the very same object."""
        if id(given) not in self._cut:
            self._cut[id(given)] = given, make()  # held, so that nothing else gets its identity
        return self._cut[id(given)][1]

    # -- behind ---------------------------------------------------------------------------------------------------

    def spread(self, values: Tensor) -> Tensor:
        """Values [1, M * unit, ...] of the patches that are there, at their places [1, T, ...]; 0 elsewhere."""
        if self.there is None or values.shape[1] == self.units * self.unit:
            return values
        return _spread(values[0], self.patches(self.there), self.units * self.unit)[None]

    def merged(self, tokens: Tensor) -> Tensor:
        """Merged units [M, d] that are there, at their places [U, d]; 0 elsewhere."""
        return _spread(tokens, self.there, self.units)

    def whole(self, state: Tensor) -> Tensor:
        """A state [M * unit, width] after any stage, or of merged units [M, d], with all places; 0 elsewhere."""
        for there in self.history:
            if len(state) == len(there) * self.unit:
                return _spread(state, self.patches(there), self.units * self.unit)
        return self.merged(state) if self.there is not None and len(state) == len(self.there) else state

    def gone(self) -> Tensor:
        """Float [1, T], 1 at the patches that left."""
        assert self.there is not None
        return (1.0 - self._marks(self.there).float()).repeat_interleave(self.unit)[None]

    def _marks(self, there: Tensor) -> Tensor:
        """LongTensor [U], 1 at these units."""
        return torch.zeros_like(self.place).scatter(0, there, 1)


def _spread(rows: Tensor, where: Tensor | None, length: int) -> Tensor:
    """Rows [K, ...] at ``where`` [K] of [length, ...]; ``None``: everywhere."""
    if where is None or len(rows) == length:
        return rows
    return rows.new_zeros(length, *rows.shape[1:]).index_copy(0, where.to(rows.device), rows)
