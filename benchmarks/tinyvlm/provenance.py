"""What every row of a results table names beside its numbers."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path


def provenance() -> dict[str, str]:
    """Date, commit (marked when the tree has changes), CPU model, and the versions of torch and transformers."""
    import torch
    import transformers

    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("describe", "--always", "--dirty") or "none",
        "device": f"cpu: {cpu}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False, timeout=20
        )
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
