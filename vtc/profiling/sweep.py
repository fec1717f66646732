"""Accuracy and time of methods at several budgets, cell by cell, into a CSV that an interrupted sweep goes on with.

A cell is a method with a ``keep``; its questions are asked once (answers do not depend on the batch), and its time is
taken at each batch size, beside the unpruned model's in the same rounds. Beside registered methods there are the
baselines of :mod:`vtc.profiling.downsample`, and ``none``, the unpruned model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.budget import Keep, check_keep
from vtc.config import CompressionConfig
from vtc.costs import Decoder
from vtc.methods import method_class
from vtc.models import resolve
from vtc.patching import patch
from vtc.profiling.beside import accuracy, beside_downsampled, beside_unpruned
from vtc.profiling.downsample import NAMES as COARSE
from vtc.profiling.downsample import Coarse, coarse
from vtc.profiling.exam import Answers, Exam
from vtc.profiling.ideal import encoder_flops
from vtc.profiling.ledger import Ledger
from vtc.profiling.measure import profile
from vtc.profiling.provenance import provenance
from vtc.profiling.spread import Spread
from vtc.profiling.timing import rounds

UNPRUNED, SMALLER = "none", "downsample"
BASELINES = ("random", "grid", *COARSE)
"""Always drawn: what a method has to beat."""

COLUMNS = (
    *("date", "commit", "device", "driver", "torch", "triton", "transformers", "vtc", "model", "task", "questions"),
    *("asked", "dtype", "method", "keep", "options", "positions", "calibration", "batch", "visual_tokens"),
    *("kept_tokens", "accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high"),
    *("loyalty", "loyalty_low", "loyalty_high", "hard_questions", "hard", "hard_low", "hard_high", "apart", "repeats"),
    *("ttft_ms", "ttft_ms_p10", "ttft_ms_p90", "speedup", "speedup_p10", "speedup_p90", "ideal", "realised"),
    *("realised_p10", "realised_p90", "correct", "faults", "marks", "said"),
)
_KEY = (
    *("device", "model", "task", "asked", "dtype", "method", "keep", "options", "positions", "calibration", "batch"),
    *("repeats",),
)


@dataclass(frozen=True)
class Cell:
    """A method, or a baseline, with a ``keep``.

    Attributes:
        method: a registered name, one of :data:`~vtc.profiling.downsample.NAMES`, or ``none``.
        keep: as for :func:`vtc.patch`.
        config: of a registered method.
    """

    method: str
    keep: Keep
    config: CompressionConfig | None = None

    @property
    def options(self) -> str:
        """The config's options as JSON; nothing for what has none."""
        return "" if self.config is None else json.dumps(self.config.to_dict()["options"], sort_keys=True)


def plan(
    exam: Exam,
    methods: Sequence[str],
    keeps: Sequence[Keep],
    positions: str | None = None,
    calibration: str | None = None,
) -> list[Cell]:
    """The cells of a sweep: the unpruned model, then every method with every ``keep``. Baselines are not calibrated.

    Raises:
        ValueError: an unknown method, a ``keep`` out of range, or what the model cannot do. Nothing was run then.
    """
    cells = [Cell(UNPRUNED, 1.0)]
    for name in dict.fromkeys(methods):
        for keep in dict.fromkeys(map(check_keep, keeps)):
            if name in COARSE:
                coarse(name, exam.model, exam.processor, keep)
                cells.append(Cell(name, keep))
            elif name != UNPRUNED:
                bias: Any = None if name in BASELINES else calibration
                config = CompressionConfig.of(method_class(name)(keep=keep), positions, bias)  # type: ignore[arg-type]
                patch(exam.model, config).unpatch()
                cells.append(Cell(name, keep, config))
    return cells


def fitting_baselines(exam: Exam) -> list[str]:
    """Those of :data:`BASELINES` that the model can do."""
    fitting = []
    for name in BASELINES:
        with contextlib.suppress(ValueError):
            plan(exam, [name], [0.5])
            fitting.append(name)
    return fitting


def sweep(
    exam: Exam,
    cells: Sequence[Cell],
    batches: Sequence[int],
    path: Path,
    *,
    name: str,
    repeats: int = 5,
    tell: Callable[[str], None] = lambda message: None,
    tick: Callable[[Cell], None] = lambda cell: None,
) -> list[dict[str, str]]:
    """Measure every cell that the file does not have yet.

    Args:
        exam: model and questions.
        cells: from :func:`plan`; the unpruned one comes first.
        batches: batch sizes of the timing.
        path: of the CSV.
        name: of the model, for the rows.
        repeats: timed rounds.
        tell: called with a line of text about anything unusual.
        tick: called when a cell is done.

    Returns:
        The rows of this sweep, by cell and batch, as text.
    """
    ledger = Ledger(path, COLUMNS, tell)
    about = provenance(exam.model.device) | {
        "model": name,
        "task": exam.task.name,
        "questions": str(len(exam.asked)),
        "asked": exam.digest,
        "dtype": str(exam.model.dtype).removeprefix("torch."),
        "repeats": str(repeats),
    }
    done = {tuple(row[column] for column in _KEY): row for row in ledger.rows}
    found: list[dict[str, str]] = []
    unpruned: Answers | None = None
    smaller: dict[Keep, Answers] = {}
    for cell in cells:
        keys = {batch: _key(about, cell, batch) for batch in batches}
        rows = [done[key] for key in keys.values() if key in done]
        answers = _read(rows[0]) if rows else exam.take(cell.config, _baseline(exam, cell))
        unpruned = unpruned or answers
        if cell.method == SMALLER:
            smaller[cell.keep] = answers
        for batch, key in keys.items():
            if key not in done:
                results = _results(exam, answers, unpruned, smaller.get(cell.keep))
                results |= {"batch": batch} | _timing(exam, cell, batch, repeats)
                ledger.add(about | _about(cell) | results)
                done[key] = ledger.rows[-1]
        found += [done[key] for key in keys.values()]
        tick(cell)
    return found


