"""How much memory a run takes at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def with_peak(device: torch.device, run: Callable[[], Result]) -> tuple[Result, int | None]:
    """Call ``run``; also return the bytes that it needed at its peak beyond what was held before.

    On CUDA from the allocator. On Linux from the peak resident memory of the process, after free memory went back to
    the system; what other threads of the process take counts too. Elsewhere ``None``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - held
    try:
        if device.type != "cpu":
            raise OSError
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        held = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return run(), None
    result = run()
    return result, max(0, _resident("VmHWM") - held)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
