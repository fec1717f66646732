"""Stages in towers where each picture is a row of its own.

Of every picture equally many patches stay, so that the tower stays rectangular and nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.arguments import MASK
from vtc.dialect.towers import Given
from vtc.engine.context import Recording, recording_of
from vtc.engine.passage import Departure, Passage, wide
from vtc.engine.stages import Hook, StagesOfTower
from vtc.methods.stages import Step
from vtc.models.base import square
from vtc.signals import TowerSignal
from vtc.tokens import Layout, VisualTokens


class PatchStages(StagesOfTower):
    """A patch is a row, and leaves alone."""

    def hooks_behind(self) -> Iterator[Hook]:
        """On the last block, and on what projects patch by patch."""
        yield self.tower.layers[-1], self.after_last_block, False
        if self.tower.projector is not None:
            yield self.tower.projector, self.before_projector, True
            yield self.tower.projector, self.after_projector, False

    # -- in the tower ---------------------------------------------------------------------------------------------

    def cut(self, call: Given, recording: Recording) -> None:
        """The mask that the block was given for all patches."""
        passage = _passage(recording)
        if isinstance(mask := call[MASK], Tensor) and mask.shape[-1] == passage.special + passage.patches:
            call[MASK] = passage.seen(mask)

    def reduced(self, step: Step, recording: Recording, hidden: Tensor) -> Tensor:
        """The rows [P, special + K, width] that stay of [P, special + M, width]."""
        special = self.tower.special
        if recording.passage is None:
            restores = self._restores(step, recording.modality)
            recording.passage = Passage(special, hidden.shape[1] - special, restores)
        passage = _passage(recording)
        state = hidden[:, special:]
        tokens = self._tokens(step, recording, passage, state)
        kept = step.reduce(tokens)
        if len(set(kept.counts)) > 1:
            raise ValueError(
                f"{step.method.name!r} would keep {sorted(set(kept.counts))} patches of pictures of one size, and a "
                "vision tower needs equally many of each"
            )
        if kept.features is not None:
            new, where = kept.features, kept.written
            assert where is not None
            full = torch.where(where[..., None], new.to(state.dtype), passage.spread(state))
            state = full if passage.there is None else full.gather(1, wide(passage.there, full.shape[2]))
            if kept.size is not None:
                before = torch.ones_like(kept.size) if passage.size is None else passage.size
                passage.size = torch.where(where, kept.size, before)
        mask = kept.mask if passage.there is None else kept.mask.gather(1, passage.there)
        k = kept.counts[0]
        departure = Departure.of(mask, k, state.detach(), passage.restores)
        passage.departures.append(departure)
        passage.there = departure.stays if passage.there is None else passage.there.gather(1, departure.stays)
        state = state.gather(1, wide(departure.stays, state.shape[2]))
        return torch.cat([hidden[:, :special], state], 1)

    def _restores(self, step: Step, modality: str) -> bool:
        at: Any = step.stage.at
        must = self.adapter.reduces(self.parts.base, modality) == "restore"
        if must and at.restore is False:
            raise ValueError(
                f"{step.method.name!r} would leave holes where one token of a {modality} is made of several patches; "
                "restore=True, or None, brings them back behind the tower"
            )
        return must if at.restore is None else at.restore

    def _tokens(self, step: Step, recording: Recording, passage: Passage, state: Tensor) -> VisualTokens:
        """The patches of all pictures, each at its place; a picture is an image of its own."""
        pictures, n = len(state), passage.patches
        now = (state.shape[1],) * pictures
        tokens = VisualTokens(
            passage.spread(state.detach()),
            (Layout.plain(n, square(n)),) * pictures,
            (0,) * pictures,  # what is drawn at random must not depend on the other pictures
            {signal.key: recording[signal][-1] for signal in step.stage.needs if isinstance(signal, TowerSignal)},
            step.axes,
            tuple(range(pictures)),
            entered=passage.entered.setdefault(id(step.method), now),
            size=passage.size,
        )
        if passage.there is None:
            return tokens
        alive = torch.zeros(pictures, n, dtype=torch.bool, device=state.device).scatter(1, passage.there, True)
        return replace(tokens, alive=alive, alive_counts=now)

    # -- behind it ------------------------------------------------------------------------------------------------

    def after_last_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """All places again, before norms and poolings that would take what is missing for something else."""
        if (recording := recording_of(self.parts)) is None or recording.passage is None:
            return None
        passage = _passage(recording)
        if isinstance(output, tuple):
            return (passage.whole(output[0]), *output[1:])
        return passage.whole(output)

    def gone(self, recording: Recording) -> Tensor:
        """Float [P, N]; what is restored has not left."""
        passage = _passage(recording)
        assert passage.there is not None
        pictures, left = len(passage.there), passage.patches - passage.there.shape[1]
        if passage.restores:
            gone = torch.zeros(pictures, passage.patches, device=passage.there.device)
        else:
            gone = torch.ones(pictures, passage.patches, device=passage.there.device).scatter(1, passage.there, 0.0)
        recording.left += [0 if passage.restores else left] * pictures
        recording.passed.append(passage)
        return gone

    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Zeros need no projecting."""
        passage = self._dropped(args)
        if passage is None:
            return None
        passage.front = args[0].shape[1] - passage.patches
        return (args[0].gather(1, wide(passage.columns(passage.front), args[0].shape[2])), *args[1:]), kwargs

    def after_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """They come back behind it."""
        recording = recording_of(self.parts)
        passage = recording.passed[0] if recording is not None and recording.passed else None
        if passage is None or (front := passage.front) is None:
            return None
        passage.front = None
        out = output.new_zeros(len(output), front + passage.patches, output.shape[2])
        return out.scatter(1, wide(passage.columns(front), output.shape[2]), output)

    def _dropped(self, args: tuple[Any, ...]) -> Passage | None:
        """The passage whose pictures enter the projector, each with all of its places."""
        recording = recording_of(self.parts)
        if recording is None or len(recording.passed) != 1 or not args or not isinstance(args[0], Tensor):
            return None
        passage, given = recording.passed[0], args[0]
        assert passage.there is not None
        fits = given.dim() == 3 and len(given) == len(passage.there)
        fits = fits and given.shape[1] - passage.patches in (0, passage.special)
        return None if passage.restores or not fits else passage


def _passage(recording: Recording) -> Passage:
    """The run under way; a tower of this kind has no other."""
    assert isinstance(recording.passage, Passage)
    return recording.passage
