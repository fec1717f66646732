"""What every measured row names beside its numbers: when, which code, on what, with which versions."""

from __future__ import annotations

import datetime
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vtc.devices import device_name


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
