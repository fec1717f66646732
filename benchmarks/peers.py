"""vtc beside what it replaces, in one run: `python benchmarks/peers.py [--quick]`, about ten minutes on one thread.

Selection: farthest-first on the shapes of shared/speed.md, against the official loop of DivPrune and AngelSlim's
running minimum (`benchmarks/selection.py` measures, `benchmarks/gpu/published.py` has the loops). LightCompress's port
does what the official code does, and took within 7 % of its time (shared/speed.md): it has no loop of its own here.

Time to the first token: random weights in the shape of LLaVA-1.5 (576 visual tokens), a quarter of them left: vtc's
DivPrune, FastV and VisionZip, and beside each what its public code does (`benchmarks/plain_prefills.py`).

All run in turns in one process, each round beginning with the next one. Figures are CPU time of all threads, which
other work on the machine disturbs least; wall times and the load are in the rows too. A speed-up is the median of the
ratios to the unpruned prefill of the same round, with the 10th and 90th percentile. `realised` is its share of the
ratio of FLOPs that vtc's own run has (:mod:`vtc.profiling.ideal`), the same for a method and its peer. Before anything
is timed, what DivPrune's and FastV's peers answer is compared with vtc's answer (at the positions of their code), where
both keep the same tokens; how many those are is in the rows.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no installed package

import vtc
from benchmarks import selection
from benchmarks.plain_prefills import WAYS
from vtc.files import write_text
from vtc.methods import make_method
from vtc.profiling.ideal import encoder_flops, ideal_ratio
from vtc.profiling.provenance import provenance
from vtc.profiling.running import forward
from vtc.profiling.spread import Spread
from vtc.profiling.workload import Workload, random_model
from vtc_tinyvlm.evaluate import write_csv

RESULTS = Path(__file__).parent / "results"
MODEL = Path(__file__).parent / "configs" / "ceiling_2_0"
TOLERANCE = 1e-4
"""Relative norm by which logits of a peer may differ from vtc's: eager attention rounds differently."""
COMPACT = ("divprune",)
"""Methods whose public code numbers positions anew."""


@dataclass(frozen=True)
class Way:
    """One way to a first token.

    Attributes:
        name: as it is printed.
        run: the whole prefill.
        patch: what to do around it, untimed.
        ideal: ratio of FLOPs, unpruned to pruned; ``None`` for the unpruned.
        kept: visual tokens that stay.
        same: share of them that vtc keeps too.
    """

    name: str
    run: Callable[[], Any]
    patch: Callable[[], Any]
    ideal: float | None
    kept: int
    same: float | None = None


class _Untouched:
    def __enter__(self) -> None: ...
    def __exit__(self, *raised: object) -> None: ...


def ways(model: Any, inputs: Mapping[str, Tensor], keep: float) -> list[Way]:
    """The unpruned prefill, vtc's and the peers'; nothing is returned before results were compared.

    Raises:
        RuntimeError: a peer keeps other tokens than vtc, or its logits differ.
    """
    batch = len(inputs["input_ids"])
    visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    plain = encoder_flops(model, inputs) / batch
    run = partial(forward, model, inputs)
    found = [Way("unpruned", run, _Untouched, None, visual)]
    for name, peer in WAYS.items():
        patched = partial(vtc.patch, model, make_method(name, keep=keep))
        with patched() as handle:
            run()
            ideal = ideal_ratio(handle, plain, encoder_flops(model, inputs, True) / batch)
            kept = torch.stack([images[0] for images in handle.last_keep or ()])
        k = kept.shape[1]
        alone = torch.inference_mode()(partial(peer, model, inputs, k))
        same = _compared(model, inputs, name, keep, alone(), kept)
        found.append(Way(f"vtc {name}", run, patched, ideal, k))
        found.append(Way(f"{name} as published", alone, _Untouched, ideal, k, same))
    return found


def _compared(model: Any, inputs: Mapping[str, Tensor], name: str, keep: float, theirs: Any, kept: Tensor) -> float:
    """Share of the tokens that vtc keeps too; for those that only drop, logits must agree where all are."""
    common = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(theirs.kept, kept, strict=True)]
    same = sum(common) / kept.numel()
    if not bool(theirs.logits.isfinite().all()):
        raise RuntimeError(f"{name} as published: logits are not finite")
    method = make_method(name, keep=keep)
    if method.merges:
        return same
    with vtc.patch(model, method, positions="compact" if name in COMPACT else None):
        ours = forward(model, inputs).logits[:, -1]
    rows = torch.tensor([n == kept.shape[1] for n in common], device=ours.device)
    error = float((ours - theirs.logits)[rows].norm() / ours[rows].norm().clamp(min=1e-30))
    if not bool(rows.any()) or error > TOLERANCE:
        raise RuntimeError(f"{name} as published: {same:.1%} of vtc's tokens, logits differ by {error:.1e}")
    return same


