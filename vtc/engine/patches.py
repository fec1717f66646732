"""Stages in towers where each picture is a row of its own.

Of every picture equally many patches stay, so that the tower stays rectangular and nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.arguments import HIDDEN, MASK
from vtc.dialect.modules import adds_masks, attention_of
from vtc.dialect.towers import Given, Tower, spelling
from vtc.engine.context import Recording, recording_of
from vtc.engine.passage import Departure, Passage, wide
from vtc.engine.plan import check_no_gradient
from vtc.engine.stages import Hook, StagesOfTower
from vtc.methods import Method
from vtc.methods.stages import Step
from vtc.models.base import square
from vtc.signals import SIZE, TowerSignal
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

    def cut(self, index: int, call: Given, recording: Recording) -> None:
        """The mask that the block was given for all patches; what merged may weigh more in it."""
        passage = _passage(recording)
        if isinstance(mask := call[MASK], Tensor) and mask.shape[-1] == passage.special + passage.patches:
            call[MASK] = passage.seen(mask)
        if passage.proportional and passage.size is not None:
            call[MASK] = self._weighed(index, passage, call[MASK], call[HIDDEN])

    def _weighed(self, index: int, passage: Passage, mask: Tensor | None, hidden: Tensor) -> Tensor:
        if (reason := unfit_for_masks(self.tower, index)) is not None:
            raise RuntimeError(f"since vtc.patch, that of the vision tower was switched, and {reason}; switch it back")
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        given = isinstance(mask, Tensor) and mask.is_floating_point()
        return passage.weighed(mask, mask.dtype if mask is not None and given else dtype)

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
            check_no_gradient(step.method.name, state)
            new, where = kept.features, kept.written
            assert where is not None
            full = torch.where(where[..., None], new.to(state.dtype), passage.spread(state))
            state = full if passage.there is None else full.gather(1, wide(passage.there, full.shape[2]))
            if kept.size is not None:
                before = torch.ones_like(kept.size) if passage.size is None else passage.size
                passage.size = torch.where(where, kept.size, before)
                passage.proportional |= step.stage.at.proportional  # type: ignore[attr-defined]
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
                + instead_of_holes(step.method)
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
        if passage.size is not None:
            recording.setdefault(SIZE, []).append(passage.size.masked_fill(gone > 0, 0.0))
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


def unfit_for_masks(tower: Tower, block: int) -> str | None:
    """Why nothing can be added to the logits of a block's attention, ``None`` if a mask can do it."""
    attends = tower.attention(block)
    config = getattr(attends, "config", None) or getattr(tower.module, "config", None)
    if not adds_masks(found := attention_of(config)):
        return f"the attention implementation {found!r} adds no mask to the logits"
    blind = next((m for m in (tower.layers[block], attends) if m is not None and spelling(m).name(MASK) is None), None)
    return None if blind is None else f"its {type(blind).__name__} takes no mask"


def instead_of_holes(method: Method) -> str:
    """What would work for a method where one token is made of several patches."""
    if hasattr(method, "restore"):
        return "restore=True, or None, brings them back behind the tower"
    return f"what merged cannot be brought back. What would work: {method.remedy}"
