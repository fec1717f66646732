"""What units that leave a tower with one row for all pictures must amount to, by hand: it runs whole, blind to them.

Which rows a token is made of is asked of autograd, so that no name of a window or an order stands here. From the block
of a stage on, the keys of dead rows are masked in what eager attention computes, sequence by sequence.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from eager_tower import made_of
from torch import Tensor

from vtc.engine.row import Row
from vtc.engine.units import UnitStages

Note = Callable[[str, int, Tensor], None]
"""Modality, block and bool [P, N], True for what is gone by then."""


@contextmanager
def overheard_units(note: Note) -> Iterator[None]:
    """Hear what methods let leave."""
    at: list[Any] = []
    reduced, keep = UnitStages.reduced, Row.keep

    def reducing(self: Any, step: Any, recording: Any, hidden: Tensor) -> Tensor:
        at[:] = [recording.modality, step.stage.at.block]
        return reduced(self, step, recording, hidden)

    def keeping(self: Any, mask: Tensor, counts: Sequence[int]) -> Tensor:
        note(*at, ~mask)
        return keep(self, mask, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitStages, "reduced", reducing)
        patch.setattr(Row, "keep", keeping)
        yield


class BlindUnits:
    """The tower of an unpatched model with eager attention, for one sample's pictures at a time."""

    def __init__(self, model: Any, tower: Any) -> None:
        self.model, self.tower = model, tower
        self.shares: list[Tensor] = []
        self.stages: list[tuple[int, Tensor]] = []
        self.end = 0

    def count(self, encode: Callable[[], Any]) -> int:
        """Find out which rows the tokens of the pictures are made of; and how many pictures there are."""
        self.stages = []
        with torch.enable_grad():
            self.shares = [shares[:, 0] > 0 for shares in made_of(self.model, lambda: list(encode().pooler_output))]
        return len(self.shares)

    def hide(self, stages: Sequence[tuple[int, Tensor]]) -> None:
        """From these blocks on, tokens bool [P, N] of the sample's pictures are gone."""
        self.stages = []
        for block, dead in stages:
            assert len(dead) == len(self.shares)
            rows = [made[gone[: len(made)]].any(0) for made, gone in zip(self.shares, dead, strict=True)]
            self.stages.append((block, torch.stack(rows).any(0)))

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """While this lasts."""
        attentions = [self.tower.attention(index) for index in range(len(self.tower.layers))]
        index_of = {module: index for index, module in enumerate(attentions)}
        source = sys.modules[type(attentions[0]).__module__]
        eager = source.eager_attention_forward

        @functools.wraps(eager)
        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            if module in index_of:
                start, self.end = self.end, self.end + key.shape[2]
                gone = [dead for block, dead in self.stages if block <= index_of[module]]
                if gone:
                    assert attention_mask is None
                    hidden = gone[-1][start : self.end]
                    attention_mask = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype)
                    attention_mask = attention_mask.masked_fill(hidden, torch.finfo(query.dtype).min)
            return eager(module, query, key, value, attention_mask, **kwargs)

        def begin(module: Any, args: Any) -> None:
            self.end = 0

        hooks = [module.register_forward_pre_hook(begin) for module in attentions]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source, "eager_attention_forward", attend)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
