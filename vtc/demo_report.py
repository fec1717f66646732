"""How the result of the demo is printed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vtc.demo import Accuracy, DemoResult
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


def print_report(console: Console, result: DemoResult) -> None:
    """The table of `vtc demo`, the accuracy by type of question, and the pictured example."""
    name = result.config.build().title
    console.print(_summary(result, name))
    console.print(NOTES.format(result=result), markup=False, highlight=False)
    kinds = Table("accuracy by type", "asked", "unpruned", name)
    for kind, accuracy in result.full.accuracy.items():
        kinds.add_row(kind, str(accuracy.total), _percent(accuracy), _percent(result.pruned.accuracy[kind]))
    console.print(kinds)
    console.print(EXAMPLE.format(result=result), markup=False, highlight=False)
    if result.overlay is not None:
        console.print(f"kept tokens: {result.overlay}", markup=False, highlight=False, soft_wrap=True)
    if (photo := result.photograph) is not None:
        console.print(PHOTOGRAPH.format(photo=photo), markup=False, highlight=False)
        if photo.overlay is not None:
            console.print(f"kept tokens: {photo.overlay}", markup=False, highlight=False, soft_wrap=True)


def _summary(result: DemoResult, name: str) -> Table:
    full, pruned = result.full, result.pruned
    before, after = full.headline(), pruned.headline()
    points = f"{100 * (after.rate - before.rate):+.1f} points"
    table = Table("", "unpruned", name, "", show_lines=True)
    table.add_row(
        f"accuracy\n{before.total} questions", *(_percent(a, "{}\n[dim]{}[/]") for a in (before, after)), points
    )
    tokens = f"{full.tokens:.0f}", f"{pruned.tokens:.0f}", _share(pruned.tokens, full.tokens)
    table.add_row("visual tokens per image", *tokens)
    sizes = (f"{run.cache_bytes / 1024:.0f} KiB" for run in (full, pruned))
    table.add_row("KV cache per question", *sizes, _share(pruned.cache_bytes, full.cache_bytes))
    for label, field in (("prefill\nwhole", "total"), ("prefill\nlanguage model", "decoder")):
        times = (_milliseconds(getattr(run, field)) for run in (full, pruned))
        table.add_row(label, *times, _speed(getattr(result, f"speedup_{field}")))
    return table


NOTES = """\
Accuracy: first word of greedy answers, Wilson 95 % interval; questions of type 'count' are left out and shown below.
Prefill: one forward pass over {result.batch} questions, with vision tower, projector, selection and language model; \
of that, the part behind the projector, selection included. Median and range of {result.repeats} runs, unpruned and \
pruned in turns after a warm-up; the factor is the median of their ratios.
Measured on {result.machine}.
"""

EXAMPLE = """\
The first question: {result.question} -> {result.answer}
  unpruned: {result.full.answers[0]}
  pruned:   {result.pruned.answers[0]}"""

PHOTOGRAPH = """
And a photograph, through a pretrained DINOv2 (photovlm; the first such question, whatever comes of it): \
{photo.question} -> {photo.answer}
  unpruned: {photo.unpruned} ({photo.tokens} visual tokens)
  pruned:   {photo.pruned} ({photo.kept})"""
