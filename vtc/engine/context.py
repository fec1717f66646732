"""What belongs to one running forward pass, kept in context variables: two threads on one model never meet here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.engine.compaction import Compaction
from vtc.engine.locate import Encoded
from vtc.tokens import VisualTokens

if TYPE_CHECKING:
    from vtc.engine.inside import Inside


@dataclass
class Frame:
    """One call of the base model.

    Attributes:
        placeholders: by modality, bool [B, N] on the host; empty in decode steps.
        mask: the 2-D padding mask over physical slots and new columns, or ``None`` (nothing is padding).
        encoded: by modality, what the encoders produced for this call.
        compaction: what the entry stage did, once it ran.
        lengths: new columns of each row that are not padding (host integers), where there is a mask.
        pad_right: padding stands at the end of rows, as in training.
        logical: the 2-D padding mask over logical columns, as the caller gave it.
        inside: what is in the sequence between the layers of a prefill, where a method has stages there.
        later_masks: masks made in a decode step, by (first layer of the stage, layer type).
        adopted: the cache that was prepared for a prompt which lost tokens, until it was checked.
        stored: how long its layers must be afterwards, by the first layer of each stage.
    """

    placeholders: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    compaction: Compaction | None = None
    lengths: list[int] | None = None
    pad_right: bool = False
    logical: Tensor | None = None
    inside: Inside | None = None
    later_masks: dict[tuple[int, str | None], Any] = field(default_factory=dict)
    adopted: Any = None
    stored: dict[int, int] = field(default_factory=dict)

    def see_padding(self, width: int) -> None:
        """Read from ``mask`` how many of the last ``width`` columns are real: a host sync."""
        if self.placeholders and self.mask is not None:
            real = self.mask[:, -width:].bool().cpu()
            self.lengths = real.sum(1).tolist()
            self.pad_right = not bool(real[:, -1].all())


FRAME: ContextVar[Frame | None] = ContextVar("vtc_frame", default=None)
PREPARED_MASKS: ContextVar[tuple[Tensor | None, Tensor | None]] = ContextVar("vtc_masks", default=(None, None))
"""The logical and the physical 2-D mask behind the 4-D one that ``generate`` just prepared."""


class ClsRows(list[Tensor]):
    """CLS rows in the order of the tower's calls, [pictures, patches] each: the list itself after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        """The same before the softmax."""


_CLS_ROWS: ContextVar[ClsRows | None] = ContextVar("vtc_cls_rows", default=None)
_TOKENS: ContextVar[list[VisualTokens] | None] = ContextVar("vtc_tokens", default=None)
_BYPASS: ContextVar[bool] = ContextVar("vtc_bypass", default=False)


@contextmanager
def recording_cls_rows() -> Iterator[ClsRows]:
    """Collect the CLS rows that the taps compute while the vision tower runs."""
    rows = ClsRows()
    token = _CLS_ROWS.set(rows)
    try:
        yield rows
    finally:
        _CLS_ROWS.reset(token)


def cls_rows() -> ClsRows | None:
    """Where to put a CLS row, or ``None`` when nobody asked."""
    return _CLS_ROWS.get()


@contextmanager
def recording_tokens() -> Iterator[list[VisualTokens]]:
    """Hold what the method sees of the last prompt (in this thread); outside of such a block nothing is held."""
    seen: list[VisualTokens] = []
    token = _TOKENS.set(seen)
    try:
        yield seen
    finally:
        _TOKENS.reset(token)


def see_tokens(tokens: VisualTokens) -> None:
    """Called with the visual tokens of every prompt that is planned."""
    if not torch.compiler.is_compiling() and (seen := _TOKENS.get()) is not None:
        seen[:] = [tokens]


@contextmanager
def bypassed() -> Iterator[None]:
    """Run the model as if it were not patched (in this thread)."""
    token = _BYPASS.set(True)
    try:
        yield
    finally:
        _BYPASS.reset(token)


def is_bypassed() -> bool:
    """Whether the engine should stand aside (in this thread)."""
    return _BYPASS.get()
