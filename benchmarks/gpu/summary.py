"""The short table printed last: checks counted, times side by side, whatever was wrong in full."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table

from benchmarks.gpu.rows import NO, SKIPPED, YES, Row

CONTENDERS = ("torch", "triton", "published")
PHASES = ("TTFT", "decode", "entry", "peak memory")


def table(rows: list[Row]) -> Any:
    """Something ``rich`` prints."""
    wrong = [row for row in rows if row.correct == NO]
    voided = [f"WRONG  {row.case}, {row.shape}, {row.dtype}, B={row.batch}, {row.backend}: {row.note}" for row in wrong]
    return Group(_checks(rows), *_ops(rows), *_models(rows), *voided)


def _checks(rows: list[Row]) -> Table:
    """How many rows of each kind of case were right, wrong, or left out, and why most of those were."""
    shown = _table("what", YES, NO, SKIPPED, "left out because")
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.case.split(": ")[-1 if row.backend in CONTENDERS else 0], []).append(row)
    for kind, own in kinds.items():
        count = Counter(row.correct for row in own)
        why = Counter(row.note for row in own if row.correct == SKIPPED).most_common(1)
        shown.add_row(kind, *(str(count[name]) for name in (YES, NO, SKIPPED)), why[0][0][:70] if why else "")
    return shown


def _ops(rows: list[Row]) -> list[Table]:
    """Milliseconds by op, shape and batch; the last two columns are shares of the floor and of the published time."""
    cells: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row.backend in CONTENDERS and row.unit == "ms" and row.median is not None:
            cells.setdefault((row.case.replace("replayed CUDA ", ""), row.shape, row.batch), {})[row.backend] = row
    if not cells:
        return []
    shown = _table("op, ms", "shape", "B", *CONTENDERS, "floor", "of floor", "x published")
    for (case, shape, batch), by in cells.items():
        times = {name: row.median for name, row in by.items()}
        kernel, loop = times.get("triton"), times.get("published")
        against = [by["triton"].ratio if kernel else None, loop / kernel if kernel and loop else None]
        figures = [*(times.get(name) for name in CONTENDERS), next(iter(by.values())).floor, *against]
        shown.add_row(case, shape.split()[0], str(batch), *map(_figure, figures))
    return [shown]


def _models(rows: list[Row]) -> list[Table]:
    """A line for each model, batch and method: times, the share of the ideal speed-up, memory."""
    cells: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        phase, _, name = row.case.partition(": ")
        if phase in PHASES and row.median is not None:
            cells.setdefault((row.shape, row.batch, name), {})[phase] = row
    if not cells:
        return []
    shown = _table("model", "B", "method", "TTFT ms", "ideal ms", "realised", "decode ms", "entry ms", "peak GiB")
    for (shape, batch, name), by in cells.items():
        median = {phase: by[phase].median if phase in by else None for phase in PHASES}
        ideal = [by["TTFT"].floor, by["TTFT"].ratio] if "TTFT" in by else [None, None]
        figures = [median["TTFT"], *ideal, *(median[phase] for phase in PHASES[1:])]
        shown.add_row(shape, str(batch), name, *map(_figure, figures))
    return [shown]


def _table(*columns: str) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for at, name in enumerate(columns):
        text = at == 0 or name in ("shape", "method", "left out because")
        shown.add_column(name, justify="left" if text else "right", no_wrap=True)
    return shown


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
