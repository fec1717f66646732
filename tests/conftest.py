"""Shared by all tests: one thread, no hub, `import zoo` from any folder, samples of large matrices, and a count."""

from __future__ import annotations

import logging
import os
import sys
import warnings
import zlib
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


class Deprecations(logging.Handler):
    """Some deprecations of transformers are warnings, others are only logged (5.24: an output's old names).

    Here the second kind becomes the first, which is an error (pyproject.toml). All else that is logged is dropped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message or "will be removed" in message:
            warnings.warn(message, FutureWarning, stacklevel=1)


transformers.logging.disable_default_handler()
transformers.logging.add_handler(Deprecations())
# Tiny tensors: a second thread costs more than it computes, and xdist uses the other cores.
torch.set_num_threads(1)

NEWEST = "5.24"
"""The release of transformers on which most cells of a matrix run."""
MATRIX_TEST = "test_matrix.py::test_cell["


@pytest.fixture(autouse=True)
def deprecations_are_heard() -> None:
    """Before each test anew: commands of vtc silence transformers in the process that runs them."""
    transformers.logging.set_verbosity_warning()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-cell", action="store_true", help="run matrices whole, not a sample each release")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cells that are not in this release's sample of a matrix; pytest counts them as deselected.

    `@pytest.mark.sampled(newest=2, older=3, by=("family", "name"))`: of all values of these arguments, one in so many.
    Cells that share a reference go together. Each release has another sample, and always the same.
    """
    if config.getoption("--every-cell"):
        return
    newest = transformers.__version__.startswith(NEWEST)

    def left_out(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("sampled")
        if mark is None:
            return False
        one_in = mark.kwargs["newest" if newest else "older"]
        values = [item.callspec.params[name] for name in mark.kwargs["by"]]
        cell = f"{item.originalname} {values} {transformers.__version__[:4]}"
        return zlib.crc32(cell.encode()) % one_in != 0

    gone = [item for item in items if left_out(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]


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
