"""Signals without attention maps: rows recomputed from the q and k projections of one layer."""

from __future__ import annotations

import inspect
import sys
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
    return _cls_scores(attention, hidden).softmax(-1).mean(1)[:, 1:]


def cls_logit_row(attention: nn.Module, hidden: Tensor) -> Tensor:
    """The same before the softmax: scaled products of query and key, averaged over heads."""
    return _cls_scores(attention, hidden).mean(1)[:, 1:]


def _cls_scores(attention: nn.Module, hidden: Tensor) -> Tensor:
    """float32 [pictures, heads, 1 + patches]."""
    heads = attention.num_heads

    def project(x: Tensor, side: str) -> Tensor:
        y = getattr(attention, f"{side}_proj")(x)
        norm = getattr(attention, f"{side}_norm", None)  # InternViT normalises q and k
        y = y if norm is None else norm(y)
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key = project(hidden[:, :1], "q"), project(hidden, "k")
    return (query @ key.transpose(2, 3)).float()[:, :, 0] * attention.scale


def tap_cls(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a vision self-attention: leave the CLS row with whoever is recording."""
    if torch.compiler.is_compiling() or (rows := cls_rows()) is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rows.append(cls_row(module, hidden.detach()))


def tap_cls_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same for the logits."""
    if torch.compiler.is_compiling() or (rows := cls_rows()) is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rows.logits.append(cls_logit_row(module, hidden.detach()))


CLS_TAPS = {"cls": tap_cls, "cls_logits": tap_cls_logits}
"""By signal, the hook that hears it."""

ROW_SIGNALS = frozenset({"instruction", "last", "text_to_visual", "visual_to_text"})
_BLOCK = 64  # rows at a time: memory stays O(rows of a block x keys) per head


def attention_rows(
    layer: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    which: Tensor,
    longest: int,
    *,
    keys: Tensor | None,
    valid: Tensor,
    prepared: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of some rows of one decoder layer, averaged over heads: its own norm, q, k and RoPE.

    Args:
        layer: the decoder layer.
        hidden: [B, M, d], what enters it.
        rotary: cos and sin of the M columns, as the layer gets them.
        which: bool [B, M], the rows wanted.
        longest: the most rows any sample wants (host integer).
        keys: [B, Hkv, P, dh], keys stored before, after RoPE, or ``None``.
        valid: bool [B, P + M], keys that are no padding.
        prepared: 4-D mask over the M columns to obey instead of causality (prefix-LM families).
        window: how many keys back the layer looks, ``None`` for all.

    Returns:
        float32 [B, T, M], T = max(1, longest): attention to the M columns (the softmax runs over the P stored keys
        too); and bool [B, T], which rows are there. They stand at the end, in order.
    """
    attention = layer.self_attn
    rows = max(1, longest)
    index = which.to(torch.int8).argsort(dim=1, stable=True)[:, -rows:]
    there = which.gather(1, index)
    x = layer.input_layernorm(hidden)
    cos, sin = (part.expand(len(x), -1, -1) for part in rotary)

    def at_rows(tensor: Tensor) -> Tensor:
        return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

    query = _rotate(attention, _heads(attention, at_rows(x), "q"), at_rows(cos), at_rows(sin))
    key = _rotate(attention, _heads(attention, x, "k"), cos, sin)
    past = 0 if keys is None else keys.shape[2]
    if keys is not None:
        key = torch.cat([keys.to(key.dtype), key], dim=2)
    allowed = valid[:, None] & _reach(index, past, key.shape[2], window)
    if prepared is not None:
        own = prepared.expand(len(x), -1, -1, -1)[:, 0].gather(1, index[..., None].expand(-1, -1, prepared.shape[-1]))
        own = own if own.dtype == torch.bool else own == 0
        allowed = valid[:, None] & torch.nn.functional.pad(own, (past, 0), value=True)
    weights = [
        _softmax_rows(attention, q, key, a)[..., past:]
        for q, a in zip(query.split(_BLOCK, dim=2), allowed.split(_BLOCK, dim=1), strict=True)
    ]
    return torch.cat(weights, dim=1), there


def stored_keys(cache: Any, index: int, past: int) -> Tensor | None:
    """Keys of one layer that were stored before this call, [B, Hkv, P, dh]."""
    if not past:
        return None
    return cache.layers[index].keys[:, :, :past]


def _heads(attention: nn.Module, x: Tensor, side: str) -> Tensor:
    """[B, T, d] → [B, heads, T, dh], normalised where the family does that, before RoPE."""
    y = getattr(attention, f"{side}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{side}_norm", None)
    return (y if norm is None else norm(y)).transpose(1, 2)


def _rotate(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The family's own rotary embedding, found where its attention was defined."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if len([p for p in inspect.signature(apply).parameters if p in ("q", "k")]) == 2:
        return apply(x, x, cos, sin)[0]
    return apply(x, cos, sin)


def _reach(index: Tensor, past: int, keys: int, window: int | None) -> Tensor:
    """Bool [B, T, keys]: what causality, and a window, let each row see."""
    distance = (index + past)[..., None] - torch.arange(keys, device=index.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _softmax_rows(attention: nn.Module, query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """[B, H, T, dh] x [B, Hkv, L, dh] → float32 [B, T, L], the mean over heads."""
    batch, heads, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # the query heads of a group share its keys
    scores = (grouped @ key.transpose(2, 3)).float().reshape(batch, heads, rows, -1) * attention.scaling
    if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    return scores.softmax(-1).mean(1)
