"""Shared by all tests: one thread, no hub, `import zoo` from any folder, and the matrix count at the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which torch may do
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers

transformers.logging.set_verbosity_error()
# Tiny tensors: a second thread costs more than it computes, and xdist uses the other cores.
torch.set_num_threads(1)

MATRIX_TEST = "test_matrix.py::test_cell["


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many cells of the matrix were really compared with the reference, and how many were left out."""
    reports = terminalreporter.stats
    compared, left_out, wrong = (
        sum(MATRIX_TEST in report.nodeid for report in reports.get(outcome, []) if hasattr(report, "nodeid"))
        for outcome in ("passed", "skipped", "failed")
    )
    if compared or left_out or wrong:
        terminalreporter.write_line(
            f"vtc matrix: {compared + wrong} cells compared, {wrong} differ, {left_out} left out "
            f"(transformers {transformers.__version__})"
        )
