"""How the result of the demo is printed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vtc.demo import Accuracy, Report
from vtc.profiling.spread import Spread


def _percent(accuracy: Accuracy, form: str = "{} [dim]({})[/]") -> str:
    low, high = accuracy.interval
    return form.format(f"{accuracy.rate:.1%}", f"{low:.1%} - {high:.1%}")


def _milliseconds(spread: Spread) -> str:
    return f"{1e3 * spread.median:.0f} ms\n[dim]{1e3 * spread.low:.0f} - {1e3 * spread.high:.0f}[/]"


def _speed(spread: Spread) -> str:
    return f"{spread.median:.2f}x speed\n[dim]{spread.low:.2f} - {spread.high:.2f}[/]"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%} of unpruned"


def print_report(console: Console, report: Report) -> None:
    """The table of `vtc demo`, the accuracy by type of question, and the pictured example."""
    name = f"{report.config.method}, keep {report.config.options['keep']}"
    console.print(_summary(report, name))
    console.print(NOTES.format(report=report), markup=False, highlight=False)
    kinds = Table("accuracy by type", "asked", "unpruned", name)
    for kind, accuracy in report.full.accuracy.items():
        kinds.add_row(kind, str(accuracy.total), _percent(accuracy), _percent(report.pruned.accuracy[kind]))
    console.print(kinds)
    console.print(EXAMPLE.format(report=report), markup=False, highlight=False)
    if report.overlay is not None:
        console.print(f"kept tokens: {report.overlay}", markup=False, highlight=False, soft_wrap=True)


def _summary(report: Report, name: str) -> Table:
    full, pruned = report.full, report.pruned
    before, after = full.headline(), pruned.headline()
    points = f"{100 * (after.rate - before.rate):+.1f} points"
    table = Table("", "unpruned", name, "", show_lines=True)
    table.add_row(
        f"accuracy\n{before.total} questions", *(_percent(a, "{}\n[dim]{}[/]") for a in (before, after)), points
    )
    tokens = f"{full.tokens:.0f}", f"{pruned.tokens:.0f}", _share(pruned.tokens, full.tokens)
    table.add_row("visual tokens per image", *tokens)
    sizes = (f"{side.cache_bytes / 1024:.0f} KiB" for side in (full, pruned))
    table.add_row("KV cache per question", *sizes, _share(pruned.cache_bytes, full.cache_bytes))
    for label, field in (("prefill\nwhole", "total"), ("prefill\nlanguage model", "decoder")):
        times = (_milliseconds(getattr(side, field)) for side in (full, pruned))
        table.add_row(label, *times, _speed(getattr(report, f"speedup_{field}")))
    return table


NOTES = """\
Accuracy: first word of greedy answers, Wilson 95 % interval; questions of type 'count' are left out and shown below.
Prefill: one forward pass over {report.batch} questions, with vision tower, projector, selection and language model; \
of that, the part behind the projector, selection included. Median and range of {report.repeats} runs, unpruned and \
pruned in turns after a warm-up; the factor is the median of their ratios.
Measured on {report.machine}.
"""

EXAMPLE = """\
The first question: {report.question} -> {report.answer}
  unpruned: {report.full.answers[0]}
  pruned:   {report.pruned.answers[0]}"""
