"""What a method does before the language model: the images of a call are found, and its steps there decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vtc.engine.compaction import Compaction
from vtc.engine.context import Call
from vtc.engine.locate import Located, by_row, locate, ordinals
from vtc.engine.plan import Merged, Plan, check_no_gradient, columns_of
from vtc.engine.verdict import Judge
from vtc.methods import Method, ModelFacts
from vtc.methods.stages import Kept, Step, steps_of
from vtc.models import Adapter, Parts
from vtc.places import Projector, Tower
from vtc.signals import LEFT, SIZE, ProjectorInput, PromptSignal, Signal, TowerSignal
from vtc.tokens import VisualTokens

PROJECTOR_INPUT = ProjectorInput()


class Chooser:
    """The steps of one settled method on one model."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, facts: ModelFacts | None = None) -> None:
        self.adapter, self.parts, self.method = adapter, parts, method
        every = steps_of(method, facts or adapter.facts(parts))
        self.tower = tuple(step for step in every if isinstance(step.stage.at, Tower))
        """Inside the vision tower, in order."""
        self.steps = tuple(s for s in every[len(self.tower) :] if s.stage.at.before_the_model)
        """Between it and the language model."""
        self.inside = every[len(self.tower) + len(self.steps) :]
        """Between the layers of that."""

    @property
    def goes_on(self) -> bool:
        """Tokens leave inside the language model too, so that padding leaves even if no token does before."""
        return bool(self.inside)

    @property
    def recorded(self) -> tuple[TowerSignal, ...]:
        """What the vision tower is asked for, to be known behind it."""
        return _of_tower(self.steps)

    @property
    def overheard(self) -> tuple[TowerSignal, ...]:
        """What it is asked for at all."""
        return _of_tower((*self.tower, *self.steps))

    def signals(self, step: Step, running: Call, images: list[Located], embeds: Tensor) -> dict[str, Tensor]:
        """What a step asked for, by key: of the tower as it was recorded, of the prompt as it stands."""
        found: dict[str, Tensor] = {}
        for signal in needs_of(step):
            if isinstance(signal, TowerSignal):
                each = [self._recorded(signal, running, image) for image in images]
                found[signal.key] = nn.utils.rnn.pad_sequence(each, batch_first=True)
            elif isinstance(signal, PromptSignal):
                found |= signal.read(embeds, _text(running, embeds), [image.row for image in images])
        return found

    def arrived(self, tokens: VisualTokens, running: Call, images: list[Located]) -> VisualTokens:
        """Without those that left inside the tower. A host sync where an image is several pictures."""
        left = nn.utils.rnn.pad_sequence([self._recorded(LEFT, running, image) for image in images], batch_first=True)
        alive = tokens.mask & (left < 0.5)
        if all(SIZE in running.encoded[image.modality].signals for image in images):
            size = [self._recorded(SIZE, running, image) for image in images]
            tokens = replace(tokens, size=nn.utils.rnn.pad_sequence(size, batch_first=True).clamp(min=1))
        known = [running.encoded[image.modality].left for image in images]
        if any(counts is None for counts in known):
            return replace(tokens, alive=alive, alive_counts=tuple(alive.sum(1).tolist()))
        gone = [sum(left[s] for s in image.sources) for left, image in zip(known, images, strict=True) if left]
        counts = tuple(n - k for n, k in zip(tokens.lengths, gone, strict=True))
        return replace(tokens, alive=alive, alive_counts=counts)

    def _recorded(self, signal: TowerSignal, running: Call, image: Located) -> Tensor:
        values = running.encoded[image.modality].signals.get(signal)
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


def _of_tower(steps: Sequence[Step]) -> tuple[TowerSignal, ...]:
    return tuple(dict.fromkeys(s for step in steps for s in needs_of(step) if isinstance(s, TowerSignal)))


def needs_of(step: Step) -> tuple[Signal, ...]:
    """The signals of a step, and the features themselves where they are not those of the language model."""
    return (*step.stage.needs, PROJECTOR_INPUT) if step.stage.at == Projector() else step.stage.needs


def _text(running: Call, embeds: Tensor) -> Tensor:
    """Bool [B, L]: neither visual nor padding."""
    width = embeds.shape[1]
    text = torch.ones(embeds.shape[:2], dtype=torch.bool)
    for where in running.placeholders.values():
        text &= ~where
    text = text.to(embeds.device, non_blocking=True)
    return text if running.mask is None else text & running.mask[:, -width:].bool().to(text.device)


