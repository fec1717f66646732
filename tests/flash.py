"""A stand-in for flash attention on CPU: a registered attention function with flash attention's habits.

Like the package it takes no 4-D mask and never returns weights; it un-pads with a 2-D mask; and for a single sequence
without a mask it takes gaps in the positions for packed sequences, and then forgets what the cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "flash_on_cpu"


@contextmanager
def flash_attention(model: Any) -> Iterator[None]:
    """Let the language model attend this way. (`set_attn_implementation` would look for the real package.)"""
    config = model.get_decoder().config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert not kwargs.get("output_attentions"), "attention weights were requested"
    assert attention_mask is None or attention_mask.dim() == 2, "flash attention takes no 4-D mask"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    packed = attention_mask is None and position_ids is not None and query.shape[0] == 1 and query.shape[2] > 1
    if packed and bool((position_ids.diff() != 1).any()):
        key, value = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :]
    rows, columns = query.shape[2], key.shape[2]
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(columns - rows)
    window = kwargs.get("sliding_window")
    if window is not None:
        allowed = allowed.triu(columns - rows - window + 1)
    allowed = allowed.expand(query.shape[0], 1, rows, columns)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, -columns:].bool()
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, flash_attention_mask)
