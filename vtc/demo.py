"""The demo: the shipped model answers questions about pictures, with all of its visual tokens and with a part of them.

Both ways run on the same batches, in turns, inside one process, so that a machine that slows down slows both. The
command line prints what :func:`run_demo` returns.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc_tinyvlm
from vtc.config import CompressionConfig
from vtc.demo_photo import Photograph, ask_photograph
from vtc.devices import device_name
from vtc.patching import patch
from vtc.profiling.intervals import wilson
from vtc.profiling.spread import Spread
from vtc.profiling.timing import PrefillTime, rounds
from vtc.viz import overlay as draw
from vtc_tinyvlm.evaluate import generate, prepare

UNCOUNTED = "count"
"""The question type left out of the headline accuracy: how many tokens of an object remain changes the answer, though
no object was lost. It is shown beside the others."""


@dataclass(frozen=True)
class Accuracy:
    """Right answers among all, with a Wilson 95 % interval."""

    right: int
    total: int

    @property
    def rate(self) -> float:
        """Share of right answers; NaN where nothing was asked."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %."""
        return wilson(self.right, self.total)


@dataclass(frozen=True)
class DemoRun:
    """One way of running the model: pruned, or not.

    Attributes:
        accuracy: by type of question.
        answers: to all questions.
        total: seconds of a prefill.
        decoder: of these, those behind the projector: selection and language model.
        cache_bytes: keys and values of one question.
        tokens: visual tokens of one image.
    """

    accuracy: dict[str, Accuracy]
    answers: list[str]
    total: Spread
    decoder: Spread
    cache_bytes: float
    tokens: float

    def headline(self) -> Accuracy:
        """Accuracy over all types but :data:`UNCOUNTED`."""
        counted = [a for kind, a in self.accuracy.items() if kind != UNCOUNTED]
        return Accuracy(sum(a.right for a in counted), sum(a.total for a in counted))


@dataclass(frozen=True)
class DemoResult:
    """Everything `vtc demo` prints.

    Attributes:
        config: how it was pruned.
        full: the model as it is.
        pruned: the same, pruned.
        speedup_total: seconds of an unpruned prefill / those of the pruned one beside it.
        speedup_decoder: the same for selection and language model alone.
        batch: questions of a timed prefill.
        repeats: timed pairs of prefills.
        question: the first one.
        answer: to it, the right one.
        overlay: the picture with the kept tokens, if one was written.
        photograph: a question to the model on a pretrained encoder, where that is on this machine.
        machine: what the timing ran on.
    """

    config: CompressionConfig
    full: DemoRun
    pruned: DemoRun
    speedup_total: Spread
    speedup_decoder: Spread
    batch: int
    repeats: int
    question: str
    answer: str
    overlay: Path | None
    photograph: Photograph | None
    machine: str


def run_demo(
    config: CompressionConfig,
    *,
    questions: int = 300,
    batch: int = 32,
    repeats: int = 7,
    overlay: Path | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda message: None,
) -> DemoResult:
    """Ask the shipped model ``questions`` questions unpruned and pruned, time both, and draw the first picture.

    Args:
        config: how to prune.
        questions: how many of the evaluation split's questions are asked.
        batch: questions per batch, for the answers and for the timing.
        repeats: timed pairs of prefills, after one untimed pair.
        overlay: where to write the picture with the kept tokens; ``None`` writes none.
        device: where the model runs.
        progress: called with a line of text at the start of each phase.
    """
    if min(questions, batch, repeats) < 1:
        raise ValueError(f"{questions=}, {batch=} and {repeats=} must be at least 1")
    progress("loading the shipped model")
    model, processor = vtc_tinyvlm.load()
    model = model.to(device).eval()
    asked = vtc_tinyvlm.evaluation_questions(questions)
    prepared = prepare(asked, processor, batch)
    batches = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in prepared]

    pruning = functools.partial(patch, model, config)
    progress(f"asking {len(asked)} questions, unpruned and pruned")
    full_answers, _ = _ask(model, processor, batches, contextlib.nullcontext)
    pruned_answers, kept = _ask(model, processor, batches, pruning)
    progress(f"timing {repeats} pairs of prefills")
    plain, short = rounds(model, [(contextlib.nullcontext, batches[0]), (pruning, batches[0])], repeats)
    pairs = list(zip(plain, short, strict=True))

    size = len(batches[0]["input_ids"])
    tokens = sum(int((inputs["input_ids"] == model.config.image_token_id).sum()) for inputs in batches) / len(asked)
    full = _summarised(asked, full_answers, plain, size, tokens)
    pruned = _summarised(asked, pruned_answers, short, size, sum(map(len, kept)) / len(asked))
    if overlay is not None:
        overlay.parent.mkdir(parents=True, exist_ok=True)
        draw(asked[0].image, kept[0], (math.isqrt(round(tokens)),) * 2).save(overlay)
    return DemoResult(
        config=config,
        full=full,
        pruned=pruned,
        speedup_total=Spread.range([before.total / after.total for before, after in pairs]),
        speedup_decoder=Spread.range([_decoder(before) / _decoder(after) for before, after in pairs]),
        batch=size,
        repeats=repeats,
        question=asked[0].prompt.replace(processor.image_token, "").strip(),
        answer=asked[0].answer,
        overlay=overlay,
        photograph=ask_photograph(config, overlay and overlay.with_stem(f"{overlay.stem}-photo"), device),
        machine=_machine(model.device),
    )


def _ask(
    model: Any, processor: Any, batches: list[dict[str, torch.Tensor]], pruning: Callable[[], Any]
) -> tuple[list[str], list[torch.Tensor]]:
    """The answers, and what stayed of each question's image."""
    answers: list[str] = []
    kept: list[torch.Tensor] = []
    for inputs in batches:
        with pruning() as handle:
            answers += generate(model, processor, inputs)
            kept += [images[0] for images in handle.last_keep] if handle else []
    return answers, kept


def _summarised(
    asked: Sequence[Any], answers: list[str], prefills: list[PrefillTime], size: int, tokens: float
) -> DemoRun:
    """Summarise one way of running; ``size`` is the batch of the timed prefills."""
    return DemoRun(
        accuracy=_accuracy(asked, answers),
        answers=answers,
        total=Spread.range([p.total for p in prefills]),
        decoder=Spread.range([_decoder(p) for p in prefills]),
        cache_bytes=prefills[0].cache_bytes / size,
        tokens=tokens,
    )


def _decoder(prefill: PrefillTime) -> float:
    """Seconds of selection and language model."""
    return prefill.select + prefill.prefill


def _accuracy(asked: Sequence[Any], answers: list[str]) -> dict[str, Accuracy]:
    """Accuracy by question type, types in order of appearance."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(asked, answers, strict=True):
        right.setdefault(question.type, []).append(vtc_tinyvlm.is_correct(answer, question.answer))
    return {kind: Accuracy(sum(marks), len(marks)) for kind, marks in sorted(right.items())}


def _machine(device: torch.device) -> str:
    """What the timing ran on."""
    return f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}"
