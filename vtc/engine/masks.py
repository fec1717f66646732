"""Masks for a shortened prompt.

Most decoders build their attention masks from a 2-D padding mask; they get a shorter one. Prefix-LM families prepare
4-D masks in the base model, with image blocks that attend both ways; those lose rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.dialect.caches import mask_sizes
from vtc.dialect.masks import attention_kinds
from vtc.engine.compaction import Compaction
from vtc.models import Parts


def shortened(parts: Parts, mask: Any, before: Tensor | None, compact: Compaction, cache: Any, past: int) -> Any:
    """What the decoder gets for a mask.

    Args:
        parts: the model.
        mask: what it would have got: ``None``, 2-D, 4-D, a block mask or a dict of those by layer type.
        before: the 2-D padding mask over the ``past`` stored and all new columns, ``None`` if nothing is padding.
        compact: the columns that stay.
        cache: the cache of the call, or ``None``.
        past: tokens it holds.
    """
    padding = _padding(before, compact, cache, past)
    if not parts.builds_masks_early or mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return padding
    if not isinstance(mask, dict):
        return _prepared(parts, mask, padding, compact, cache, past, layer=0)
    types = attention_kinds(parts.decoder.config) or []
    return {kind: _prepared(parts, one, padding, compact, cache, past, types.index(kind)) for kind, one in mask.items()}


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
