"""`vtc estimate`: what pruning can save, by arithmetic on a config."""

from __future__ import annotations

import importlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.commands.shared import (
    SHIPPED,
    KeepText,
    MethodName,
    Options,
    build_config,
    clear_errors,
    parse_size,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vtc.costs import Cost
    from vtc.profiling.estimate import Estimate


def estimate(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a config.json, a name on the hub, tinyvlm, tinyvlm-next or photovlm."),
    ],
    image: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the picture, in pixels.")] = "1024x1024",
    frames: Annotated[int | None, typer.Option(help="A video of so many such frames.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Visual tokens, instead of those that the picture makes.")] = None,
    text: Annotated[int, typer.Option(help="Other tokens of the prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    method: MethodName = "divprune",
    keep: KeepText = "0.25",
    option: Options = None,
    device: Annotated[str, typer.Option(help="Whose roofline: a100, h100, h200, 4090 or cpu.")] = "h200",
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, as JSON.")] = False,
) -> None:
    """Say what pruning can save before anything is loaded: FLOPs, bytes, ceilings and a verdict.

    Times are floors at the data sheet's peak; `vtc profile` measures.
    """
    with clear_errors():
        import transformers

        from vtc.profiling.estimate import estimate as compute

        transformers.utils.logging.set_verbosity_error()
        size = parse_size(image)
        config = build_config(method, keep, option, None)
        name = str(importlib.import_module(SHIPPED[model]).CHECKPOINT) if model in SHIPPED else model
        result = compute(name, size, frames=frames, tokens=tokens, text=text, batch=batch, method=config, device=device)
        if as_json:
            typer.echo(json.dumps(result.to_dict(), indent=1))
            return
        from rich.console import Console

        print_estimate(Console(), model, result)


def print_estimate(console: Console, name: str, result: Estimate) -> None:
    """Head, table of costs, schedule where there is one, verdict, notes."""
    visual = f"{result.picture} is {result.fed}, {result.visual_tokens} visual tokens"
    for line in (
        f"{name}: {result.model}, {result.parameters / 1e9:.3g} B parameters",
        f"{visual}; {result.text_tokens} text tokens; batch {result.batch}",
        result.method,
    ):
        console.print(line, markup=False, highlight=False)
    console.print(_table(result))
    if len(result.schedule) > 1:
        console.print(_schedule(result))
    for sentence in result.verdict:
        console.print(sentence, markup=False, highlight=False)
    for note in (*result.notes, _RULES.format(device=result.device.name)):
        console.print(f"[dim]{note}[/]", highlight=False)


_RULES = (
    "Counted in bfloat16: matrix products; attention causal in the language model; weights read once; selection not "
    "counted. Times are floors for {device} at its peak."
)


def _table(result: Estimate) -> Table:
    from rich.table import Table

    table = Table("", "unpruned", "at least", "pruned", "at least", "ratio")
    sides = result.full, result.pruned

    def work(label: str, costs: list[Cost], seconds: list[float], ratio: float, **more: Any) -> None:
        cells = [c for cost, time in zip(costs, seconds, strict=True) for c in (_flops(cost.flops), _time(time))]
        table.add_row(label, *cells, f"{ratio:.2f}x", **more)

    tower, projector = (result.vision, result.vision_pruned), (result.projector, result.projector_pruned)
    for label, parts in (("vision tower", tower), ("projector", projector)):
        if parts[0].flops:
            work(label, [*parts], [*map(result.seconds, parts)], parts[0].flops / parts[1].flops)
    prefill = [side.prefill for side in sides]
    work("prefill", prefill, [result.seconds(cost) for cost in prefill], result.llm_ratio)
    seconds = [result.ttft_seconds, result.ttft_seconds_pruned]
    total = [before + cost for before, cost in zip((result.before, result.before_pruned), prefill, strict=True)]
    work("first token", total, seconds, result.ttft_ratio, style="bold", end_section=True)
    cells = [cell for side in sides for cell in (_size(side.decode.bytes), _time(result.seconds(side.decode)))]
    table.add_row("a decode step", *cells, f"{result.decode_ratio:.2f}x")
    cells = [cell for side in sides for cell in (_size(side.cache_bytes), "")]
    table.add_row("KV cache", *cells, f"{result.cache_ratio:.2f}x")
    return table


def _scaled(number: float, unit: str, steps: str) -> str:
    """Three digits, with the largest prefix that leaves something before the point."""
    power = max(0, min(len(steps) - 1, int(math.log10(number) // 3))) if number > 0 else 0
    return f"{number / 1000**power:.3g} {steps[power].strip()}{unit}"


def _flops(number: float) -> str:
    return _scaled(number, "FLOP", " kMGTP")


def _size(number: float) -> str:
    return _scaled(number, "B", " kMGT")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _schedule(result: Estimate) -> Table:
    from rich.table import Table

    table = Table("layers", "visual tokens", "FLOP a layer", "of unpruned")
    for first, last, count in result.schedule:
        flops, full = result.pruned.layers[first - 1], result.full.layers[first - 1]
        table.add_row(f"{first} - {last}", str(count), _flops(flops), f"{flops / full:.1%}")
    table.add_row("all", f"{result.average_keep:.1%}", "", "", style="dim")
    return table
