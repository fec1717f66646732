"""What every measured row names beside its numbers: when, which code, on what, with which versions."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance(device: str | torch.device = "cpu") -> dict[str, str]:
    """Date, commit (``none`` outside vtc's own repository), device, driver, and versions; all as text.

    Args:
        device: that was measured on.
    """
    device = torch.device(device)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vtc": _version("visual-token-compression"),
    }


def device_name(device: torch.device) -> str:
    """The card's name; of a CPU its model and the threads in use, which decide about the times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"cpu: {name}, {threads} thread" + "s" * (threads > 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "visual-token-compression":  # run from a source tree
            import vtc

            return vtc.__version__
        return "none"


def _commit() -> str:
    here = Path(__file__).parent
    if not _run(
        "git", "-C", str(here), "ls-files", Path(__file__).name
    ):  # installed: the repository around is another one
        return "none"
    return _run("git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10") or "none"


def _driver() -> str:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "unknown"


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
