"""What it saves that patches leave inside an image classifier: `python benchmarks/classifier.py`.

A DeiT-S-shaped model (22 M parameters, 12 blocks of 197 rows) with random weights, which do for time and FLOPs, and for
nothing else. Each method gets the `keep` that saves the share of FLOPs which Zero-TPrune's paper reports for DeiT-S,
34.7 %, what choosing costs included. Then all run in turns, and pictures a second are compared, by the CPU time of all
threads, which other work on the machine disturbs least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import trange
from transformers import ViTConfig, ViTForImageClassification

import vtc
from vtc.profiling.ideal import count_flops
from vtc.profiling.provenance import provenance
from vtc.profiling.spread import Spread
from vtc_tinyvlm.evaluate import write_csv

DEIT_S = ViTConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
)
PAPER = 1 - 0.347
"""Of the unpruned model's FLOPs; the paper reports 45.3 % more pictures a second with them, on a GPU."""
FIVE = (1, 3, 6, 9, 11)
METHODS: dict[str, vtc.Method] = {
    "zero-tprune, one stage": vtc.ZeroTPrune(),
    "zero-tprune, five stages": vtc.ZeroTPrune(after=FIVE),
    "zero-tprune, five stages, one vote": vtc.ZeroTPrune(after=FIVE, votes=1),
    "tome": vtc.ToMe(),
    "evit": vtc.EViT(),
    "intower, cls": vtc.InTower(rule="cls"),
}


def flops(model: nn.Module, pixels: Tensor, method: vtc.Method) -> float:
    """Of one picture."""
    with vtc.patch(model, method):
        return count_flops(lambda: model(pixels[:1]))


def fitted(model: nn.Module, pixels: Tensor, method: vtc.Method, goal: float) -> vtc.Method:
    """With the largest ``keep``, in patches, that costs at most ``goal`` FLOPs; one patch, if none does."""
    low, high = 1, 196
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if flops(model, pixels, replace(method, keep=middle)) <= goal else (low, middle - 1)
    return replace(method, keep=low)


def seconds(run: Callable[[], Any]) -> float:
    """Of all threads, in one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def main(
    repeats: int = 9,
    batch: int = 8,
    threads: int = 1,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/classifier_cpu.csv"),
) -> None:
    """Measure, print, and write the rows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, pixels = ViTForImageClassification(DEIT_S).eval(), torch.randn(batch, 3, 224, 224)
    whole = count_flops(lambda: model(pixels[:1]))
    chosen = {name: fitted(model, pixels, method, PAPER * whole) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in ("none", *chosen)}
    for _ in trange(repeats, desc="rounds"):
        times["none"].append(seconds(lambda: model(pixels)))
        for name, method in chosen.items():
            with vtc.patch(model, method):
                times[name].append(seconds(lambda: model(pixels)))
    rows: list[dict[str, Any]] = []
    source = provenance()
    for name, took in times.items():
        faster = Spread.of([full / mine for full, mine in zip(times["none"], took, strict=True)])
        share = 1.0 if name == "none" else flops(model, pixels, chosen[name]) / whole
        kept = 196 if name == "none" else chosen[name].keep
        row = {"batch": batch, "method": name, "options": "" if name == "none" else str(chosen[name])}
        row |= {"kept_patches": kept, "flops": share, "throughput": faster.median}
        rows.append(source | row | {"low": faster.low, "high": faster.high})
    table = Table("method", "patches left", "FLOPs", "throughput", title=f"DeiT-S-shaped, batch {batch}")
    for row in rows:
        spread = f"{row['throughput']:.2f}x ({row['low']:.2f} - {row['high']:.2f})"
        table.add_row(row["method"], str(row["kept_patches"]), f"{row['flops'] - 1:+.1%}", spread)
    Console().print(table)
    write_csv(rows, out)


if __name__ == "__main__":
    typer.run(main)
