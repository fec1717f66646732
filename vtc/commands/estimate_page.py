"""What `vtc estimate` prints: one estimate, several methods side by side, or a line for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vtc.commands.shared import numbers_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vtc.costs import Cost
    from vtc.profiling.estimate import Estimate
    from vtc.published import Published


def print_estimate(console: Console, name: str, result: Estimate) -> None:
    """Head, table of costs, schedule where there is one, verdict, notes."""
    _print_head(console, name, result)
    console.print(result.method, markup=False, highlight=False)
    console.print(_costs(result))
    if len(result.schedule) > 1:
        console.print(_schedule(result))
    for sentence in result.verdict:
        console.print(sentence, markup=False, highlight=False)
    for note in (*result.notes, _RULES.format(device=result.device.name)):
        console.print(f"[dim]{note}[/]", highlight=False)


def print_methods(console: Console, name: str, found: Mapping[str, Estimate]) -> None:
    """Head, one line for each method and keep beside what needs none, and what limits all of them."""
    first = next(iter(found.values()))
    _print_head(console, name, first)
    table = numbers_table(None, "", "tokens", "prefill", "first token", "at least", "a decode step", "KV cache")
    table.add_row("unpruned", str(first.visual_tokens), "", "", _time(first.ttft_seconds), "", "")
    for way in first.halves[:1]:
        table.add_row(way.words, str(way.tokens), "", f"{way.ttft_ratio:.2f}x", _time(way.seconds), "", "")
    for label, each in found.items():
        kept = f"{each.average_keep * each.visual_tokens:.0f}"
        ratios = (f"{ratio:.2f}x" for ratio in (each.decode_ratio, each.cache_ratio))
        seconds = _time(each.ttft_seconds_pruned)
        table.add_row(label, kept, f"{each.llm_ratio:.2f}x", f"{each.ttft_ratio:.2f}x", seconds, *ratios)
    console.print(table)
    console.print(
        f"Tokens: averaged over layers. The vision tower is {first.vision_share:.0%} of the work before the first "
        f"token: nothing after it can beat {first.ceiling:.1f}x.",
        markup=False,
        highlight=False,
    )
    if first.halves:
        console.print(
            f"{first.halves[0].words} is the processor's own budget, and lowering it comes first: the vision tower "
            "gets less to do too.",
            markup=False,
            highlight=False,
        )
    for note in dict.fromkeys(note for each in found.values() for note in each.notes):
        console.print(f"[dim]{note}[/]", highlight=False)
    console.print(f"[dim]{_RULES.format(device=first.device.name)}[/]", highlight=False)


def print_models(console: Console, found: Mapping[str, Estimate]) -> None:
    """One line for each model."""
    table = numbers_table(None, "model", "B", "visual\ntokens", "tower", "ceiling", "place", "half of the tokens by")
    for name, each in found.items():
        budget = each.halves[0].words if each.halves else ""
        share = f"{each.vision_share:.0%}", f"{each.ceiling:.1f}x"
        table.add_row(name, f"{each.parameters / 1e9:.3g}", str(each.visual_tokens), *share, each.best_place, budget)
    first = next(iter(found.values()))
    console.print(table)
    console.print(
        f"{first.picture}, {first.text_tokens} text tokens, batch {first.batch}. Tower: its share of the work before "
        "the first token, projector included. Ceiling: the most that dropping visual tokens behind it can win. Place: "
        "where a method wins most. The last column is the processor's own budget, which comes first where it has one.",
        markup=False,
        highlight=False,
    )


def print_source(console: Console, known: Published) -> None:
    """Where a config that came from no hub and no folder was read."""
    line = f"Config of {known.name} as published, read on {known.read}: {known.sources[0]}"
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _print_head(console: Console, name: str, result: Estimate) -> None:
    visual = f"{result.picture} is {result.fed}, {result.visual_tokens} visual tokens"
    for line in (
        f"{name}: {result.model}, {result.parameters / 1e9:.3g} B parameters",
        f"{visual}; {result.text_tokens} text tokens; batch {result.batch}",
    ):
        console.print(line, markup=False, highlight=False)


_RULES = (
    "Counted in bfloat16: matrix products; attention causal in the language model; weights read once; selection not "
    "counted. Times are floors for {device} at its peak."
)


def _costs(result: Estimate) -> Table:
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
