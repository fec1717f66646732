"""Logical against physical length: what the caller believes the cache holds, and what it holds.

``generate`` counts every token of the prompt; after pruning the cache holds fewer. The difference lives on the cache
itself, so that it follows the generation through beams, turns and crops, and two generations never mix. The cache's
class is swapped for a subclass of its own class: the same object, the same tensors, ``isinstance`` as before. It
reports the *logical* length to whoever asks (``generate``, default positions) and the *physical* one to the masks.
"""

from __future__ import annotations

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

    def crop(self, count: int) -> bool:
        """Forget the last ``count`` columns; ``False`` (and nothing changes) unless every row stored all of them."""
        last = torch.arange(self.logical - count, self.logical, device=self.columns.device)
        tail = self.columns[:, self.physical - count :]
        if count > self.physical or not ((tail == last) & self.valid[:, self.physical - count :]).all():
            return False
        self.columns, self.valid = self.columns[:, :-count], self.valid[:, :-count]
        self.logical -= count
        return True

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows, as the cache does to its keys."""
        for name in ("columns", "valid", "dropped"):
            value: Tensor = getattr(self, name)
            setattr(self, name, value.index_select(0, index.to(value.device)))


class _PrunedCache:
    """Mixed into the class of a cache that was pruned. Sizes for masks stay physical; the rest is logical."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) + slot_map(self).removed  # type: ignore[misc, union-attr]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        release(self)  # type: ignore[arg-type]

    def crop(self, tokens: int) -> None:
        """Negative: remove that many tokens from the end; positive (old transformers): the length to leave."""
        slots = slot_map(self)
        assert slots is not None
        length = physical_length(self)  # type: ignore[arg-type]
        remove = -tokens if tokens <= 0 else length + slots.removed - tokens
        inside = remove - (length - slots.physical)  # columns of the pruned prompt itself
        if inside > 0 and not slots.crop(inside):
            raise ValueError(
                f"crop would remove {remove} tokens, {inside} of them from a prompt that lost visual tokens there; "
                "rows lost different ones and cannot be cut together. Start a new cache."
            )
        super().crop(-remove if tokens <= 0 else length - remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        slot_map(self).rows(beam_idx)  # type: ignore[union-attr]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        slots = slot_map(self)
        assert slots is not None
        slots.rows(torch.arange(slots.columns.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        slot_map(self).rows(indices)  # type: ignore[union-attr]


@functools.cache
def _pruned(cls: type) -> type:
    return type(f"VTC{cls.__name__}", (_PrunedCache, cls), {"__module__": __name__})


def adopt(cache: Cache, batch: int, device: torch.device) -> SlotMap:
    """The slot map of ``cache``, made on first use: swaps the cache's class for its pruned subclass."""
    if (slots := slot_map(cache)) is None:
        slots = SlotMap.empty(batch, device)
        setattr(cache, _STATE, slots)
        cache.__class__ = _pruned(type(cache))
    return slots


def release(cache: Cache) -> None:
    """Make the cache an ordinary one again (it must be empty)."""
    if slot_map(cache) is not None:
        delattr(cache, _STATE)
        cache.__class__ = type(cache).__mro__[2]


def slot_map(cache: Any) -> SlotMap | None:
    """The slot map of a cache that was pruned, else ``None``."""
    return getattr(cache, _STATE, None)


def physical_length(cache: Cache | None) -> int:
    """Tokens really stored (by the first attention layer)."""
    if cache is None:
        return 0
    if slot_map(cache) is not None:
        return int(cache.get_query_offset())
    return int(cache.get_seq_length())
