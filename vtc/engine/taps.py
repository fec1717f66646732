"""Signals without attention maps: rows recomputed from the q and k projections of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.context import cls_rows


def cls_row(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Head-averaged softmax attention of the CLS token (index 0) to the patches.

    Args:
        attention: a vision self-attention module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
        hidden: [pictures, 1 + patches, width], the module's input.

    Returns:
        float32 [pictures, patches]. The softmax runs over CLS and patches, as in the tower; memory is O(patches).
    """
    heads = attention.num_heads

    def project(x: Tensor, side: str) -> Tensor:
        y = getattr(attention, f"{side}_proj")(x)
        norm = getattr(attention, f"{side}_norm", None)  # InternViT normalises q and k
        y = y if norm is None else norm(y)
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key = project(hidden[:, :1], "q"), project(hidden, "k")
    scores = (query @ key.transpose(2, 3)).float() * attention.scale
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def tap_cls(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a vision self-attention: leave the CLS row with whoever is recording."""
    if torch.compiler.is_compiling() or (rows := cls_rows()) is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rows.append(cls_row(module, hidden.detach()))
