"""What a method does before the language model: its steps there, the signals they need, the values they leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtc.engine.context import Frame
from vtc.engine.locate import Located
from vtc.methods import Method, ModelFacts
from vtc.methods.stages import Kept, Step, steps_of
from vtc.models import Adapter, Parts
from vtc.places import Projector
from vtc.signals import ProjectorInput, PromptSignal, Signal, TowerSignal
from vtc.tokens import VisualTokens

PROJECTOR_INPUT = ProjectorInput()


@dataclass(frozen=True)
class Merged:
    """New values of visual tokens, in the embedding space of the language model.

    Attributes:
        features: float [G, N, d]; old values where nothing was written.
        written: bool [G, N], where there is a new one.
        size: float32 [G, N], how many tokens a place stands for.
    """

    features: Tensor
    written: Tensor
    size: Tensor

    def into(self, embeds: Tensor, flat: Tensor) -> Tensor:
        """Write them into embeddings [B, L, d]; LongTensor ``flat`` [G, N] says where each token sits."""
        end = embeds.shape[0] * embeds.shape[1]
        rows = torch.cat([embeds.flatten(0, 1), embeds.new_zeros(1, embeds.shape[2])])
        place = flat.masked_fill(~self.written, end).flatten()
        return rows.index_copy(0, place, self.features.flatten(0, 1).to(rows.dtype))[:-1].view_as(embeds)


class Chooser:
    """The steps of one settled method on one model."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, facts: ModelFacts | None = None) -> None:
        self.adapter, self.parts, self.method = adapter, parts, method
        every = steps_of(method, facts or adapter.facts(parts))
        self.steps = tuple(step for step in every if step.stage.at.before_the_model)
        """Before the language model, in order."""
        self.inside = every[len(self.steps) :]
        """Between its layers."""

    @property
    def goes_on(self) -> bool:
        """Tokens leave inside the language model too, so that padding leaves even if no token does before."""
        return bool(self.inside)

    @property
    def recorded(self) -> tuple[TowerSignal, ...]:
        """What the vision tower is asked for."""
        return tuple(dict.fromkeys(s for step in self.steps for s in needs_of(step) if isinstance(s, TowerSignal)))

    def signals(self, step: Step, frame: Frame, images: list[Located], embeds: Tensor) -> dict[str, Tensor]:
        """What a step asked for, by key: of the tower as it was recorded, of the prompt as it stands."""
        found: dict[str, Tensor] = {}
        for signal in needs_of(step):
            if isinstance(signal, TowerSignal):
                each = [self._recorded(signal, frame, image) for image in images]
                found[signal.key] = nn.utils.rnn.pad_sequence(each, batch_first=True)
            elif isinstance(signal, PromptSignal):
                found |= signal.read(embeds, _text(frame, embeds), [image.row for image in images])
        return found

    def _recorded(self, signal: TowerSignal, frame: Frame, image: Located) -> Tensor:
        values = frame.encoded[image.modality].signals.get(signal)
        if values is None or not image.sources:
            raise ValueError(
                f"method {self.method.name!r} needs the signal {signal.key!r}, but the images of this prompt were "
                "encoded where it could not be recorded (before the model was patched?); pass pixel values to the "
                "patched model"
            )
        return torch.cat([values[source] for source in image.sources])

    def merged(self, step: Step, kept: Kept, tokens: VisualTokens, before: Merged | None) -> Merged:
        """New values after a step, on top of those before it; what stands before the projector goes through it."""
        values, written = kept.features, kept.written
        assert values is not None
        assert written is not None
        if step.stage.at == Projector():
            written = written & tokens.where("image", "thumbnail", "crops", "frame")  # a newline does not come from it
            values = self._projected(values, written, max(kept.chosen), tokens.features)
        features = torch.where(written[..., None], values.to(tokens.features.dtype), tokens.features)
        size = torch.ones_like(written, dtype=torch.float32) if tokens.size is None else tokens.size
        if kept.size is not None:
            size = torch.where(written, kept.size.float(), size)
        return Merged(features, written if before is None else written | before.written, size)

    def _projected(self, values: Tensor, written: Tensor, longest: int, like: Tensor) -> Tensor:
        """Rows [G, N, c] that are written, through the projector: [G, N, d]."""
        tower = self.adapter.tower(self.parts.base, "image")
        projector = None if tower is None else tower.projector
        assert projector is not None  # or the method was refused
        index = (~written).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        rows = values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
        weight = next(projector.parameters())
        projected = projector(rows.to(weight.dtype)).to(like.dtype)
        return torch.zeros_like(like).scatter(1, index[..., None].expand_as(projected), projected)


def needs_of(step: Step) -> tuple[Signal, ...]:
    """The signals of a step, and the features themselves where they are not those of the language model."""
    return (*step.stage.needs, PROJECTOR_INPUT) if step.stage.at == Projector() else step.stage.needs


def _text(frame: Frame, embeds: Tensor) -> Tensor:
    """Bool [B, L]: neither visual nor padding."""
    width = embeds.shape[1]
    text = torch.ones(embeds.shape[:2], dtype=torch.bool)
    for where in frame.placeholders.values():
        text &= ~where
    text = text.to(embeds.device, non_blocking=True)
    return text if frame.mask is None else text & frame.mask[:, -width:].bool().to(text.device)
