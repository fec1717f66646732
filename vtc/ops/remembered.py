"""Which kernels were right, kept on disk: a small JSON file in the user's cache folder.

A success counts with the same device, driver, torch, Triton, vtc and source alone; where one of them cannot be told,
nothing is kept. A file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vtc import cache
from vtc.ops.backend import interpreted


def cache_file() -> Path:
    """Where successes are kept."""
    return cache.folder() / "kernels.json"


def _read() -> dict[str, list[str]]:
    """Surroundings and the names of cases that were right there; without what this module does not write."""
    found = cache.read(cache_file())
    return {at: there for at, there in found.items() if isinstance(there, list) and all(map(_is_text, there))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def names(device: torch.device) -> list[str]:
    """Of the cases that were right on a device, as all is now."""
    around = _surroundings(device)
    return _read().get(around, []) if around else []


def add(device: torch.device, name: str) -> None:
    """Add a success. Processes that write at once may lose one of them, which is then tried again some day."""
    around = _surroundings(device)
    if not around:
        return
    known = _read()
    there = known.get(around, [])
    cache.write(cache_file(), known, around, there if name in there else [*there, name])


@functools.cache
def _surroundings(device: torch.device) -> str:
    """All that a success depends on beside its case; empty if it cannot be told, and then nothing is kept."""
    driver, source = _driver(), _source()
    if not driver or not source or interpreted():
        return ""
    versions = (f"{name} {_version(name)}" for name in ("triton", "visual-token-compression"))
    told = (device_name(device), f"driver {driver}", f"torch {torch.__version__}", *versions, f"source {source}")
    return ", ".join(told)


def device_name(device: torch.device) -> str:
    """The card's name with its compute capability; of another device its type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _driver() -> str:
    """The kernel module's version, as it tells itself; empty if it does not."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError, ValueError):
            return Path(path).read_text(encoding="utf-8").splitlines()[0].strip()
    return f"amdgpu of {platform.release()}" if Path("/sys/module/amdgpu").exists() else ""  # comes with Linux itself


def _source() -> str:
    """A hash of the ops, the kernels and the trials; empty where their files cannot be read."""
    here, found = Path(__file__).parent, hashlib.sha256()
    try:
        for path in sorted(here.rglob("*.py")):
            found.update(path.relative_to(here).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:
        return ""
    return found.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
