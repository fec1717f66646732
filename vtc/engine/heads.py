"""Heads that count columns of the prompt get hidden states in these columns back, and find nothing where a token left.

A sequence classifier looks for the last token in the ids; a retriever multiplies what it made of hidden states by the
mask. Both run their own code, on as many columns as they know of. What a retriever then returns loses them again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import heads, modules
from vtc.dialect.arguments import IDS
from vtc.dialect.heads import Head
from vtc.engine.compaction import Columns
from vtc.engine.context import Call
from vtc.engine.locate import Encoded, runs
from vtc.models import Adapter, Parts
from vtc.ops.gather import gather_columns


def caller_of(base: nn.Module) -> nn.Module | None:
    """The model with a head that is calling a base model which was patched by itself; found on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if heads.calls(caller := frame.f_locals.get("self"), base):
            return modules.without_adapters(caller)
        frame = frame.f_back
    return None


def check_caller(caller: nn.Module, base: nn.Module) -> None:
    """Refuse a head that needs hooks of its own, where only the base model has any.

    Raises:
        RuntimeError: it is one, or may be.
    """
    head, name = heads.head_of(caller, base), type(caller).__name__
    if head is Head.TOKENWISE:
        return
    instead = f"call {type(base).__name__} itself and read its hidden states at p.last_columns"
    if head is not None:
        instead = f"vtc.unpatch it and patch the whole {name}, or {instead}"
    raise RuntimeError(
        f"vtc.patch was given only the {type(base).__name__} of this {name}, whose head may look for columns of the "
        f"prompt that are gone; {instead}"
    )


def whole(head: Head, root: Any, running: Call, hidden: Tensor) -> Tensor:
    """Hidden states [B, M, d] as columns of the prompt again, [B, N, d].

    Args:
        head: what reads them.
        root: the module that it belongs to.
        running: the call, of which something was dropped.
        hidden: of the columns that are left.

    Raises:
        IndexError: the head would read a column that is gone.
    """
    slots = _left(running).slots(_shape(running)[1]).to(hidden.device)
    if head is Head.POOLED:
        columns = heads.pooled_columns(root, IDS.read(running.asked), len(slots)).to(slots.device)
        gone = slots[torch.arange(len(slots), device=slots.device), columns] < 0
        if gone.any():
            row = int(gone.nonzero()[0])
            raise IndexError(
                f"{type(root).__name__} scores row {row} by its column {int(columns[row]) % slots.shape[1]}, the last "
                "that is no padding, and there is a visual token that was dropped, or padding after all; put text "
                "behind the image"
            )
    (every,) = gather_columns((hidden,), slots.clamp(min=0))
    # of no column that is gone is anything wanted; but vectors are divided by their length, and 0 / 0 is no number
    return torch.where((slots < 0)[..., None], torch.ones_like(every), every)


def shortened(output: Any, running: Call) -> Any:
    """What a retriever returned, without the vectors of columns that are gone: [B, N, d] → [B, M, d], 0 at holes."""
    left, shape = _left(running), _shape(running)

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape or value.dim() < 3:
            return value
        hole = ~left.valid.to(value.device)
        return left.sequence(value).masked_fill(hole.view(*hole.shape, *[1] * (value.dim() - 2)), 0)

    if isinstance(output, tuple):
        return tuple(map(fit, output))
    for name, value in output.items():
        output[name] = fit(value)
    return output


def _left(running: Call) -> Columns:
    assert running.left is not None  # something was dropped
    return running.left


def _shape(running: Call) -> torch.Size:
    """[B, N], columns before anything left."""
    assert running.compaction is not None
    return running.compaction.keep.shape


def merged_before(adapter: Adapter, parts: Parts, running: Call) -> dict[str, Encoded]:
    """Images that the root itself wrote into its embeddings (ColQwen2), told from what it was called with.

    An image is a run of placeholders, and what the family's encoder would have been told of it stands there too.
    """
    if not any(name.startswith("pixel_values") and value is not None for name, value in running.asked.items()):
        return {}
    found = {}
    for modality, where in running.placeholders.items():
        lengths = [len(run) for row in where for run in runs(row.nonzero()[:, 0])]
        layouts = adapter.layouts(parts.base, modality, lengths, _given(running.asked))
        found[modality] = Encoded(tuple(layouts), merge=adapter.merge)
    return found


def _given(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}
