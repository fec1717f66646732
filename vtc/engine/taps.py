"""Signals without attention maps: rows recomputed from the q and k projections of one layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.engine.context import cls_rows
from vtc.ops.gather import gather_columns
from vtc.ops.scores import row_attention


def cls_row(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Head-averaged softmax attention of the CLS token (index 0) to the patches.

    Args:
        attention: a vision self-attention module with projections for queries and keys.
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
    query, key = (inner.project_in_tower(attention, x, side) for x, side in ((hidden[:, :1], "q"), (hidden, "k")))
    return (query @ key.transpose(2, 3)).float()[:, :, 0] * inner.scaling_in_tower(attention)


def tap_cls(owner: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a vision self-attention: leave the CLS row with its owner, if that is recording."""
    if (rows := cls_rows(owner)) is None:
        return
    rows.append(cls_row(module, inner.hidden_states(args, kwargs).detach()))


def tap_cls_logits(owner: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same for the logits."""
    if (rows := cls_rows(owner)) is None:
        return
    rows.logits.append(cls_logit_row(module, inner.hidden_states(args, kwargs).detach()))


CLS_TAPS = {"cls": tap_cls, "cls_logits": tap_cls_logits}
"""By signal, the hook that hears it; its first argument is whoever wants to know."""

_LOCK = threading.Lock()
_TAPPED: dict[nn.Module, list[int]] = {}


@contextmanager
def tapped(modules: Iterable[nn.Module], tap: Callable[..., None], owner: Any) -> Iterator[None]:
    """Let ``owner`` hear some modules for a while, without hooks; calls in other threads run as ever.

    A dictionary of hooks must not change while another thread runs through it; an instance's ``forward`` may. Only the
    first of several listeners wraps it and only the last unwraps it.
    """
    modules = [*modules]
    with _LOCK:
        for module in modules:
            _TAPPED.setdefault(module, [0])[0] += 1
            if _TAPPED[module][0] == 1:
                _wrap_forward(module)
    token = _LISTENERS.set((*_LISTENERS.get(), *((module, tap, owner) for module in modules)))
    try:
        yield
    finally:
        _LISTENERS.reset(token)
        with _LOCK:
            for module in modules:
                _TAPPED[module][0] -= 1
                if not _TAPPED[module][0]:
                    del _TAPPED[module]
                    _unwrap_forward(module)


_LISTENERS: ContextVar[tuple[tuple[nn.Module, Callable[..., None], Any], ...]] = ContextVar("vtc_listeners", default=())


def _wrap_forward(module: nn.Module) -> None:
    real = module.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        for heard, tap, owner in _LISTENERS.get():
            if heard is module:
                tap(owner, module, args, kwargs)
        return real(*args, **kwargs)

    forward._vtc_hides = module.__dict__.get("forward")  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward


def _unwrap_forward(module: nn.Module) -> None:
    forward = module.__dict__.get("forward")
    if not hasattr(forward, "_vtc_hides"):  # somebody put another one there meanwhile
        return
    if forward._vtc_hides is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward._vtc_hides


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
        recipe: inner.Recipe,
        hidden: Tensor,
        rotary: Sequence[Tensor] | None,
        positions: Tensor | None,
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
            recipe: how it makes queries and keys.
            hidden: [B, M, d], what enters it.
            rotary: cos and sin of the M columns, as the layer gets them; ``None`` where it gets none.
            positions: LongTensor [B, M] for layers that compute with position ids, else ``None``.
            which: bool [B, M], the rows wanted.
            longest: the most rows any sample wants (host integer).
            keys: [B, Hkv, P, dh], keys stored before, after RoPE, or ``None``.
            valid: bool [B, P + M], keys that are no padding; ``None``: no key is padding.
            prepared: 4-D mask over the M columns to obey instead of causality (prefix-LM families).
            window: how many keys back the layer looks, ``None`` for all.
        """
        attention = inner.self_attention(layer)
        assert attention is not None
        index = which.to(torch.int8).argsort(dim=1, stable=True)[:, -max(1, longest) :]
        x = inner.norm(layer, hidden, recipe)
        turns = [part.expand(len(x), -1, -1) for part in rotary or ()]
        rows, *row_turns = gather_columns((x, *turns), index)
        query = inner.project(attention, rows, row_turns, "q", recipe)
        if positions is not None:
            query = inner.scale_by_position(attention, query, positions.gather(1, index))
        key = inner.project(attention, x, turns, "k", recipe)
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
            inner.scaling(self.attention),
            position=position,
            counted=counted,
            mask=self.valid,
            allowed=None if self.allowed is None else self.allowed[:, rows],
            window=self.window if self.allowed is None else None,
            cap=inner.softcap(self.attention),
        )
        return weights[:, self.past :]
