"""What is in the sequence between two decoder layers of one prefill: which columns, and where the images are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.engine.compaction import Compaction, StageResult
from vtc.engine.keys import Keys
from vtc.engine.locate import by_row, ordinals
from vtc.engine.plan import Plan, columns_of, written_into
from vtc.engine.rows import at_the_end, at_the_end_of
from vtc.methods.stages import Kept, Step
from vtc.ops.gather import gather_columns
from vtc.signals import DecoderSignal
from vtc.tokens import VisualTokens


@dataclass
class LayerState:
    """Grows shorter from stage to stage.

    Attributes:
        plan: the images, and what the entry stage kept of them.
        index: LongTensor [B, M], columns of the call that the sequence now holds, in order.
        valid: bool [B, M], False at padding and holes.
        counts: valid columns of each row (host integers).
        pad_right: padding stands at the end of rows.
        width: columns of the call, before anything left.
        relative: LongTensor [B, M], the same columns counted among those that entered the first layer.
        alive: bool [G, N], tokens of each image that are still there.
        alive_counts: how many (host integers).
        entered_counts: how many there were before a method's first stage, by the identity of the method.
        size: float32 [G, N], how many tokens a place stands for, ``None``: one each.
        stages_done: how many stages have been passed.
        signals: what stages ahead ask for, as far as it is known; sums of watched modules go on growing.
        where: LongTensor [G, N], where each token sits in the flattened sequence; renewed when columns leave.
        visual: bool [B, M], the columns of visual tokens; renewed with it.
        masks: masks made for the present stage, by layer type.
        rotary: rotary embeddings of the present columns, by the identity of the whole ones.
        history: what was left after each stage.
        lengths: columns of each row that were real before anything left (host integers).
        entered: columns that entered the first layer.
        starts: by layer type, where this call's keys begin in the masks that the base model prepared.
        head: bool [B, past], what is no padding among the keys stored before this call, ``None`` if all of it.
        past: keys stored before this call, in the layers of the present stage.
    """

    plan: Plan
    index: Tensor
    valid: Tensor
    counts: list[int]
    pad_right: bool
    width: int
    relative: Tensor
    alive: Tensor
    alive_counts: tuple[int, ...]
    entered_counts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    size: Tensor | None = None
    stages_done: int = 0
    signals: dict[DecoderSignal, Any] = field(default_factory=dict)
    masks: dict[str | None, Any] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    where: Tensor = field(init=False)
    visual: Tensor = field(init=False)
    history: list[StageResult] = field(default_factory=list)
    lengths: tuple[int, ...] = ()
    entered: int = 0
    starts: dict[str | None, int] = field(default_factory=dict)
    head: Tensor | None = None
    past: int = 0

    @classmethod
    def begin(cls, plan: Plan, compact: Compaction, pad_right: bool, starts: dict[str | None, int]) -> LayerState:
        """At the first layer, after the entry stage left ``compact``."""
        relative = torch.arange(compact.length, device=compact.index.device).expand_as(compact.index)
        inside = cls(
            plan,
            compact.index,
            compact.valid,
            list(compact.counts),
            pad_right,
            compact.width,
            relative,
            plan.keep,
            plan.counts,
            dict(plan.entered),
            plan.size,
            lengths=tuple(n + d for n, d in zip(compact.counts, compact.dropped, strict=True)),
            entered=compact.length,
            starts=starts,
        )
        inside._locate()
        return inside

    def padding(self, past: int, head: Tensor | None) -> Tensor | None:
        """Bool [B, past + M], what is no padding among stored keys and present columns; ``None`` if all of it.

        Args:
            past: keys that a layer stored before this call.
            head: [B, past], what is no padding among them, ``None`` if all of it.
        """
        if head is None:
            if min(self.counts) == self.index.shape[1]:
                return None
            head = self.valid.new_ones(len(self.valid), past)
        return torch.cat([head.bool(), self.valid], dim=1)

    def seen_by_row(self) -> list[int]:
        """Visual tokens in each row."""
        return by_row(self.plan.images, self.alive_counts, len(self.counts))

    def _locate(self) -> None:
        """Set ``where``: anything past the flattened sequence [B * M] is gone; and ``visual``."""
        batch, length = self.index.shape
        gone = batch * length
        slot = torch.arange(gone, device=self.index.device).view(batch, length)
        column = torch.arange(batch, device=slot.device)[:, None] * self.width + self.index
        # holes repeat some column that left: they must not claim its place
        place = torch.full((batch * self.width + 2,), gone, dtype=torch.long, device=slot.device)
        place = place.scatter(0, column.masked_fill(~self.valid, batch * self.width + 1).flatten(), slot.flatten())
        place[-1] = gone
        self.where = place[self.plan.flat].masked_fill(~self.alive, gone)
        visual = torch.zeros(gone + 1, dtype=torch.bool, device=self.index.device)
        self.visual = visual.scatter(0, self.where.flatten(), True)[:-1].view(batch, length)

    def text_behind(self) -> tuple[Tensor, int]:
        """Bool [B, M]: real text after the last visual token of each row that has one; and the longest such run."""
        last = torch.full((len(self.index),), self.width, dtype=torch.long)
        for image in self.plan.images:
            row, end = image.row, int(image.columns[-1])
            last[row] = end if last[row] == self.width else max(int(last[row]), end)
        behind = self.valid & (self.index > last.to(self.index.device)[:, None])
        return behind, int((self.width - 1 - last).clamp(min=0).max())

    def keys(self) -> Keys:
        """What calibrated attention has to know of the present columns."""
        size = torch.ones_like(self.where, dtype=torch.float32) if self.size is None else self.size
        return Keys.of(columns_of(size, self.where, len(self.index), self.index.shape[1], 1.0), self.visual)

    def per_token(self, columns: Tensor) -> Tensor:
        """Of columns [B, M, ...], those of the images' tokens [G, N, ...], 0 where gone."""
        flat = columns.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.where]

    def per_text(self, columns: Tensor) -> Tensor:
        """Of columns [B, M, ...], those of the text behind the images [G, T, ...], at the end; 0 in front of them."""
        which, longest = self.text_behind()
        index = at_the_end(which, longest, self.valid)
        there = which.gather(1, index).view(*index.shape, *(1,) * (columns.dim() - 2))
        (rows,) = gather_columns((columns,), index)
        rows = at_the_end_of(rows.masked_fill(~there, 0), max(1, longest))  # as many as ever, however few are left
        return self.per_image(rows)

    def per_image(self, scores: Tensor) -> Tensor:
        """Of samples [B, ...], those of the images [G, ...]."""
        rows = torch.tensor([image.row for image in self.plan.images])
        return scores[rows.to(scores.device, non_blocking=True)]

    def tokens(self, step: Step, hidden: Tensor) -> VisualTokens:
        """What a method sees at one of its stages."""
        flat = hidden.detach().flatten(0, 1)
        signals: dict[str, Tensor] = {}
        for signal in step.stage.needs:
            found = self.signals[signal]  # type: ignore[index]
            signals |= found if isinstance(found, dict) else {signal.key: found}
        tokens = VisualTokens(
            flat[self.where.clamp(max=len(flat) - 1)],
            tuple(image.layout for image in self.plan.images),
            ordinals(self.plan.images),
            signals,
            step.axes,
            tuple(image.row for image in self.plan.images),
            self.alive,
            self.alive_counts,
            self.entered_counts.setdefault(id(step.method), self.alive_counts),
            self.size,
        )
        return tokens.with_signals_cleared()

    def merge(self, kept: Kept, hidden: Tensor) -> Tensor:
        """Hidden states [B, M, d] with the new values of a step written in."""
        if kept.features is None or kept.written is None:
            return hidden
        if kept.size is not None:
            size = torch.ones_like(kept.size) if self.size is None else self.size
            self.size = torch.where(kept.written, kept.size, size)
        return written_into(hidden, self.where, kept.written, kept.features)

    def drop(self, keep: Tensor, kept: tuple[int, ...], hidden: Tensor) -> tuple[bool, Tensor]:
        """Forget what the method did not keep; whether that left holes, and hidden states [B, M, d] without it."""
        batch, length = self.index.shape
        gone = columns_of(~keep, self.where, batch, length)
        left = [before - after for before, after in zip(self.alive_counts, kept, strict=True)]
        dropped = by_row(self.plan.images, left, batch)
        counts = [n - d for n, d in zip(self.counts, dropped, strict=True)]
        compact = Compaction.of(self.valid & ~gone, counts, dropped, self.pad_right)
        hidden, self.index, self.relative = compact.sequences(hidden, self.index, self.relative)
        self.valid, self.counts = compact.valid, counts
        self.alive, self.alive_counts = self.alive & keep, kept
        self._locate()
        self.masks.clear()
        self.rotary.clear()
        return compact.holes, hidden
