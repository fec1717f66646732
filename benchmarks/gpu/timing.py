"""Time on the device: events, warm-up, medians, interleaved runs over several inputs, and how much of it is noise."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[int], object]
"""Does the work once; the number says which of several inputs to take."""


@dataclass(frozen=True)
class Sample:
    """Times of one thing, in milliseconds.

    Attributes:
        median: of all runs.
        p10: the tenth percentile, ``None`` for a single run.
        p90: the ninetieth.
        noise: how far apart the medians of two interleaved series of the same thing are, as a share of the median; a
            difference between two things that is smaller than this is none.
        runs: how many.
    """

    median: float
    p10: float | None
    p90: float | None
    noise: float | None
    runs: int

    @classmethod
    def of(cls, first: list[float], second: list[float]) -> Sample:
        """From the times of two series."""
        times = sorted([*first, *second])
        if len(times) == 1:
            return cls(times[0], None, None, None, 1)
        middle = _quantile(times, 0.5)
        noise = abs(_quantile(sorted(first), 0.5) - _quantile(sorted(second), 0.5)) / middle if second else None
        return cls(middle, _quantile(times, 0.1), _quantile(times, 0.9), noise, len(times))

    @property
    def note(self) -> str:
        """Runs and noise, for the table."""
        return f"{self.runs} runs" + ("" if self.noise is None else f", noise {self.noise:.1%}")


def _quantile(ordered: list[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Deadline:
    """How much time is left; parts of a run share it."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative when it is over."""
        return self.until - time.monotonic()

    def part(self, share: float) -> Deadline:
        """A deadline of its own for a share of what is left."""
        return Deadline(max(0.0, self.left) * share)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that one call takes: by device events, or on the CPU by the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(
    runs: Mapping[str, Run], device: torch.device, seconds: float, *, least: int = 5, most: int = 40, warm: int = 2
) -> dict[str, Sample]:
    """Time several things against each other.

    Each round runs each of them twice, in turn, so that a clock that drifts meets all alike, and takes the next input.
    The number of rounds is what ``seconds`` allow, from ``least`` to ``most``.

    Args:
        runs: what to time, by name.
        device: where it runs.
        seconds: how long the rounds may take together; ``least`` goes before it.
        least: rounds at least.
        most: rounds at most.
        warm: untimed calls of each beforehand; the last one tells how long a round takes.
    """
    round_ms = 0.0
    for run in runs.values():
        for at in range(max(warm, 1)):
            last = once(lambda run=run, at=at: run(at), device)
        round_ms += 2 * last
    rounds = max(least, min(most, int(seconds * 1e3 / max(round_ms, 1e-3))))
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for at in range(rounds):
        for half in (0, 1):
            for name, run in runs.items():
                series[name][half].append(once(lambda run=run, at=at, half=half: run(2 * at + half), device))
    return {name: Sample.of(*halves) for name, halves in series.items()}


def extra_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB allocated at the peak of one call beyond what was allocated before it; ``None`` where nobody counts."""
    if device.type != "cuda":
        return None
    clean(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def clean(device: torch.device) -> None:
    """Give back the device memory that nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
