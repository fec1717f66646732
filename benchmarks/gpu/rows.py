"""A figure, where it comes from, and the CSV file it is appended to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vtc.profiling.ledger import Ledger
from vtc.profiling.provenance import provenance

YES, NO, SKIPPED = "yes", "no", "skipped"

SOURCE = ("date", "commit", "device", "driver", "torch", "triton", "transformers")
COLUMNS = (
    *SOURCE,
    *("case", "shape", "dtype", "batch", "backend", "median", "p10", "p90", "unit", "floor", "ratio", "correct"),
    "note",
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: what was done: an op, a check, or a phase of generation and the method.
        shape: at which size.
        dtype: of the inputs.
        batch: images at once.
        backend: who did it: ``torch``, ``triton``, ``published``, or the attention implementation.
        median: of the measurements, in ``unit``; also the one figure of a check. ``None``: not measured.
        p10: the tenth percentile, ``None`` if measured once.
        p90: the ninetieth.
        unit: of median, p10, p90 and floor.
        floor: what could not be beaten, or should not be exceeded; the case says which.
        correct: ``yes``, ``no``: then nothing was measured, or ``skipped``: then ``note`` says why.
        note: what else there is to say, such as the noise of the measurement.
    """

    case: str
    shape: str
    dtype: str
    batch: int
    backend: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    unit: str = "ms"
    floor: float | None = None
    correct: str = YES
    note: str = ""

    def __post_init__(self) -> None:
        if self.correct not in (YES, NO, SKIPPED):
            raise ValueError(f"correct={self.correct!r} is none of {YES!r}, {NO!r}, {SKIPPED!r}")
        if self.correct != YES:  # the figure of a wrong result is no figure
            for name in ("median", "p10", "p90"):
                object.__setattr__(self, name, None)

    @property
    def ratio(self) -> float | None:
        """The share of the floor that was reached: floor / median, 1 at the floor, ``None`` for a voided row."""
        return self.floor / self.median if self.floor and self.median else None

    def cells(self) -> dict[str, str]:
        """As text, one entry for each column behind :data:`SOURCE`."""
        figures = {name: _short(getattr(self, name)) for name in ("median", "p10", "p90", "floor", "ratio")}
        names = ("case", "shape", "dtype", "batch", "backend", "unit", "correct", "note")
        return {name: str(getattr(self, name)) for name in names} | figures


class Sheet:
    """The rows so far; each is on disk as soon as it is known, so that an interrupted run leaves what it has.

    Args:
        out: the CSV file, appended to; ``None``: rows are only printed.
        source: the cells every row begins with.
    """

    def __init__(self, out: Path | None, source: dict[str, str]) -> None:
        self.source = source
        self.rows: list[Row] = []
        self._ledger = None if out is None else Ledger(out, COLUMNS, print)

    def add(self, row: Row) -> None:
        """Keep a row, and write it."""
        self.rows.append(row)
        if self._ledger is not None:
            self._ledger.add(self.source | row.cells())


def source(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """What every row names: date, commit, device, driver and versions.

    Args:
        device: where the suite runs.
        commit: given by hand where the source tree travels without its ``.git``.
    """
    found = provenance(device) | ({"commit": commit} if commit else {})
    return {name: found[name] for name in SOURCE}


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
