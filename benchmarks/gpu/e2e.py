"""Part (c), end to end: time to the first token, decoding and memory of whole models, pruned and not.

Random weights at full size, equal prompts of one image and 64 other tokens, timed as ``vtc profile`` times. Floors:

- unpruned TTFT: the FLOPs at the measured rate of a matrix product;
- TTFT of a method: the *ideal* time, unpruned TTFT times the share of FLOPs (vision included) that the method leaves.
  The ratio is then the share of the ideal speed-up that was realised;
- decoding: weights and cached keys and values, read once a step at the measured bandwidth;
- memory: the cache.

A method is timed only where its prefill was found right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vtc
from benchmarks.gpu import floors, models
from benchmarks.gpu.methods import METHODS, UNPRUNED, check, method, prefill
from benchmarks.gpu.models import SPECS, Spec
from benchmarks.gpu.rows import NO, SKIPPED, Row
from benchmarks.gpu.suite import Suite
from benchmarks.gpu.timing import Sample
from vtc.ops.backend import backend
from vtc.profiling.memory import with_peak
from vtc.profiling.timing import PrefillTime, rounds, time_decode

BATCHES = (8, 1, 32)  # most telling first: time runs out at the end
DECODED = 16


@dataclass
class Times:
    """Of one subject: prefills, one a round; seconds of decode steps; bytes that a prefill needs at its peak."""

    prefills: list[PrefillTime] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    peak: int | None = None


@dataclass(frozen=True)
class Subject:
    """A method that was found right, or none.

    Attributes:
        name: in the table.
        patch: prunes while it is entered.
        visual: visual tokens of an image in each layer.
        note: of the check.
    """

    name: str
    patch: Callable[[], AbstractContextManager[Any]]
    visual: tuple[float, ...]
    note: str = ""


def run(suite: Suite) -> None:
    """Groups of one model and batch size, the methods of a group timed in turn."""
    dtype = torch.float32 if suite.device.type == "cpu" else torch.bfloat16
    built: dict[str, Any] = {}
    plan = [(batch, spec) for batch in ((2,) if suite.smoke else BATCHES) for spec in SPECS]
    for at, (batch, spec) in enumerate(plan):
        spec = spec.tiny() if suite.smoke else spec
        row = Row("end to end", spec.name, _short(dtype), batch, "sdpa")
        if suite.reached(row):
            with suite.case(row):
                if spec.name not in built:
                    built[spec.name] = models.build(spec, suite.device, dtype)
                group(suite, spec, built[spec.name], batch, suite.deadline.left / (len(plan) - at))


def group(suite: Suite, spec: Spec, model: Any, batch: int, seconds: float) -> None:
    """All methods on one model at one batch size.

    Args:
        suite: where to.
        spec: the model's.
        model: unpatched.
        batch: prompts.
        seconds: for the timed rounds; two are made in any case, one in a smoke run.
    """
    until = time.monotonic() + seconds
    sets = [models.prompts(spec, model, batch, seed)[0] for seed in (0, 1)]
    _, tokens = models.prompts(spec, model, 1)
    row = Row("", spec.name, _short(next(model.parameters()).dtype), batch, f"sdpa, {backend(suite.device)}")
    layers = spec.size.layers
    subjects = [Subject(UNPRUNED, nullcontext, (float(tokens),) * layers)]
    for name in METHODS:
        if (found := _subject(suite, spec, model, sets[0], tokens, name, row)) is not None:
            subjects.append(found)
    times = {subject.name: Times() for subject in subjects}
    for subject in subjects:  # warms up
        own = times[subject.name]
        with subject.patch():
            if suite.device.type == "cuda":  # elsewhere memory is the whole process's: not worth a row
                own.peak = with_peak(suite.device, partial(prefill, model, sets[0]))[1]
            own.steps = time_decode(model, sets[0], 3 if suite.smoke else DECODED)
    done = 0
    while done < (1 if suite.smoke else 2) or (not suite.smoke and done < 10 and time.monotonic() < until):
        ways = [(subject.patch, sets[done % 2]) for subject in subjects]
        for subject, (run,) in zip(subjects, rounds(model, ways, repeats=1, warmup=0), strict=True):
            times[subject.name].prefills.append(run)
        done += 1
    costs = floors.Costs(model, (spec.picture(spec.size),) * 2, spec.size.text)
    _report(suite, costs, row, subjects, times)


def _subject(
    suite: Suite, spec: Spec, model: Any, inputs: dict[str, Tensor], tokens: int, name: str, row: Row
) -> Subject | None:
    row = replace(row, case=f"TTFT: {name}")
    try:
        chosen = method(name, spec, tokens)
        vtc.patch(model, chosen).unpatch()
    except ValueError as error:
        suite.sheet.add(replace(row, correct=SKIPPED, note=f"refused: {' '.join(str(error).split())[:120]}"))
        return None
    try:
        reason, note, handle = check(spec, model, inputs, name, tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason, note, handle = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", "", None
    if reason or handle is None:
        suite.sheet.add(replace(row, correct=NO, note=reason))
        return None
    return Subject(name, lambda: vtc.patch(model, chosen), handle.report().tokens_per_layer, note)


def _report(suite: Suite, costs: floors.Costs, row: Row, subjects: list[Subject], times: dict[str, Times]) -> None:
    add, able = suite.sheet.add, suite.ceilings
    before = _halves([run.total for run in times[UNPRUNED].prefills]).median
    for subject in subjects:
        own, visual = times[subject.name], subject.visual
        first, steps = _halves([run.total for run in own.prefills]), _halves(own.steps)
        if subject.name == UNPRUNED:
            floor, note = able.of(row.batch * costs.prefill(visual)), first.note
        else:
            ideal = costs.prefill(subjects[0].visual) / costs.prefill(visual)
            floor = before / ideal
            note = f"{before / first.median:.2f}x of ideal {ideal:.2f}x; {first.note}; {subject.note}"
        add(_timed(replace(row, case=f"TTFT: {subject.name}", floor=floor, note=note), first))
        floor = able.of(moved=costs.step(visual, row.batch))
        add(_timed(replace(row, case=f"decode: {subject.name}", floor=floor, note=steps.note), steps))
        vision = _halves([run.vision for run in own.prefills])
        add(_timed(replace(row, case=f"vision: {subject.name}", note=f"all before the decoder; {vision.note}"), vision))
        if subject.name != UNPRUNED:
            select = _halves([run.select for run in own.prefills])
            add(_timed(replace(row, case=f"select: {subject.name}", note=f"all hooks of vtc; {select.note}"), select))
        memory = replace(row, case=f"peak memory: {subject.name}", unit="GiB", note="without weights; floor: the cache")
        if own.peak is None:
            add(replace(memory, correct=SKIPPED, note=f"nobody counts memory on {suite.device.type}"))
        else:
            add(replace(memory, median=own.peak / 2**30, floor=costs.cache(visual, row.batch) / 2**30))


def _timed(row: Row, sample: Sample) -> Row:
    return replace(row, median=sample.median, p10=sample.p10, p90=sample.p90)


def _halves(seconds: list[float]) -> Sample:
    """In milliseconds, every other measurement against those between: the same thing twice."""
    series = [1e3 * each for each in seconds]
    return Sample.of(series[::2], series[1::2])


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
