"""Time to the first token where patches leave inside the vision tower: `python benchmarks/tower.py`.

Two models with random weights: a CLIP-shaped tower of 12 blocks at reduced width, and a language model so small beside
it that nothing behind the tower can be faster than 1.5x and 2.0x, the shares of work that Qwen3-VL-2B and Qwen2.5-VL-3B
have. Everything runs in turns in one process, and a quarter of the tokens stays at the end. `ceiling` is the ratio of
work if behind the projector all visual tokens were gone, by `vtc estimate`.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import vtc
from vtc.commands.profile import describe, row_of, tables_of
from vtc.profiling.estimate import estimate
from vtc.profiling.measure import profile
from vtc.profiling.workload import Workload, random_model

CONFIGS = Path(__file__).parent / "configs"
MODELS = ("ceiling_1_5", "ceiling_2_0")
SIDE, TEXT = 336, 64


def methods(keep: float) -> list[vtc.Method]:
    """Behind the tower, inside it, and both: the same share is left at the end."""
    return [
        vtc.Grid(keep=keep),
        vtc.DivPrune(keep=keep),
        vtc.InTower(rule="cls", keep=keep),
        vtc.InTower(rule="diverse", keep=keep),
        vtc.InTower(rule="received", keep=keep),
        vtc.InTower(rule="cls", keep=0.5, then=vtc.DivPrune(keep=keep)),
        vtc.InTower(rule="cls", keep=keep, restore=True, then=vtc.DivPrune(keep=keep)),
    ]


def _inputs(workload: Workload, model: Any, batch: int) -> Any:
    return workload.inputs(model, batch, None)


def main(
    keep: float = 0.25,
    repeats: int = 9,
    batch: int = 1,
    threads: int = 1,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/tower_cpu.csv"),
) -> None:
    """Measure, print, and write the rows."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        folder = CONFIGS / name
        model = random_model(str(folder), "cpu", torch.float32)
        workload = Workload((SIDE, SIDE), TEXT)
        ceiling = estimate(str(folder), (SIDE, SIDE), text=TEXT, method="divprune", keep=keep).ceiling
        inputs = partial(_inputs, workload, model)
        measured = profile(model, inputs, methods(keep), None, (batch,), repeats=repeats)
        about = describe(model, f"random:benchmarks/configs/{name}", workload)
        typer.echo(f"{name}: nothing behind the tower can beat {ceiling:.2f}x")
        for table in tables_of(measured):
            Console().print(table)
        rows += [about | row_of(each) | {"ceiling": f"{ceiling:.3f}"} for each in measured]
    with out.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