def first_tokens(model: Any, name: str, batch: int, keep: float, repeats: int, text: int = 64) -> list[dict[str, Any]]:
    """One row for each way."""
    inputs = Workload(text=text).inputs(model, batch)
    every = ways(model, inputs, keep)
    wall: list[list[float]] = [[] for _ in every]
    cpu: list[list[float]] = [[] for _ in every]
    load = os.getloadavg()[0]
    for turn in tqdm(range(repeats + 1), desc=f"batch {batch}", disable=None):
        for place in range(len(every)):
            which = (turn + place) % len(every)
            with every[which].patch():
                started = time.perf_counter(), time.process_time()
                every[which].run()
                took = time.perf_counter() - started[0], time.process_time() - started[1]
            if turn:
                wall[which].append(1e3 * took[0])
                cpu[which].append(1e3 * took[1])
    load = max(load, os.getloadavg()[0])
    rows = []
    for way, walls, cpus in zip(every, wall, cpu, strict=True):
        own, faster = Spread.of(cpus), Spread.of([full / mine for full, mine in zip(cpu[0], cpus, strict=True)])
        row: dict[str, Any] = {"model": name, "batch": batch, "way": way.name, "keep": keep, "visual": every[0].kept}
        row |= {"kept": way.kept, "cpu_ms": own.median, "cpu_p10": own.low, "cpu_p90": own.high}
        row |= {"wall_ms": Spread.of(walls).median, "speedup": faster.median, "low": faster.low, "high": faster.high}
        row |= {"ideal": way.ideal, "realised": None if way.ideal is None else faster.median / way.ideal}
        rows.append(row | {"same": way.same, "load": load, "repeats": repeats})
    return rows


def page(selected: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    parts = ["# vtc beside its peers, on a CPU\n", "Written by `python benchmarks/peers.py`, which says how.\n"]
    if first:
        head = ("batch", "way", "tokens", "CPU ms (p10-p90)", "wall ms", "speed-up", "realised", "tokens as vtc")
        lines = [_line(head), _line(["---"] * len(head))]
        for r in first:
            time_ = f"{r['cpu_ms']:.1f} ({r['cpu_p10']:.1f}-{r['cpu_p90']:.1f})"
            faster = f"{r['speedup']:.2f}x ({r['low']:.2f}-{r['high']:.2f})"
            cells = (r["batch"], r["way"], f"{r['kept']} of {r['visual']}", time_, f"{r['wall_ms']:.1f}", faster)
            lines.append(_line([*cells, _percent(r["realised"]), _percent(r["same"])]))
        load = max(r["load"] for r in first)
        parts += ["## Time to the first token\n", *lines, f"\nLoad of the machine: {load:.1f} at most.\n"]
    if selected:
        parts += ["## Selection\n", selection.markdown(selected)]
        load = max(r["load"] for r in selected)
        for name, column in (("official loop", "differ"), ("running minimum", "differ_running")):
            count, of = sum(r[column] for r in selected), sum(r["inputs"] for r in selected)
            parts.append(f"\nThe {name} picks other tokens, or in another order, on {count} of {of} inputs.")
        parts.append(f"\nLoad of the machine: {load:.1f} at most.\n")
    return "\n".join(parts)


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def main(
    quick: Annotated[bool, typer.Option(help="Tiny shapes, two repetitions; written only with --out.")] = False,
    only: Annotated[str, typer.Option(help="select or first: one half alone.")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    batches: Annotated[str, typer.Option(help="Prompts at once.")] = "1,8",
    keep: float = 0.25,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    model: Annotated[Path, typer.Option(help="Folder of a config in the shape of LLaVA-1.5.")] = MODEL,
    out: Annotated[Path | None, typer.Option(help="Folder of peers_*_cpu.csv and peers_cpu.md.")] = None,
) -> None:
    """Measure, print the tables, write rows and page."""
    if only not in ("", "select", "first"):
        raise typer.BadParameter(f"--only {only!r} is neither select nor first")
    if only and out is None and not quick:
        raise typer.BadParameter("one half would overwrite the page of both: add --out")
    folder = out if quick else out or RESULTS
    torch.set_num_threads(threads)
    repeats = 2 if quick else repeats
    cases = [case for case in (selection.SMOKE if quick else selection.CASES) if case[0] == "farthest_first"]
    selected: list[dict[str, Any]] = []
    for case in tqdm([case for case in cases if case[-1] == 1 and only != "first"], desc="selection", disable=None):
        load = os.getloadavg()[0]
        selected.append(selection.measure(case, threads, repeats) | {"load": load} | provenance())
        if folder is not None:
            write_csv(selected, folder / "peers_select_cpu.csv")
    first: list[dict[str, Any]] = []
    if only != "select":
        name, subject = _quick_model() if quick else (f"random:{model.name}", random_model(str(model)))
        for batch in map(int, batches.split(",")):
            rows = first_tokens(subject, name, batch, keep, repeats, text=8 if quick else 64)
            first += [row | provenance() for row in rows]
            if folder is not None:
                write_csv(first, folder / "peers_first_cpu.csv")
    text = page(selected, first)
    typer.echo(text)
    if folder is not None:
        write_text(folder / "peers_cpu.md", text)


def _quick_model() -> tuple[str, Any]:
    from vtc.zoo import get_model

    return "zoo:llava", get_model("llava")


if __name__ == "__main__":
    typer.run(main)
