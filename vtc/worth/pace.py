"""How fast the running device is: a roofline and the price of one operation, measured in a fraction of a second.

What was found is kept on disk (:mod:`vtc.cache`) by device, threads, type of numbers and versions, so that the next
process measures nothing. On a CPU the clock is that of the calling thread, which stands while other work has the core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vtc import cache
from vtc.devices import Device, device_name

LONG = 2e-3
"""Seconds that a product takes at least: shorter ones say more about the call than about the device."""
SIDES = (256, 512, 1024, 2048, 4096, 8192)
STREAM = {"cpu": 1 << 26}
"""Bytes of a matrix that no cache holds, by type of device; other devices read :data:`STREAM_ELSEWHERE`."""
STREAM_ELSEWHERE = 1 << 28
OPERATIONS = 256
REPEATS = 5


@dataclass(frozen=True)
class Pace:
    """What a device does in a second.

    Attributes:
        device: its roofline, as measured; nothing is known of its memory's size.
        operation: seconds that one operation on next to nothing takes.
        queues: operations are queued, so that the device works while later ones are prepared.
    """

    device: Device
    operation: float
    queues: bool

    def seconds(self, flops: float, moved: float, operations: int = 0) -> float:
        """A floor: arithmetic, memory and, on a device with a queue, how fast operations can be handed to it.

        Without a queue their price comes on top of the work, pruned or not, and is left out: see :meth:`handing`.
        """
        return max(self.device.seconds(flops, moved), self.handing(operations) if self.queues else 0.0)

    def handing(self, operations: int) -> float:
        """Seconds that so many operations take to be called."""
        return operations * self.operation


def pace_of(device: torch.device, dtype: torch.dtype) -> Pace:
    """Of a device and type of numbers: as it was found once, or measured now."""
    flops, bandwidth, operation = known(device, dtype, "pace", lambda: _measured(device, dtype), 3)
    name = f"this {device_name(device)}"
    return Pace(Device(name, flops, bandwidth, math.inf), operation, queues=device.type != "cpu")


def known(
    device: torch.device, dtype: torch.dtype, what: str, measure: Callable[[], Sequence[float]], length: int
) -> list[float]:
    """Positive numbers as they were measured once, or are measured now and kept.

    Args:
        device: where.
        dtype: of the numbers it works with.
        what: their name on disk.
        measure: makes them.
        length: how many there are; anything else on disk is measured again.
    """
    path, around = file(), _surroundings(device, dtype)
    stored = cache.read(path)
    there = stored.get(around)
    there = there if isinstance(there, dict) else {}
    if (found := _numbers(there.get(what), length)) is not None:
        return found
    measured = list(measure())
    cache.write(path, stored, around, {**there, what: measured})
    return measured


def file() -> Path:
    """Where it is kept."""
    return cache.folder() / "pace.json"


def best(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some runs after one that is not counted; each waits for the device."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    took = []
    for _ in range(repeats + 1):
        _wait(device)
        start = clock()
        run()
        _wait(device)
        took.append(clock() - start)
    return max(min(took[1:]), 1e-9)


@torch.inference_mode()
def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """FLOP/s of a product, bytes/s of a matrix that is read once, seconds of an operation."""
    generator = torch.Generator().manual_seed(0)
    for side in SIDES:
        matrix = torch.randn(side, side, generator=generator).to(device, dtype)
        took = best(partial(torch.matmul, matrix, matrix), device)
        if took >= LONG:
            break
    flops = 2 * side**3 / took
    size = STREAM.get(device.type, STREAM_ELSEWHERE) // dtype.itemsize
    stream, vector = torch.ones(size // 4096, 4096, device=device, dtype=dtype), torch.ones(4096).to(device, dtype)
    bandwidth = size * dtype.itemsize / best(partial(torch.matmul, stream, vector), device)
    little = torch.zeros(16, device=device, dtype=dtype)

    def call() -> None:
        for _ in range(OPERATIONS):
            little.add_(1)

    return flops, bandwidth, best(call, device) / OPERATIONS


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _surroundings(device: torch.device, dtype: torch.dtype) -> str:
    """All that a time depends on beside what was timed."""
    try:
        ours = version("visual-token-compression")
    except PackageNotFoundError:
        ours = "source"
    return f"{device_name(device)}, {dtype}, torch {torch.__version__}, vtc {ours}"


def _numbers(found: Any, length: int) -> list[float] | None:
    """So many positive numbers, ``None`` for anything else."""
    if not isinstance(found, list) or len(found) != length:
        return None
    return [float(n) for n in found] if all(type(n) in (int, float) and 0 < n < math.inf for n in found) else None
