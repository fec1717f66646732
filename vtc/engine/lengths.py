"""Logical against physical length: what the caller believes the cache holds, and what it holds.

``generate`` counts every token of the prompt; after pruning the cache holds fewer. The difference lives on the cache
itself, so that it follows the generation through beams, turns and crops, and two generations never mix. The cache's
class is swapped for a subclass of its own class: the same object, the same tensors, ``isinstance`` as before. It
reports the *logical* length to whoever asks (``generate``, default positions) and the *physical* one to the masks.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache

_STATE = "_vtc_state"


@dataclass
class SlotMap:
    """Which logical column each physical cache slot holds.

    Attributes:
        columns: LongTensor [B, P], logical column of each of the first P slots.
        valid: bool [B, P]; False where a row kept fewer tokens than the longest row (a hole, or a pad).
        logical: logical columns covered so far; later tokens are stored one to one.
        dropped: LongTensor [B], tokens dropped from each row so far, padding not counted.
        holes: whether any ``valid`` is False (known on the host, so that nobody waits for the device).
    """

    columns: Tensor
    valid: Tensor
    logical: int
    dropped: Tensor
    holes: bool

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


class _PrunedCache:
    """Mixed into the class of a cache that was pruned. Sizes for masks stay physical; the rest is logical."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) + slot_map(self, layer_idx).removed  # type: ignore[misc, union-attr]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        release(self)  # type: ignore[arg-type]

    def crop(self, tokens: int) -> None:
        """Negative: remove that many tokens from the end; positive (old transformers): the length to leave."""
        length = physical_length(self)  # type: ignore[arg-type]
        entry: SlotMap = slot_map(self)  # type: ignore[assignment]
        remove = -tokens if tokens <= 0 else length + entry.removed - tokens
        inside = remove - (length - entry.physical)  # columns of the pruned prompt itself
        if inside > 0:
            if not all(slots.ends_whole(inside) for slots in _maps(self).values()):
                raise ValueError(
                    f"crop would remove {remove} tokens, {inside} of them from a prompt that lost visual tokens there; "
                    "rows lost different ones and cannot be cut together. Start a new cache."
                )
            for slots in _maps(self).values():
                slots.crop(inside)
        super().crop(-max(remove, 0))  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _rows(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        batch = slot_map(self).columns.shape[0]  # type: ignore[union-attr]
        _rows(self, torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        _rows(self, indices)


def _maps(cache: Any) -> dict[int, SlotMap]:
    return getattr(cache, _STATE)


def _rows(cache: Any, index: Tensor) -> None:
    for slots in _maps(cache).values():
        slots.rows(index)


@functools.cache
def _pruned(cls: type) -> type:
    return type(f"VTC{cls.__name__}", (_PrunedCache, cls), {"__module__": __name__})


def adopt(cache: Cache, batch: int, device: torch.device, layer: int = 0) -> SlotMap:
    """The slot map that begins at ``layer``, made on first use: swaps the cache's class for its pruned subclass."""
    if slot_map(cache) is None:
        setattr(cache, _STATE, {0: SlotMap.empty(batch, device)})
        cache.__class__ = _pruned(type(cache))
    maps = _maps(cache)
    if layer not in maps:  # up to now this layer stored what the one before it did
        maps[layer] = dataclasses.replace(slot_map(cache, layer))  # type: ignore[type-var]
    return maps[layer]


def release(cache: Cache) -> None:
    """Make the cache an ordinary one again (it must be empty)."""
    if slot_map(cache) is not None:
        delattr(cache, _STATE)
        cache.__class__ = type(cache).__mro__[2]


def slot_map(cache: Any, layer: int = 0) -> SlotMap | None:
    """The slot map that holds for ``layer`` of a cache that was pruned, else ``None``."""
    maps: dict[int, SlotMap] | None = getattr(cache, _STATE, None)
    return None if maps is None else maps[max(first for first in maps if first <= layer)]


def stage_of(cache: Any, layer: int) -> int:
    """The first layer that stores the same slots as ``layer`` in a cache that was pruned."""
    return max(first for first in _maps(cache) if first <= layer)


def physical_length(cache: Cache | None, layer: int = 0) -> int:
    """Tokens that ``layer`` really stored (layer 0: the first attention layer)."""
    if cache is None:
        return 0
    if slot_map(cache) is not None:
        return int(cache.get_query_offset(layer))
    return int(cache.get_seq_length(layer))