def _key(about: dict[str, str], cell: Cell, batch: int) -> tuple[str, ...]:
    """What tells a row from all others."""
    columns = about | {name: str(value) for name, value in _about(cell).items()} | {"batch": str(batch)}
    return tuple(columns[name] for name in _KEY)


def _about(cell: Cell) -> dict[str, str]:
    config = cell.config
    return {
        "method": cell.method,
        "keep": repr(cell.keep),
        "options": cell.options,
        "positions": "" if config is None else config.positions,
        "calibration": "" if config is None else config.calibration or "",
    }


def _results(exam: Exam, answers: Answers, unpruned: Answers, smaller: Answers | None) -> dict[str, Any]:
    results = accuracy(exam, answers) | beside_unpruned(exam, answers, unpruned)
    results |= beside_downsampled(exam, answers, unpruned, smaller)
    marks = [int(score) if score == int(score) else score for score in answers.scores]
    return results | {
        "kept_tokens": answers.tokens,
        "marks": json.dumps(marks, separators=(",", ":")),
        "said": " ".join(answers.said),
    }


def _read(row: dict[str, str]) -> Answers:
    """What :func:`_results` wrote."""
    return Answers(json.loads(row["marks"]), row["said"].split(), float(row["kept_tokens"]))


def _baseline(exam: Exam, cell: Cell) -> Coarse | None:
    return coarse(cell.method, exam.model, exam.processor, cell.keep) if cell.method in COARSE else None


def _timing(exam: Exam, cell: Cell, batch: int, repeats: int) -> dict[str, Any]:
    """Time to first token of the first questions, beside the unpruned model's."""
    questions = [exam.asked[i % len(exam.asked)] for i in range(batch)]
    inputs = exam.inputs(questions)
    faults: tuple[str, ...] = ()
    ideal: float | None
    speedup: Spread | None
    if cell.config is not None:
        _, measured = profile(exam.model, lambda size: inputs, cell.config, batches=[batch], repeats=repeats)
        ttft, speedup, ideal, faults = measured.ttft, measured.speedup, measured.ideal, measured.faults
        tokens = measured.visual_tokens
    else:
        baseline, speedup, ideal = _baseline(exam, cell), None, None
        if baseline is None:
            (runs,) = rounds(exam.model, [(contextlib.nullcontext, inputs)], repeats)
        else:
            coarser = baseline.inputs(questions)
            ways = [(contextlib.nullcontext, inputs), (baseline.running, coarser)]
            plain, runs = rounds(exam.model, ways, repeats)
            speedup = Spread.of([full.total / small.total for full, small in zip(plain, runs, strict=True)])
            ideal = _flops(exam, inputs, contextlib.nullcontext) / _flops(exam, coarser, baseline.running)
        ttft = Spread.of([run.total for run in runs])
        _, parts = resolve(exam.model)
        tokens = int((inputs["input_ids"] == parts.placeholders["image"]).sum()) / batch
    realised = None if speedup is None or ideal is None else speedup / ideal
    row: dict[str, Any] = {"visual_tokens": tokens, "ideal": ideal, "correct": not faults, "faults": "; ".join(faults)}
    for name, value, scale in (("ttft_ms", ttft, 1e3), ("speedup", speedup, 1.0), ("realised", realised, 1.0)):
        for column, field in ((name, "median"), (f"{name}_p10", "low"), (f"{name}_p90", "high")):
            row[column] = None if value is None else scale * getattr(value, field)
    return row


def _flops(exam: Exam, inputs: dict[str, Any], running: Callable[[], Any]) -> float:
    """FLOPs of a prefill without pruning."""
    _, parts = resolve(exam.model)
    decoder = Decoder.of(parts.decoder, parts.root)
    with running():
        total = encoder_flops(exam.model, inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    return total + sum(decoder.prefill([n] * len(decoder.layers)).flops for n in lengths)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other beats: none costs as little and gains more, or costs less and
    gains as much. By rising cost.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, chosen = float("-inf"), []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            chosen.append(i)
    return chosen


def by_method(rows: Sequence[dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Rows of each method, by kept tokens; methods in order of appearance."""
    for name in dict.fromkeys(row["method"] for row in rows):
        yield name, sorted((row for row in rows if row["method"] == name), key=lambda row: float(row["kept_tokens"]))
