"""The GPU suite, in one command: `python benchmarks/gpu_suite.py [--smoke] [--only select|kernels|e2e] [--out FILE]`.

Correctness first, then times, memory and what they could have been at best; rows are appended to
benchmarks/results/gpu.csv as they come, and a short table is printed last. No network, no checkpoint (random weights at
full size), at most nine minutes on one large GPU: what does not fit in is named in a row of its own. `--smoke` runs
every path at tiny shapes on the CPU, the kernels through Triton's interpreter; its times mean nothing and stay out of
that file. Exit code 1 if anything was wrong.

Runs from a source tree; the parts are in benchmarks/gpu/.
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
# Instead of this folder, whose files are no modules for others to import (one named like a module of Python would hide
# it), the tree's root: `vtc` and `benchmarks.gpu` then come from the same tree.
if sys.path[0] == str(ROOT / "benchmarks"):
    sys.path[0] = str(ROOT)

import typer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.csv"
SECONDS = 525.0
SHARES = {"select": 0.4, "kernels": 0.25, "e2e": 1.0}  # of the time that is left when a part begins


class Part(str, Enum):
    """What can be asked for alone."""

    select = "select"
    kernels = "kernels"
    e2e = "e2e"


def main(
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny shapes on the CPU: does everything run?")] = False,
    only: Annotated[Part | None, typer.Option(help="One part instead of all three.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file to append to. Default: benchmarks/results/gpu.csv; with --smoke: none."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for everything; cases not begun by then are named.")] = SECONDS,
    commit: Annotated[str | None, typer.Option(help="Of the source tree, where its .git did not travel along.")] = None,
) -> None:
    """Check, measure, append rows, print the table."""
    if smoke:
        if out is not None and out.resolve() == RESULTS:
            raise typer.BadParameter(f"{out} is for figures of a GPU; name another file", param_hint="--out")
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    import torch

    if not smoke and not torch.cuda.is_available():
        typer.echo("no CUDA device here; --smoke runs every path at tiny shapes on the CPU", err=True)
        raise typer.Exit(2)
    raise typer.Exit(
        run(smoke, [only.value] if only else list(SHARES), out if smoke else out or RESULTS, seconds, commit)
    )


def run(smoke: bool, parts: list[str], out: Path | None, seconds: float, commit: str | None = None) -> int:
    """The parts one after the other; returns the exit code."""
    import torch
    import transformers
    from rich.console import Console

    from benchmarks.gpu import e2e, floors, kernels, rows, selection, summary
    from benchmarks.gpu.suite import Suite
    from benchmarks.gpu.timing import Deadline

    transformers.logging.set_verbosity_error()
    device = torch.device("cpu" if smoke else "cuda")
    deadline = Deadline(seconds)
    sheet = rows.Sheet(out, rows.source(device, commit))
    console = Console(width=150, highlight=False)
    console.print(" · ".join(f"{name} {value}" for name, value in sheet.source.items()))
    able = floors.ceilings(device, smoke)
    console.print(
        f"copy {able.bandwidth / 1e12:.3g} TB/s, bf16 product {able.flops / 1e12:.3g} TFLOP/s, "
        f"dependent step {able.step * 1e6:.3g} µs"
    )
    suite = Suite(device, smoke, sheet, deadline, able)
    run_part = {"select": selection.run, "kernels": kernels.run, "e2e": e2e.run}
    for name in parts:
        began = len(sheet.rows)
        with torch.no_grad():
            run_part[name](suite.part(SHARES[name] if len(parts) > 1 else 1.0))
        console.print(f"{name}: {len(sheet.rows) - began} rows, {deadline.left:.0f} s left")
    console.print(summary.table(sheet.rows))
    wrong = [row for row in sheet.rows if row.correct == rows.NO]
    skipped = sum(row.correct == rows.SKIPPED for row in sheet.rows)
    where = f" in {out}" if out is not None else ""
    console.print(f"{len(sheet.rows)} rows{where}: {len(wrong)} wrong, {skipped} skipped")
    return 1 if wrong else 0


if __name__ == "__main__":
    typer.run(main)
