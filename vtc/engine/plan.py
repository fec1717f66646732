"""The decision about one batch of prompts: which images are where, what the method keeps, which columns that leaves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtc.engine.choosing import PROJECTOR_INPUT, Chooser, Merged
from vtc.engine.compaction import Compaction
from vtc.engine.context import Frame
from vtc.engine.locate import Located, locate
from vtc.places import Projector
from vtc.tokens import VisualTokens

if TYPE_CHECKING:
    from vtc.engine.inside import Passed


@dataclass(frozen=True)
class Plan:
    """The decision for one batch of prompts.

    Attributes:
        images: what was found, by row.
        keep: bool [G, N], which of each image's tokens stay (on the model's device).
        counts: how many (host integers).
        merged: what stands in the places of those that stay, where the method merges.
        order: of each image LongTensor [k], the tokens that the method chose, in its own order; ``None``: it has none.
        entered: how many there were before a method's first stage, by the identity of the method.
        flat: LongTensor [G, N], where each token sits in the flattened batch; padding points past its end.
        given: tokens of each image that can be seen at all: those that the mask does not hide (host integers).
    """

    images: list[Located]
    keep: Tensor
    counts: tuple[int, ...]
    flat: Tensor
    given: tuple[int, ...]
    merged: Merged | None = None
    order: list[Tensor] | None = None
    entered: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def drops(self) -> bool:
        """Whether anything goes."""
        return self.counts != self.given

    def without_hidden(self, mask: Tensor) -> Plan:
        """The same of what a mask [B, N] does not hide; a host sync, and only where a caller hides image tokens.

        What a method chooses does not depend on the mask; what is hidden leaves with the padding.
        """
        seen = torch.cat([mask.bool().flatten(), mask.new_zeros(1, dtype=torch.bool)]).to(self.flat.device)[self.flat]
        keep = self.keep & seen
        return replace(self, keep=keep, counts=tuple(keep.sum(1).tolist()), given=tuple(seen.sum(1).tolist()))

    def kept(self, batch: int, keep: Tensor | None = None) -> list[list[Tensor]]:
        """Kept indices among each image's tokens, by sample and image; or those of another bool [G, N]."""
        samples: list[list[Tensor]] = [[] for _ in range(batch)]
        for image, row in zip(self.images, (self.keep if keep is None else keep).cpu(), strict=True):
            samples[image.row].append(row.nonzero()[:, 0])
        return samples


@dataclass(frozen=True)
class Prefill:
    """What the last prompt with images came to, to look at afterwards.

    Attributes:
        plan: the entry stage's decision.
        compaction: the columns it left, ``None`` if nothing was dropped.
        lengths: real columns of each sample's prompt, before anything was dropped (host integers).
        history: what was left after each stage inside the model.
    """

    plan: Plan
    compaction: Compaction | None
    lengths: tuple[int, ...]
    history: list[Passed]

    def kept(self) -> list[tuple[int, list[list[Tensor]]]]:
        """(layers run before, kept indices by sample and image): at entry, and after each stage."""
        batch = len(self.lengths)
        inside = [(stage.after, self.plan.kept(batch, stage.alive)) for stage in self.history]
        return [(0, self.plan.kept(batch)), *inside]


def plan(chooser: Chooser, frame: Frame, embeds: Tensor) -> Plan | None:
    """Find the images of a call and let the method choose.

    Args:
        chooser: a method's steps before the language model.
        frame: the call.
        embeds: [B, N, d], what enters the decoder; at placeholders these are the projected features.
    """
    method = chooser.method
    guessed = [m for m in frame.placeholders if m in frame.encoded and not frame.encoded[m].known]
    if guessed and method.reads_layout:
        raise ValueError(
            f"method {method.name!r} reads the structure of the tokens (newlines, crops, frames), and the "
            f"{guessed[0]}s of this prompt were encoded where it could not be heard (before the model was patched?); "
            "pass pixel values to the patched model"
        )
    placeholders = {m: mask for m, mask in frame.placeholders.items() if m in frame.encoded}
    images = locate(placeholders, frame.encoded) if placeholders else []
    if not images:
        return None
    width = embeds.shape[1]
    flat = torch.nn.utils.rnn.pad_sequence(
        [image.row * width + image.columns for image in images],
        batch_first=True,
        padding_value=embeds.shape[0] * width,
    ).to(embeds.device, non_blocking=True)
    decision = decide(chooser, frame, images, flat, embeds)
    if frame.hides and frame.mask is not None and (decision.drops or chooser.goes_on):
        return decision.without_hidden(frame.mask[:, -width:])
    return decision


def decide(chooser: Chooser, frame: Frame, images: list[Located], flat: Tensor, embeds: Tensor) -> Plan:
    """Let the method choose among the tokens of images whose places are known.

    If the method does not look at the host, this and :func:`compaction` are one graph for torch.compile, and with as
    many tokens in every image also one that a CUDA graph can hold.
    """
    features = embeds.detach().flatten(0, 1)[flat.clamp(max=embeds.shape[0] * embeds.shape[1] - 1)]
    tokens = VisualTokens(
        features, tuple(i.layout for i in images), _ordinals(images), samples=tuple(i.row for i in images)
    )
    merged, order = None, None
    entered: dict[int, tuple[int, ...]] = {}
    for step in chooser.steps:
        signals = chooser.signals(step, frame, images, embeds)
        values = signals.pop(PROJECTOR_INPUT.key) if step.stage.at == Projector() else tokens.features
        given = entered.setdefault(id(step.method), tokens.counts)
        kept = step.reduce(replace(tokens, features=values, signals=signals, axes=step.axes, entered=given))
        if kept.features is not None:
            if embeds.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{step.method.name} merges tokens, and no gradient flows through that; run it under "
                    "torch.no_grad(), or train with a method that only drops tokens"
                )
            merged = chooser.merged(step, kept, tokens, merged)
            tokens = replace(tokens, features=merged.features, size=merged.size)
        order = None if kept.order is None else [row[:k] for row, k in zip(kept.order, kept.chosen, strict=True)]
        tokens = replace(tokens, alive=kept.mask, alive_counts=kept.counts)
    return Plan(images, tokens.mask, tokens.counts, flat, tokens.lengths, merged, order, entered)


def _ordinals(images: list[Located]) -> tuple[int, ...]:
    rows = [image.row for image in images]
    return tuple(rows[:g].count(row) for g, row in enumerate(rows))


def compaction(plan: Plan, frame: Frame, shape: torch.Size) -> Compaction:
    """From the plan to the columns that stay in each row: text, kept visual tokens, no padding."""
    batch, width = shape
    device = plan.keep.device
    gone = torch.zeros(batch * width + 1, dtype=torch.bool, device=device)
    gone = gone.scatter(0, plan.flat.flatten(), ~plan.keep.flatten())[:-1].view(batch, width)
    real = None if frame.mask is None else frame.mask[:, -width:].bool()
    keep = ~gone if real is None else ~gone & real.to(device)
    dropped = [0] * batch
    for image, given, count in zip(plan.images, plan.given, plan.counts, strict=True):
        dropped[image.row] += given - count
    lengths = [width] * batch if real is None else frame.lengths
    assert lengths is not None
    return Compaction.of(keep, [n - d for n, d in zip(lengths, dropped, strict=True)], dropped, frame.pad_right)
