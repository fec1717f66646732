"""The handle of a patched model: what stayed of the last prompt, and the way back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc.config import CompressionConfig
from vtc.costs import Decoder
from vtc.dialect.modules import without_adapters
from vtc.engine.alone import AloneStages
from vtc.engine.entry import EntryStage
from vtc.engine.locate import by_row
from vtc.methods import Method
from vtc.report import Report
from vtc.tokens import Layout

HANDLE = "_vtc_patch"
"""Where a patched model keeps its handle."""


class Patch:
    """A patched model's handle; also a context manager that unpatches on exit.

    Attributes:
        model: the model as transformers made it (inside a PEFT wrapper, the wrapped one).
        config: what was asked for; ``config.save_pretrained(folder)`` writes it beside a model.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, stage: EntryStage) -> None:
        self.model, self.config = model, config
        self.stage = stage
        self.undo: list[Callable[[], None]] = []
        self._warned = False

    @property
    def method(self) -> Method:
        """The method object that selects."""
        return self.stage.method

    @property
    def last_keep(self) -> list[list[Tensor]] | None:
        """What stayed in the last prefill: a list over samples of lists over images of LongTensor [k] (on the host).

        Each holds the kept indices among that image's visual tokens (newlines counted), ascending; beams count as
        samples. For a method with stages inside the language model these are the survivors of the last one that left
        any: where everything visual went (ToDRE's second), only :attr:`last_stages` shows it. ``None`` before the
        first prompt with an image. Reading it waits for the device.
        """
        if self.stage.last is None:
            return None
        every = [kept for _, kept in self.stage.last.kept()]
        found, steps = every[-1], zip(self.stage.layers.steps, every, every[1:], strict=False)
        for had, left in [(had, left) for step, had, left in steps if step.stage.all_or_nothing][::-1]:
            found = [row if any(map(len, b)) else a for row, a, b in zip(found, had, left, strict=True)]
        return found

    @property
    def last_order(self) -> list[list[Tensor | None]] | None:
        """What the method chose before the language model in the last prefill, in the order in which it did.

        As :attr:`last_keep`: LongTensor on the host, a permutation of what the first entry of :attr:`last_stages` has,
        without newline tokens that stayed unasked (``newlines="keep"``). ``None`` for an image where there is no such
        order: nothing was dropped, budgets were shared out over parts of it, or a mask hides some of it.
        """
        if (last := self.stage.last) is None:
            return None
        samples: list[list[Tensor | None]] = [[] for _ in last.lengths]
        kept = last.kept()[0][1]
        for g, image in enumerate(last.plan.images):
            left = kept[image.row][len(samples[image.row])]
            order = None if last.plan.order is None else last.plan.order[g, : last.plan.chosen[g]].cpu()
            unasked = set(image.layout.newlines()) if self.method.newlines == "keep" else set()
            whole = order is not None and set(order.tolist()) == set(left.tolist()) - unasked
            samples[image.row].append(order if whole else None)
        return samples

    @property
    def last_stages(self) -> list[tuple[int, list[list[Tensor]]]]:
        """What was still there along the last prefill: (layers run before, kept indices as in :attr:`last_keep`).

        The first entry is what entered the language model, (0, ...); one more for each stage inside it.
        """
        return [] if self.stage.last is None else self.stage.last.kept()

    def later_turn(self) -> None:
        """Warn, once, that what the first question dropped is missing for the next one."""
        if not self.method.query_aware or self._warned or self.stage.last is None:
            return
        self._warned = True
        given = sum(self.stage.last.plan.given)
        left = sum(len(kept) for images in self.last_stages[-1][1] for kept in images)
        warnings.warn(
            f"{self.method.name} chose by the earlier question: {given - left} of {given} visual tokens are gone from "
            "this cache, and the new question may be about them. Start a new cache, or use a method that is blind to "
            "the question.",
            stacklevel=4,
        )

    def report(self) -> Report:
        """Tokens per layer, their average, and the language model's FLOPs for the last prompt with images.

        With ``when="worthwhile"`` also whether that prompt was pruned or left alone, and why.

        Raises:
            ValueError: there was none yet.
        """
        if (last := self.stage.last) is None:
            raise ValueError("nothing to report: run a prompt with an image through the patched model first")
        given = by_row(last.plan.images, last.plan.given, len(last.lengths))
        kept = last.kept()
        stages = [(after, [sum(map(len, images)) for images in samples]) for after, samples in kept]
        report = Report.of(Decoder.of(self.stage.parts.decoder), last.lengths, given, stages)
        return dataclasses.replace(report, layouts=self.last_layouts or [], stages=kept, verdict=last.plan.verdict)

    @property
    def last_layouts(self) -> list[list[Layout]] | None:
        """The structure of the tokens that the indices in :attr:`last_keep` count: grids, crops, frames, newlines."""
        if self.stage.last is None:
            return None
        samples: list[list[Layout]] = [[] for _ in self.stage.last.lengths]
        for image in self.stage.last.plan.images:
            samples[image.row].append(image.layout)
        return samples

    @property
    def last_columns(self) -> list[Tensor] | None:
        """Columns of the last prompt that reached the end of the language model: a LongTensor per sample, ascending.

        Logits and labels of a plain forward pass line up with these columns, not with the prompt's.
        """
        if (last := self.stage.last) is None or last.compaction is None:
            return None
        if last.history:
            end = last.history[-1]
            return [index[valid] for index, valid in zip(end.index.cpu(), end.valid.cpu(), strict=True)]
        return [row.nonzero()[:, 0] for row in last.compaction.keep.cpu()]

    @property
    def active(self) -> bool:
        """Whether the model is still patched."""
        return bool(self.undo)

    def unpatch(self) -> None:
        """Restore the model exactly.

        Raises:
            ValueError: it was unpatched already.
        """
        if not self.undo:
            raise ValueError(f"this {type(self.model).__name__} is not patched: nothing to undo")
        while self.undo:  # interrupted, it goes on where it was when it is called again
            self.undo[-1]()
            self.undo.pop()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        how = f"positions={self.config.positions!r}"
        if self.config.calibration is not None:
            how += f" calibration={self.config.calibration!r}"
        if self.config.when != "always":
            how += f" when={self.config.when!r}"
        return f"<vtc.Patch {self.method} {how} on {type(self.model).__name__}, {state}>"

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a patched model cannot be copied: its hooks belong to the original. vtc.unpatch it first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: its hooks belong to this process. vtc.unpatch it first, or save its "
            "state_dict() or save_pretrained(), which a patch leaves as they are"
        )


class ClassifierPatch(Patch):
    """The same of an image classifier. There is no prompt: of what :class:`Patch` tells, only what is below."""

    def __init__(self, model: nn.Module, config: CompressionConfig, alone: AloneStages) -> None:
        super().__init__(model, config, alone)  # type: ignore[arg-type]
        self.alone = alone

    @property
    def last_keep(self) -> list[list[Tensor]] | None:
        """The patches that were left at the end of the last run, ascending: for each picture, a list of one tensor.

        ``None`` before the first. Reading it waits for the device.
        """
        return self.alone.kept()

    def report(self) -> Report:
        """There is no language model to report on.

        Raises:
            ValueError: always.
        """
        raise ValueError("an image classifier has no prompt to report on; p.last_keep has the patches that were left")


def patch_of(model: nn.Module) -> Patch | None:
    """The handle of a patched model, else ``None``."""
    return getattr(without_adapters(model), "__dict__", {}).get(HANDLE)
