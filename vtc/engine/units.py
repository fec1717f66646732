"""Stages in towers where the patches of all pictures stand in one row: they leave unit by unit.

A unit is the patches that become one token (2x2 in the Qwen-VL line). Pictures may keep different numbers of them.
Every later block is handed rotary embeddings and the ends of sequences for all rows: they are cut for it. Dead units
are not merged; zeros stand for them behind each merger, those of DeepStack that come after the stage among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.arguments import ENDS, LONGEST, ROTARY
from vtc.dialect.towers import Given
from vtc.engine.context import Recording, recording_of
from vtc.engine.row import Row
from vtc.engine.stages import Hook, StagesOfTower
from vtc.methods.stages import Step
from vtc.signals import Pixels, TowerSignal
from vtc.tokens import VisualTokens


class UnitStages(StagesOfTower):
    """A unit is a token, and leaves with all of its rows."""

    def hooks_behind(self) -> Iterator[Hook]:
        """On the mergers."""
        for merger in self.tower.mergers:
            yield merger, self.after_merger, False

    def reduced(self, step: Step, recording: Recording, hidden: Tensor) -> Tensor:
        """The rows [K, width] that stay of [T, width]."""
        if recording.passage is None:
            recording.passage = self._row(recording, hidden)
        row = _row(recording)
        kept = step.reduce(self._tokens(step, recording, row, hidden))
        assert kept.features is None  # or it was refused
        return hidden[row.keep(kept.mask, kept.counts).to(hidden.device)]

    def _row(self, recording: Recording, hidden: Tensor) -> Row:
        base, modality, arguments = self.parts.base, recording.modality, recording.arguments
        layouts = self.adapter.pictures(base, modality, arguments)
        total = sum(layout.length for layout in layouts)
        if total * self.tower.unit != len(hidden):
            raise ValueError(
                f"{modality}s of {total} tokens are not the {len(hidden)} patches that the vision tower was given, "
                f"{self.tower.unit} to a token; encode them with the model's own get_{modality}_features"
            )
        # sent the way of the features, the number of each unit says where it goes (exact: equal in a unit, below 2**24)
        numbers = torch.arange(total, device=hidden.device, dtype=torch.float32).repeat_interleave(self.tower.unit)
        place = torch.cat(self.adapter.per_token(base, modality, numbers[None], layouts, arguments)).long()
        return Row(self.tower.unit, tuple(layouts), place, tuple(layout.length for layout in layouts))

    def _tokens(self, step: Step, recording: Recording, row: Row, hidden: Tensor) -> VisualTokens:
        """The units of each picture; a picture is an image of its own."""
        pictures = len(row.layouts)
        of_all = Row(row.unit, row.layouts, row.place, row.counts)  # signals stand at their places already
        signals = {}
        for signal in step.stage.needs:
            if isinstance(signal, TowerSignal):
                signals[signal.key] = of_all.per_picture(recording[signal][-1][0])
            elif isinstance(signal, Pixels):
                pixels = self.adapter.pixels(recording.modality, recording.arguments)
                signals[signal.key] = row.of_tokens(pixels.to(hidden.device))
        tokens = VisualTokens(
            row.per_picture(hidden.detach()),
            row.layouts,
            (0,) * pictures,  # what is drawn at random must not depend on the other pictures
            signals,
            step.axes,
            tuple(range(pictures)),
            entered=row.entered.setdefault(id(step.method), row.counts),
        )
        if row.there is None:
            return tokens
        return replace(tokens, alive=row.alive().to(hidden.device), alive_counts=row.counts)

    def cut(self, index: int, call: Given, recording: Recording) -> None:
        """The rotary embedding and the ends of sequences."""
        row = _row(recording)
        if (rotary := call[ROTARY]) is not None:
            call[ROTARY] = row.rotary(rotary)
        ends, longest = row.ends(call[ENDS])
        call[ENDS] = ends
        if call[LONGEST] is not None:
            call[LONGEST] = longest

    def after_merger(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """All units again, zeros for those that left, in the order in which the tower goes on."""
        recording = recording_of(self.parts)
        return None if recording is None or recording.passage is None else _row(recording).merged(output)

    def gone(self, recording: Recording) -> Tensor:
        """Float [1, T]."""
        row = _row(recording)
        recording.left += [layout.length - k for layout, k in zip(row.layouts, row.counts, strict=True)]
        return row.gone()


def _row(recording: Recording) -> Row:
    """The run under way; a tower of this kind has no other."""
    assert isinstance(recording.passage, Row)
    return recording.passage