def plan(chooser: Chooser, running: Call, embeds: Tensor, judge: Judge | None = None) -> Plan | None:
    """Find the images of a call and let the method choose.

    Args:
        chooser: a method's steps before the language model.
        running: the call.
        embeds: [B, N, d], what enters the decoder; at placeholders these are the projected features.
        judge: is asked first whether that pays; ``None``: it is done in any case.
    """
    method = chooser.method
    guessed = [m for m in running.placeholders if m in running.encoded and not running.encoded[m].known]
    if guessed and method.reads_layout:
        raise ValueError(
            f"method {method.name!r} reads the structure of the tokens (newlines, crops, frames), and the "
            f"{guessed[0]}s of this prompt were encoded where that could not be recorded "
            "(before the model was patched?), or make no structure that is known (cut short?); pass pixel values to "
            "the patched model, and see that none is cut"
        )
    placeholders = {m: mask for m, mask in running.placeholders.items() if m in running.encoded}
    images = locate(placeholders, running.encoded) if placeholders else []
    if not images:
        return None
    batch, width = embeds.shape[:2]
    flat = torch.nn.utils.rnn.pad_sequence(
        [image.row * width + image.columns for image in images], batch_first=True, padding_value=batch * width
    ).to(embeds.device, non_blocking=True)
    verdict = None if judge is None else judge(images, running.lengths or [width] * batch, width)
    if verdict is not None and not verdict.pays:
        decision = Plan.of_all(images, flat, verdict)
    else:
        decision = replace(decide(chooser, running, images, flat, embeds), verdict=verdict)
    if running.hides and running.mask is not None and (decision.drops or decision.left_alone or chooser.goes_on):
        return decision.without_hidden(running.mask[:, -width:])
    return decision


def decide(chooser: Chooser, running: Call, images: list[Located], flat: Tensor, embeds: Tensor) -> Plan:
    """Let the method choose among the tokens of images whose places are known.

    If the method does not look at the host, this and :func:`compaction` are one graph for torch.compile, and with as
    many tokens in every image also one that a CUDA graph can hold.
    """
    features = embeds.detach().flatten(0, 1)[flat.clamp(max=embeds.shape[0] * embeds.shape[1] - 1)]
    tokens = VisualTokens(
        features, tuple(i.layout for i in images), ordinals(images), samples=tuple(i.row for i in images)
    )
    merged, order = None, None
    chosen: tuple[int, ...] = ()
    entered = {id(step.method): tokens.counts for step in chooser.tower}
    if chooser.tower:
        tokens = chooser.arrived(tokens, running, images)
    for step in chooser.steps:
        signals = chooser.signals(step, running, images, embeds)
        values = signals.pop(PROJECTOR_INPUT.key) if step.stage.at == Projector() else tokens.features
        given = entered.setdefault(id(step.method), tokens.counts)
        kept = step.reduce(replace(tokens, features=values, signals=signals, axes=step.axes, entered=given))
        if kept.features is not None:
            check_no_gradient(step.method.name, embeds)
            merged = chooser.merged(step, kept, tokens, merged)
            tokens = replace(tokens, features=merged.features, size=merged.size)
        order, chosen = kept.order, kept.chosen
        tokens = replace(tokens, alive=kept.mask, alive_counts=kept.counts)
    return Plan(images, tokens.mask, tokens.counts, flat, tokens.lengths, merged, order, chosen, entered, tokens.size)


def compaction(plan: Plan, running: Call, shape: torch.Size) -> Compaction:
    """From the plan to the columns that stay in each row: text, kept visual tokens, no padding."""
    batch, width = shape
    gone = columns_of(~plan.keep, plan.flat, batch, width)
    real = None if running.mask is None else running.mask[:, -width:].bool()
    keep = ~gone if real is None else ~gone & real.to(gone.device)
    left = [given - count for given, count in zip(plan.given, plan.counts, strict=True)]
    dropped = by_row(plan.images, left, batch)
    lengths = [width] * batch if real is None else running.lengths
    assert lengths is not None
    return Compaction.of(keep, [n - d for n, d in zip(lengths, dropped, strict=True)], dropped, running.pad_right)
