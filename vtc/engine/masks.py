"""Masks for a shortened prompt.

Most decoders build their attention masks from a 2-D padding mask; they get a shorter one. Prefix-LM families prepare
4-D masks in the base model, with image blocks that attend both ways; those lose rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.dialect.caches import ledger_of, mask_sizes, physical_length
from vtc.dialect.masks import attention_kinds
from vtc.engine.compaction import Compaction
from vtc.engine.context import Call
from vtc.engine.lengths import SlotMap
from vtc.models import Parts


def shortened(parts: Parts, mask: Any, running: Call, compact: Compaction, cache: Any, past: int) -> Any:
    """What the decoder gets for a mask.

    Args:
        parts: the model.
        mask: what it would have got: ``None``, 2-D, 4-D, a block mask or a dict of those by layer type.
        running: the call; its padding mask is about the ``past`` stored and all new columns.
        compact: the columns that stay.
        cache: the cache of the call, or ``None``.
        past: tokens it holds.

    Raises:
        ValueError: the caller made a mask of a kind that cannot lose columns.
    """
    padding = _padding(running.mask, compact, cache, past)
    if not running.prepared or mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return padding
    if not parts.builds_masks_early and (parts.flash or not isinstance(mask, (Tensor, dict))):
        raise ValueError(
            f"an attention mask of type {type(mask).__name__} that is not two-dimensional cannot lose the columns of "
            f"dropped tokens with {parts.attention!r}; give a 2-D mask, or a 4-D one with attn_implementation='sdpa' "
            "or 'eager'"
        )
    if not isinstance(mask, dict):
        return _prepared(parts, mask, padding, compact, cache, past, layer=0)
    types = attention_kinds(parts.decoder.config) or []
    return {kind: _prepared(parts, one, padding, compact, cache, past, types.index(kind)) for kind, one in mask.items()}


def layer_of_each_kind(config: Any) -> dict[str | None, int]:
    """The first layer of each kind of attention; of kind ``None`` where all are alike."""
    kinds = attention_kinds(config)
    return {None: 0} if kinds is None else {kind: kinds.index(kind) for kind in set(kinds)}


def translated(mask: Any, cache: Any, slots: SlotMap, new: int) -> Any:
    """A caller's own 4-D mask (or a dict of those) for a later call on a cache that was pruned.

    Raises:
        ValueError: it does not have a column for every token of the prompts so far, or layers lost different ones.
    """
    if isinstance(mask, dict):
        return {kind: translated(one, cache, slots, new) for kind, one in mask.items()}
    length = physical_length(cache) + new
    if not isinstance(mask, Tensor) or mask.shape[-1] != length + slots.removed or len(ledger_of(cache)) > 1:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"an attention mask of your own ({shape}) must have a column for each of the {length + slots.removed} "
            "tokens so far, dropped ones too, on a cache that was pruned before the language model; a 2-D mask always "
            "works"
        )
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    index, valid = (x.to(mask.device)[:, None, None] for x in (slots.columns, slots.valid))
    mask = mask.expand(len(index), *mask.shape[1:])
    head = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1)).masked_fill(~valid, blocked)
    return torch.cat([head, mask[..., slots.logical :]], dim=3)


def stored(before: Tensor | None, new: int) -> Tensor | None:
    """The part of a 2-D padding mask that is about stored tokens, ``None`` where there is none to tell."""
    return None if before is None or before.shape[1] == new else before[:, : before.shape[1] - new]


def _padding(before: Tensor | None, compact: Compaction, cache: Any, past: int) -> Tensor | None:
    """Bool [B, past + M], ``None`` where nothing is padding and a cache says so.

    Without a cache an explicit mask also keeps gaps in the positions from being taken for packed sequences.
    """
    head = stored(before, compact.width)
    if cache is not None and not compact.holes and head is None:
        return None
    if head is None:
        head = compact.valid.new_ones(compact.valid.shape[0], past)
    return torch.cat([head.bool(), compact.valid.to(head.device)], dim=1)


def _prepared(
    parts: Parts, mask: Tensor | None, padding: Tensor | None, compact: Compaction, cache: Any, past: int, layer: int
) -> Tensor | None:
    """One mask that the base model prepared for the layers like ``layer``."""
    if mask is None and not compact.holes:
        return None
    if parts.flash or (mask is not None and mask.dim() == 2):
        return padding
    length, offset = mask_sizes(cache, compact.length, layer)
    if mask is None:  # plainly causal so far; the holes need a mask
        seen = past - offset
        mask = compact.keep.new_ones(1, 1, compact.width, seen + compact.width).tril(seen)
    return compact.attention(mask, past - offset, length)
