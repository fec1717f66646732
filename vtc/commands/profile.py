"""`vtc profile`: what pruning saves, measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.commands.shared import (
    A_MODEL,
    Calibration,
    Device,
    KeepTexts,
    MethodNames,
    Positions,
    Threads,
    clear_errors,
    numbers,
    numbers_table,
    parse_keeps,
    parse_methods,
    parse_size,
    pick_device,
)
from vtc.values import shown

if TYPE_CHECKING:
    from rich.table import Table

    from vtc.profiling.measure import Measurement
    from vtc.profiling.spread import Spread

DTYPES = ("float32", "bfloat16", "float16")


def profile(
    model: Annotated[
        str | None,
        typer.Argument(help=f"A checkpoint: {A_MODEL}."),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option("--random-weights", metavar="CONFIG", help="No checkpoint: random weights for this config.json."),
    ] = None,
    method: MethodNames = "divprune",
    keep: KeepTexts = "0.25",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1",
    image: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the picture; default: the model's own.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens decoded to time a step; 0: none.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed rounds; every round runs everything once.")] = 7,
    positions: Positions = None,
    calibration: Calibration = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as saved; random weights: float32), float32, bfloat16 ...")
    ] = "auto",
    attention: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...: the model's.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for profile.json, .csv and .png; or a .csv file, which gets the rows alone."),
    ] = None,
) -> None:
    """Measure time to first token, its parts, decoding and memory, pruned against unpruned.

    Wrong results are never timed as gains: a configuration whose results fail the check has no speed-up, and the exit
    code is 1.
    """
    from rich.console import Console

    console = Console()
    with clear_errors():
        import torch

        from vtc.patching import patch
        from vtc.profiling.configs import settings_beside
        from vtc.profiling.measure import profile as measure
        from vtc.profiling.workload import Workload

        keeps, batches = parse_keeps(keep), numbers(batch, "batch")
        workload = Workload(None if image is None else parse_size(image), text)
        if threads:
            torch.set_num_threads(threads)
        vlm, processor, name = _load(model, random_weights, pick_device(device), dtype, attention)
        if random_weights is not None:
            workload = replace(workload, settings=settings_beside(random_weights))
        methods = parse_methods(
            method,
            lambda name: patch(vlm, name).unpatch(),
            lambda line: console.print(line, style="dim", markup=False, highlight=False),
        )
        measured = measure(
            vlm,
            lambda size: workload.inputs(vlm, size, processor),
            methods,
            keeps,
            batches,
            repeats=repeats,
            new_tokens=new_tokens,
            positions=positions,
            calibration=calibration,
            progress=lambda message: console.print(f"[dim]{message} ...[/]"),
        )
        about = describe(vlm, name, workload)
        for table in tables_of(measured):
            console.print(table)
        console.print(NOTES, markup=False, highlight=False)
        console.print(MEASURED.format(**about), markup=False, highlight=False)
        if out is not None:
            for path in _write(measured, about, out, console):
                console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    wrong = [each for each in measured if each.faults]
    for each in wrong:
        typer.echo(f"vtc: {each.method} keep={each.keep} batch={each.batch}: {'; '.join(each.faults)}", err=True)
    if wrong:
        raise typer.Exit(1)


NOTES = """\
TTFT: time to first token of the whole batch = vision (all that comes before the language model is entered) + select \
(everything that the patch does, in the tower and in the layers too) + prefill (the language model). Decode: one step. \
Medians; in brackets 10th and 90th percentile. Speed-up: unpruned / pruned of the same round. Realised: that, divided \
by the ratio of FLOPs with the vision tower. Memory: what the prefill needs at its peak beyond the weights."""
MEASURED = "Measured on {device}, {dtype}, {attention}, torch {torch}, transformers {transformers}: {workload}."


def _load(
    model: str | None, random_weights: str | None, device: str, dtype: str, attention: str | None
) -> tuple[Any, Any, str]:
    """The model, its processor if there is one, and its name."""
    import torch
    from transformers.utils import logging

    from vtc.checkpoint import Checkpoint
    from vtc.names import SHIPPED, load
    from vtc.profiling.workload import random_model

    logging.disable_progress_bar()

    if (model is None) == (random_weights is None):
        raise ValueError("name a checkpoint, or a config with --random-weights CONFIG; exactly one of them")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {shown(dtype)} is none of auto, {', '.join(DTYPES)}")
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if random_weights is not None:
        vlm, processor, name = random_model(random_weights, device, kind), None, f"random:{random_weights}"
    elif model in SHIPPED:
        vlm, processor = load(model)
        vlm, name = vlm.to(device, kind), model
    else:
        assert model is not None
        checkpoint = Checkpoint.load(model, device, dtype)
        vlm, processor, name = checkpoint.model, checkpoint.processor, model
    if attention is not None:
        vlm.set_attn_implementation(attention)
    return vlm, processor, name


def describe(model: Any, name: str, workload: Any) -> dict[str, str]:
    """Provenance, and what was measured, as the columns that come first in a row."""
    from vtc.dialect.modules import attention_of
    from vtc.profiling.provenance import provenance

    size = "native" if workload.image is None else "{}x{}".format(*workload.image)
    return {
        **provenance(model.device),
        "model": name,
        "workload": f"image {size}, {workload.text} text tokens",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_of(model.config.get_text_config()),
    }


def row_of(measurement: Measurement) -> dict[str, Any]:
    """One measurement as numbers: milliseconds, MiB, per batch."""
    import json

    def spread(name: str, value: Spread | None, scale: float = 1.0) -> dict[str, float | None]:
        parts = {name: "median", f"{name}_p10": "low", f"{name}_p90": "high"}
        return {n: None if value is None else scale * getattr(value, part) for n, part in parts.items()}

    config = None if measurement.config is None else measurement.config.to_dict()
    row: dict[str, Any] = {
        "method": measurement.method,
        "keep": repr(measurement.keep),  # 1.0 is everything, 1 is one token
        "options": "" if config is None else json.dumps(config["options"], sort_keys=True),
        "positions": "" if config is None else config["positions"],
        "calibration": "" if config is None else config.get("calibration", ""),
        "batch": measurement.batch,
        "visual_tokens": measurement.visual_tokens,
        "kept_tokens": measurement.kept_tokens,
        "repeats": measurement.repeats,
    }
    for part in ("ttft", "vision", "select", "prefill", "decode"):
        row |= spread(f"{part}_ms", getattr(measurement, part), 1e3)
    peak = measurement.peak_bytes
    row |= {"peak_mib": None if peak is None else peak / 2**20, "cache_mib": measurement.cache_bytes / 2**20}
    row |= spread("speedup", measurement.speedup)
    row |= {"ideal": measurement.ideal} | spread("realised", measurement.realised)
    return row | {"correct": not measurement.faults, "faults": "; ".join(measurement.faults)}


def tables_of(measured: list[Measurement]) -> list[Table]:
    """For each batch size where the time goes, and what pruning brings: two tables that fit 80 columns."""
    from itertools import groupby

    tables = []
    for batch, group in groupby(measured, key=lambda each: each.batch):
        rows = list(group)
        tables += [_times_of(rows, f"Milliseconds, batch {batch}"), _gains_of(rows)]
    return tables


def _times_of(measured: list[Measurement], title: str) -> Table:
    from vtc.profiling.chart import label_of

    decoded = any(each.decode for each in measured)
    table = numbers_table(title, "", "tokens", "TTFT", "vision", "select", "prefill", *(["decode"] if decoded else []))
    for each in measured:
        table.add_row(
            label_of(each),
            f"{each.kept_tokens:.0f}",
            f"{_ms(each.ttft)} [dim]({_ms(each.ttft, 'low')}-{_ms(each.ttft, 'high')})[/]",
            *(_ms(each.vision), _ms(each.select), _ms(each.prefill)),
            *([_ms(each.decode)] if decoded else []),
        )
    return table


def _gains_of(measured: list[Measurement]) -> Table:
    from vtc.profiling.chart import label_of

    peaked = any(each.peak_bytes for each in measured)
    table = numbers_table(None, "", "speed-up", "ideal", "realised", *(["peak\nMiB"] if peaked else []), "cache\nMiB")
    for each in measured:
        table.add_row(
            label_of(each),
            *_gain(each),
            *(["" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.0f}"] if peaked else []),
            f"{each.cache_bytes / 2**20:.1f}",
        )
    return table


def _gain(measurement: Measurement) -> tuple[str, str, str]:
    if measurement.config is None:
        return "", "", ""
    ideal = f"{measurement.ideal:.2f}"
    if measurement.speedup is None or measurement.realised is None:
        return "[red]wrong result[/]", ideal, ""
    speedup, realised = measurement.speedup, measurement.realised
    return (
        f"{speedup.median:.2f}x [dim]({speedup.low:.2f}-{speedup.high:.2f})[/]",
        ideal,
        f"{100 * realised.median:.0f} % [dim]({100 * realised.low:.0f}-{100 * realised.high:.0f})[/]",
    )


def _ms(spread: Spread | None, which: str = "median") -> str:
    if spread is None:
        return ""
    value = 1e3 * getattr(spread, which)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _write(measured: list[Measurement], about: dict[str, str], out: Path, console: Any) -> list[Path]:
    import json

    from vtc.files import write_text
    from vtc.profiling.chart import save_bars
    from vtc.profiling.ledger import Ledger

    rows = [about | row_of(each) for each in measured]
    alone = out.suffix == ".csv"
    ledger = Ledger(
        out if alone else out / "profile.csv",
        list(rows[0]),
        lambda message: console.print(message, markup=False, highlight=False),
    )
    for row in rows:
        ledger.add(row)
    if alone:
        return [ledger.path]
    document, chart = out / "profile.json", out / "profile.png"
    measurements = [row_of(each) for each in measured]
    write_text(document, json.dumps({**about, "measurements": measurements}, indent=1) + "\n")
    save_bars(measured, chart, f"{about['model']}, {about['workload']}\n{about['device']}, {about['dtype']}")
    return [document, ledger.path, chart]
