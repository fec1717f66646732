"""Signals without attention maps: rows recomputed from the q and k projections of one layer."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.context import cls_rows
from vtc.ops.gather import gather_columns
from vtc.ops.scores import row_attention


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


@dataclass(frozen=True)
class Rows:
    """Some rows of one decoder layer's attention, from its own norm, q, k and RoPE; nothing is attended to yet.

    Attributes:
        attention: the layer's self-attention.
        query: [B, H, T, dh], after RoPE. T is 1 where no sample wants any.
        key: [B, Hkv, P + M, dh], keys stored before and those of the columns, after RoPE.
        there: bool [B, T], which rows are wanted. They stand at the end, in order.
        position: LongTensor [B, T], where they are among the keys.
        valid: bool [B, P + M], keys that are no padding; ``None``: no key is padding.
        allowed: bool [B, T, P + M] to obey instead of causality, or ``None``.
        window: how many keys back the layer looks, ``None`` for all.
        past: P.
    """

    attention: nn.Module
    query: Tensor
    key: Tensor
    there: Tensor
    position: Tensor
    valid: Tensor | None
    allowed: Tensor | None
    window: int | None
    past: int

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        which: Tensor,
        longest: int,
        *,
        keys: Tensor | None,
        valid: Tensor | None,
        prepared: Tensor | None,
        window: int | None,
    ) -> Rows:
        """Project them.

        Args:
            layer: the decoder layer.
            hidden: [B, M, d], what enters it.
            rotary: cos and sin of the M columns, as the layer gets them.
            which: bool [B, M], the rows wanted.
            longest: the most rows any sample wants (host integer).
            keys: [B, Hkv, P, dh], keys stored before, after RoPE, or ``None``.
            valid: bool [B, P + M], keys that are no padding; ``None``: no key is padding.
            prepared: 4-D mask over the M columns to obey instead of causality (prefix-LM families).
            window: how many keys back the layer looks, ``None`` for all.
        """
        attention = layer.self_attn
        index = which.to(torch.int8).argsort(dim=1, stable=True)[:, -max(1, longest) :]
        x = layer.input_layernorm(hidden)
        cos, sin = (part.expand(len(x), -1, -1) for part in rotary)
        rows, row_cos, row_sin = gather_columns((x, cos, sin), index)
        query = _rotate(attention, _heads(attention, rows, "q"), row_cos, row_sin)
        key = _rotate(attention, _heads(attention, x, "k"), cos, sin)
        past = 0 if keys is None else keys.shape[2]
        if keys is not None:
            key = torch.cat([keys.to(key.dtype), key], dim=2)
        allowed = None
        if prepared is not None:
            own = prepared.expand(len(x), -1, -1, -1)[:, 0]
            own = own.gather(1, index[..., None].expand(-1, -1, own.shape[-1]))
            own = own if own.dtype == torch.bool else own == 0
            allowed = torch.nn.functional.pad(own, (past, 0), value=True)
        there = which.gather(1, index)
        return cls(attention, query, key, there, index + past, valid, allowed, window, past)

    def mean(self) -> Tensor:
        """float32 [B, M]: attention to the M columns, averaged over heads and rows that are there.

        The softmax runs over the stored keys too.
        """
        return self._attend(slice(None), self.there)

    def last(self) -> Tensor:
        """The same of the last row alone, which is the last column where none is wanted."""
        return self._attend(slice(-1, None), None)

    def _attend(self, rows: slice, counted: Tensor | None) -> Tensor:
        position, length = self.position[:, rows], self.key.shape[2]
        if self.allowed is not None:  # says it all
            position = torch.full_like(position, length - 1)
        weights = row_attention(
            self.query[:, :, rows],
            self.key,
            self.attention.scaling,
            position=position,
            counted=counted,
            mask=self.valid,
            allowed=None if self.allowed is None else self.allowed[:, rows],
            window=self.window if self.allowed is None else None,
            cap=getattr(self.attention, "attn_logit_softcapping", None),
        )
        return weights[:, self.past :]


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
    if _rotates_pairs(apply):
        return apply(x, x[:, :0], cos, sin)[0]  # keys of no head: only one of the two is wanted
    return apply(x, cos, sin)


@functools.cache
def _rotates_pairs(apply: Callable[..., Any]) -> bool:
    """Whether it wants queries and keys together."""
    return {"q", "k"} <= inspect.signature(apply).parameters.keys()
