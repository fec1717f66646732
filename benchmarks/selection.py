"""Selection on a CPU, vtc.ops against the loops as published: `python benchmarks/selection.py [--smoke]`.

Both pick from the same features in turns; a row holds medians, the 10th and 90th percentile, and the median of the
ratios of neighbours in time, which a busy machine disturbs least. CPU time is that of all threads. The published loops
(``benchmarks/gpu/published.py``) are written from their descriptions, not copied:

farthest-first  all cosine distances in float32; each pick takes the rows chosen so far out of the matrix, their
                minimum, and its argmax, so k^2 N / 2 numbers are moved (as DivPrune's public code does); `running`: one
                row for each pick, and a running minimum (as AngelSlim's port does)
max-sum         one matrix-vector product for each pick (ToDRE v2, algorithm 1, to the letter)
MMR             all cosines in float32, a running maximum (IDPruner)

`gauss` tokens are unrelated to each other, the worst case for ruling tokens out; `scene` tokens resemble their
neighbours in the grid. Both are random. In float32 the published loops may leave the exact picks after a near tie:
`same` counts how many of the k picks the published loop and vtc have in common, `differ` and `differ_running` on how
many of the inputs a loop picks others, or in another order. Before anything is timed vtc's picks are compared with the
definition itself: the recursion in exact arithmetic, without any shortcut.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no installed package

from benchmarks.gpu import published
from vtc import ops
from vtc.ops.recursion import unbranched
from vtc.profiling.provenance import provenance
from vtc_tinyvlm.evaluate import write_csv

OUT = Path(__file__).parent / "results" / "select_cpu.csv"


def importance_of(x: Tensor) -> Tensor:
    """Some importance in [0, 1] for every token, the same for both sides."""
    return x[..., 0].sigmoid()


OPS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "farthest_first": (ops.farthest_first, published.divprune),
    "max_sum": (lambda x, k: ops.max_sum(x, k, 0), lambda x, k: published.max_sum(x, k, 0)),
    "max_marginal_relevance": (
        lambda x, k: ops.max_marginal_relevance(x, importance_of(x), k),
        lambda x, k: published.marginal_relevance(x, importance_of(x), k),
    ),
}
# op, data, N, k, d, B
SHAPES = [(144, 36, 192), (576, 64, 1024), (576, 64, 4096), (576, 288, 4096), (1369, 342, 3584)]
SHAPES += [(2880, 320, 1024), (2880, 320, 4096), (5184, 518, 3584)]
CASES = [
    *(("farthest_first", data, *shape, 1) for shape in SHAPES for data in ("gauss", "scene")),
    ("farthest_first", "scene", 576, 64, 4096, 8),
    ("farthest_first", "scene", 2880, 320, 1024, 8),
    *((op, "scene", 2880, 320, d, 1) for op in ("max_sum", "max_marginal_relevance") for d in (1024, 4096)),
]
SMOKE = [(op, data, 60, 7, 16, b) for op in OPS for data in ("gauss", "scene") for b in (1, 2)]
SMOKE += [("farthest_first", "scene", 1600, 20, 32, 1)]  # large enough for the lazy picks


def features(data: str, n: int, d: int, b: int, seed: int) -> Tensor:
    """Float32 [B, N, d]; scene: a coarse random grid enlarged, with half as much noise on top."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(b, n, d, generator=generator)
    if data == "gauss":
        return noise
    side = math.isqrt(n - 1) + 1
    coarse = torch.randn(b, d, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").flatten(2)[..., :n].mT
    return (smooth + 0.5 * noise).contiguous()  # as a projector returns them


def measure(case: tuple[str, str, int, int, int, int], threads: int, repeats: int) -> dict[str, Any]:
    """One row: both sides in turns, after one round that is not counted."""
    op, data, n, k, d, b = case
    fast, slow = OPS[op]
    loops = {"published": slow} | ({"running": published.running_minimum} if op == "farthest_first" else {})
    times: dict[str, list[float]] = {f"{s}{end}": [] for s in ("vtc", *loops) for end in ("", "_cpu")}
    same, differ = 0.0, dict.fromkeys(loops, 0)
    for i in range(repeats + 1):
        x = features(data, n, d, b, seed=i)
        sides: dict[str, Callable[[], Tensor]] = {"vtc": partial(fast, x, k)}
        sides |= {name: partial(_each, loop, x, k) for name, loop in loops.items()}
        picks = {}
        for name in sorted(sides, reverse=bool(i % 2)):  # who goes first takes turns
            wall, cpu = time.perf_counter(), time.process_time()
            picks[name] = sides[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i:
                times[name].append(1e3 * wall)
                times[f"{name}_cpu"].append(1e3 * cpu)
        if i == 0 and not torch.equal(picks["vtc"], _by_definition(fast, x, k)):
            raise RuntimeError(f"{op} {data} {n} -> {k}, d={d}: vtc does not pick what the definition says")
        for name in loops:
            differ[name] += int((picks[name] != picks["vtc"]).any(1).sum())
        both = zip(picks["vtc"].tolist(), picks["published"].tolist(), strict=True)
        same += statistics.mean(len(set(ours) & set(theirs)) for ours, theirs in both)
    row: dict[str, Any] = {"op": op, "data": data, "N": n, "k": k, "d": d, "B": b, "threads": threads}
    for name in ("vtc", "published", "running"):
        if name not in sides:
            row |= {f"{name}_{what}": None for what in ("ms", "p10", "p90", "cpu_ms")}
            continue
        ordered = sorted(times[name])
        row |= {f"{name}_ms": statistics.median(ordered), f"{name}_p10": ordered[len(ordered) // 10]}
        row |= {
            f"{name}_p90": ordered[-1 - len(ordered) // 10],
            f"{name}_cpu_ms": statistics.median(times[f"{name}_cpu"]),
        }
    for name, column in (("published", "ratio"), ("running", "ratio_running")):
        for end in ("", "_cpu"):
            theirs = times.get(f"{name}{end}")
            ratios = [a / b for a, b in zip(theirs, times[f"vtc{end}"], strict=True)] if theirs else None
            row[f"{column}{end}"] = statistics.median(ratios) if ratios else None
    row |= {"repeats": repeats, "same": same / (repeats + 1), "inputs": b * (repeats + 1)}
    return row | {"differ": differ["published"], "differ_running": differ.get("running")}


def _by_definition(fast: Callable[[Tensor, int], Tensor], x: Tensor, k: int) -> Tensor:
    with unbranched():
        return fast(x, k)


def _each(loop: Callable[[Tensor, int], Tensor], x: Tensor, k: int) -> Tensor:
    return torch.stack([loop(one, k) for one in x])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it is printed."""
    head = ["op", "data", "N → k", "d", "B", "threads", "vtc ms (p10–p90)", "published ms (p10–p90)", "ratio"]
    head += ["ratio of CPU time", "running minimum: ratio", "of CPU time", "same picks"]
    lines = [f"| {' | '.join(head)} |", "| --- " * 3 + "| ---: " * (len(head) - 3) + "|"]
    for r in rows:
        sides = [f"{r[f'{s}_ms']:.1f} ({r[f'{s}_p10']:.1f}–{r[f'{s}_p90']:.1f})" for s in ("vtc", "published")]
        lines.append(
            f"| {r['op']} | {r['data']} | {r['N']} → {r['k']} | {r['d']} | {r['B']} | {r['threads']} | "
            f"{' | '.join(sides)} | {r['ratio']:.2f} | {r['ratio_cpu']:.2f} | {_times(r['ratio_running'])} | "
            f"{_times(r['ratio_running_cpu'])} | {r['same']:.0f} of {r['k']} |"
        )
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def main(
    smoke: Annotated[bool, typer.Option(help="Tiny shapes, two repetitions, nothing written.")] = False,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[str, typer.Option(help="Numbers of torch threads.")] = "1,2",
    only: Annotated[str, typer.Option(help="Cases whose op or data contain this.")] = "",
    out: Annotated[Path, typer.Option(help="The CSV to write.")] = OUT,
) -> None:
    """Measure every case with every number of threads, print the table, write the CSV."""
    if only and out == OUT and not smoke:
        raise typer.BadParameter("a part would overwrite the whole table: add --out")
    cases = [case for case in (SMOKE if smoke else CASES) if only in case[0] or only in case[1]]
    if not cases:
        raise typer.BadParameter(f"no case has {only!r} in its op or data")
    counts, rows = [int(t) for t in threads.split(",")], []
    for count, case in tqdm([(t, c) for t in counts for c in cases], desc="cases", disable=None):
        torch.set_num_threads(count)
        rows.append(measure(case, count, 2 if smoke else repeats) | provenance())
        if not smoke:  # after every case: an interrupted run leaves what it has
            write_csv(rows, out)
    typer.echo(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
