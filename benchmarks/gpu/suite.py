"""What the parts of the suite share: the device, the sheet, the time left, and how a failure becomes a row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.rows import NO, SKIPPED, Row, Sheet
from benchmarks.gpu.timing import Deadline, clean
from vtc.ops import backend


@dataclass
class Suite:
    """One run.

    Attributes:
        device: a GPU, or the CPU in a smoke run.
        smoke: tiny shapes, one measurement each: whether everything runs, not how fast.
        sheet: where rows go.
        deadline: after it, cases are not begun but named as not reached.
        ceilings: what the device can do.
    """

    device: torch.device
    smoke: bool
    sheet: Sheet
    deadline: Deadline
    ceilings: Ceilings

    def part(self, share: float) -> Suite:
        """The same with a share of the time that is left."""
        return replace(self, deadline=self.deadline.part(share))

    def reached(self, row: Row) -> bool:
        """Whether there is time left to begin a case; if not, a row says so."""
        if self.deadline.left > 0:
            return True
        self.sheet.add(replace(row, correct=SKIPPED, note="not reached in the time given"))
        return False

    @contextmanager
    def case(self, row: Row) -> Iterator[None]:
        """Run a case. ``row`` names it; when the case cannot be completed, it becomes the row that says why."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.sheet.add(replace(row, correct=SKIPPED, note=f"does not fit the memory: {_line(error)}"))
        except Exception as error:  # one broken kernel must not take the rest of the table with it
            self.sheet.add(replace(row, correct=NO, note=f"{type(error).__name__}: {_line(error)}"))
        finally:
            clean(self.device)


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run ops with ``VTC_BACKEND=name``; ``None`` lets the device decide."""
    before = os.environ.pop(backend.VARIABLE, None)
    if name is not None:
        os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(backend.VARIABLE, None)
        if before is not None:
            os.environ[backend.VARIABLE] = before


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
