"""Logical against physical length: what the caller believes the cache holds, and what it holds.

``generate`` counts every token of the prompt; after pruning the cache holds fewer. The difference lives on the cache
itself, so that it follows the generation through beams, turns and crops, and two generations never mix. The cache's
class is swapped for a subclass of its own class: the same object, the same tensors, ``isinstance`` as before. It
reports the *logical* length to whoever asks (``generate``, default positions) and the *physical* one to the masks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.dialect.caches import give_ledger, ledger_of
from vtc.engine.context import running_call
from vtc.engine.keys import Keys

if TYPE_CHECKING:
    from transformers import Cache


@dataclass
class SlotMap:
    """Which logical column each physical cache slot holds.

    Attributes:
        columns: LongTensor [B, P], logical column of each of the first P slots.
        valid: bool [B, P]; False where a row kept fewer tokens than the longest row (a hole, or a pad).
        logical: logical columns covered so far; later tokens are stored one to one.
        dropped: LongTensor [B], tokens dropped from each row so far, padding not counted.
        holes: whether any ``valid`` is False (known on the host, so that nobody waits for the device).
        keys: what calibrated attention knows of the keys, by layer type; it may know less or more than is stored.
    """

    columns: Tensor
    valid: Tensor
    logical: int
    dropped: Tensor
    holes: bool
    keys: dict[str | None, Keys] = field(default_factory=dict)

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> SlotMap:
        """Nothing stored yet."""
        none = torch.zeros(batch, 0, dtype=torch.long, device=device)
        return cls(none, none.bool(), 0, torch.zeros(batch, dtype=torch.long, device=device), False)

    @property
    def physical(self) -> int:
        """P, slots covered so far."""
        return self.columns.shape[1]

    @property
    def removed(self) -> int:
        """How much shorter the cache is than the caller believes."""
        return self.logical - self.physical

    def physical_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Translate a 2-D padding mask over logical columns into one over the ``length`` physical slots.

        ``None`` (nothing is padding) stays ``None`` unless there are holes.
        """
        if mask is None:
            if not self.holes:
                return None
            mask = self.valid.new_ones(self.valid.shape[0], length + self.removed)
        head = mask[:, : self.logical].gather(1, self.columns.to(mask.device))
        head = head * self.valid.to(device=mask.device, dtype=mask.dtype)
        return torch.cat([head, mask[:, self.logical :]], dim=1)

    def extend(self, slots: int, columns: Tensor, valid: Tensor, new: int, dropped: Tensor, holes: bool) -> None:
        """Append ``new`` logical tokens of which ``columns`` [B, M] (within them) were stored, at slot ``slots``."""
        batch, device = columns.shape[0], columns.device
        plain = torch.arange(self.logical, self.logical + slots - self.physical, device=device).expand(batch, -1)
        start = self.logical + plain.shape[1]
        self.columns = torch.cat([self.columns, plain, columns + start], dim=1)
        self.valid = torch.cat([self.valid, torch.ones_like(plain, dtype=torch.bool), valid], dim=1)
        self.logical = start + new
        self.dropped = self.dropped + dropped
        self.holes = self.holes or holes

    def ends_whole(self, count: int) -> bool:
        """Whether every row stored all of the last ``count`` columns (a host sync)."""
        last = torch.arange(self.logical - count, self.logical, device=self.columns.device)
        tail = self.columns[:, self.physical - count :]
        return count <= self.physical and bool(((tail == last) & self.valid[:, self.physical - count :]).all())

    def crop(self, count: int) -> None:
        """Forget the last ``count`` columns, which every row stored."""
        self.columns, self.valid = self.columns[:, :-count], self.valid[:, :-count]
        self.logical -= count

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows, as the cache does to its keys."""
        for name in ("columns", "valid", "dropped"):
            value: Tensor = getattr(self, name)
            setattr(self, name, value.index_select(0, index.to(value.device)))
        self.keys = {kind: keys.rows(index) for kind, keys in self.keys.items()}


class SlotMaps(dict[int, SlotMap]):
    """All slot maps of one cache, by the first layer they hold for; a :class:`vtc.dialect.caches.Ledger`.

    Attributes:
        owner: whose prompt was pruned; ``None`` after the cache was saved and loaded, until a patched model takes it.
    """

    owner: Any = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._firsts: dict[int, int] = {}  # asked for in every layer of every step

    def __setitem__(self, layer: int, slots: SlotMap) -> None:
        super().__setitem__(layer, slots)
        self._firsts.clear()

    def check_in_use(self) -> None:
        """Called when keys are stored.

        Raises:
            RuntimeError: it is not the patch that pruned the cache that goes on with it.
        """
        if running_call(self.owner) is None:
            raise RuntimeError(
                f"this cache was pruned: it stands for {self[0].logical} tokens of a prompt and holds "
                f"{self[0].physical}. Only the patch that pruned it can go on with it, and the model is not under that "
                "patch now. Start a new cache, or keep the model patched"
            )

    def __reduce__(self) -> Any:
        return SlotMaps, (dict(self),)

    def at(self, layer: int) -> SlotMap:
        """The one that holds for a layer."""
        return self[self.first(layer)]

    def first(self, layer: int) -> int:
        """The first layer that stores the same slots."""
        if (found := self._firsts.get(layer)) is None:
            found = self._firsts[layer] = max(first for first in self if first <= layer)
        return found

    def removed(self, layer: int) -> int:
        """By how many tokens a layer is shorter than the caller believes."""
        return self.at(layer).removed

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows, as the cache did to its keys."""
        for slots in self.values():
            slots.rows(index)

    def repeat(self, times: int) -> None:
        """Every row stands there several times now."""
        self.rows(torch.arange(len(self[0].columns)).repeat_interleave(times))

    def forget(self, tokens: int, stored: int) -> None:
        """The last ``tokens`` tokens go from the cache, whose first layer stores ``stored``.

        Raises:
            ValueError: rows dropped different ones of them and cannot be cut together.
        """
        inside = tokens - (stored - self[0].physical)  # columns of the pruned prompt itself
        if inside <= 0:
            return
        if not all(slots.ends_whole(inside) for slots in self.values()):
            raise ValueError(
                f"crop would remove {tokens} tokens, {inside} of them from a prompt that lost visual tokens there; "
                "rows lost different ones and cannot be cut together. Start a new cache."
            )
        for slots in self.values():
            slots.crop(inside)


def adopt(cache: Cache, batch: int, device: torch.device, owner: Any, layer: int = 0) -> SlotMap:
    """The slot map that begins at ``layer``, made on first use: the cache becomes a pruned one."""
    if (maps := ledger_of(cache)) is None:
        maps = SlotMaps({0: SlotMap.empty(batch, device)})
        maps.owner = owner
        give_ledger(cache, maps)
    if layer not in maps:  # up to now this layer stored what the one before it did
        before = maps.at(layer)
        maps[layer] = dataclasses.replace(before, keys=dict(before.keys))
    return maps[layer]


def take_over(cache: Any, owner: Any) -> None:
    """A cache that was saved and loaded goes on under the patched model that it is given to."""
    if (maps := ledger_of(cache)) is not None and maps.owner is None:
        maps.owner = owner


def slot_map(cache: Any, layer: int = 0) -> SlotMap | None:
    """The slot map that holds for ``layer`` of a cache that was pruned, else ``None``."""
    maps: SlotMaps | None = ledger_of(cache)
    return None if maps is None else maps.at(layer)


def stage_of(cache: Any, layer: int) -> int:
    """The first layer that stores the same slots as ``layer`` in a cache that was pruned."""
    return ledger_of(cache).first(layer)
