"""Methods question by question: `python benchmarks/paired.py [--model photovlm]`.

Reads the answers that `benchmarks/accuracy.py --answers` wrote, and runs nothing. Of each method and keep: accuracy,
the difference to DivPrune's and to random's with the same keep and positions (same questions; 95 % intervals for paired
proportions), loyalty, and accuracy on hard questions (:mod:`vtc.profiling.beside` says what these are). What is in no
mean of that model, such as `count`, is left out; of `random` each number is the mean of its seeds, with the interval of
one run.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no installed package

from benchmarks.accuracy import LEFT_OUT, MODELS, all_of
from benchmarks.answering import ORIGINAL, UNPRUNED, AnswerSheet, read_answers
from vtc.commands.shared import parse_keep
from vtc.profiling.beside import accuracy, beside_downsampled, beside_unpruned
from vtc.profiling.exam import Answers, Exam, fingerprint
from vtc.profiling.intervals import paired_loss
from vtc.profiling.sweep import SMALLER
from vtc.profiling.tasks import Task
from vtc_tinyvlm.evaluate import write_csv
from vtc_tinyvlm.scoring import is_correct

OTHERS = ("divprune", "random")
"""What every method is compared with."""
SPREAD = ("", "_low", "_high")


def read(path: Path, apart: Sequence[str] = LEFT_OUT) -> tuple[Exam, dict[tuple[str, str, str], list[Answers]]]:
    """Questions, and the answers of each method, keep and positions, one for each seed."""
    columns = read_answers(path)
    lines = zip(columns["type"], columns["answer"], strict=True)
    asked = [SimpleNamespace(type=kind, answer=answer, prompt="") for kind, answer in lines]
    task = Task("answers", lambda number: asked, None, apart=frozenset(apart))
    exam = Exam(None, None, task, asked)
    found: dict[tuple[str, str, str], list[Answers]] = {}
    for name in columns.keys() - set(AnswerSheet.ABOUT):
        method, keep, *rest = name.split()
        positions = next((word for word in rest if not word.startswith("seed=")), ORIGINAL)
        texts = columns[name]
        scores = [float(is_correct(text, q.answer)) for text, q in zip(texts, asked, strict=True)]
        said = [fingerprint(text) for text in texts]
        found.setdefault((method, keep, positions), []).append(Answers(scores, said, 0.0))
    return exam, found


def mean_scores(runs: Sequence[Answers]) -> Answers:
    """The mean of the seeds for each question."""
    scores = [statistics.fmean(each) for each in zip(*(run.scores for run in runs), strict=True)]
    return Answers(scores, runs[0].said, 0.0)


def rows_of(exam: Exam, found: dict[tuple[str, str, str], list[Answers]]) -> list[dict[str, Any]]:
    """One row for each method, keep and positions; the unpruned model first, then by keep.

    Raises:
        ValueError: the sheet has no unpruned answers.
    """
    whole = (UNPRUNED, "1.0", ORIGINAL)
    if whole not in found:
        raise ValueError("there are no unpruned answers to compare with: run accuracy.py with --keep 1.0 first")
    unpruned, rows = found[whole][0], []
    for (method, keep, positions), runs in sorted(found.items(), key=lambda item: _order(*item[0])):
        answers = mean_scores(runs)
        row: dict[str, Any] = {"method": method, "keep": keep, "positions": positions, "seeds": len(runs)}
        row |= {"questions": len(exam.counted)} | accuracy(exam, answers)
        for other in OTHERS:
            difference: Sequence[Any] = ("", "", "")
            if method not in (other, UNPRUNED) and (pair := found.get((other, keep, positions))):
                difference = _difference(exam, answers, mean_scores(pair))
            row |= {f"minus_{other}{end}": value for end, value in zip(SPREAD, difference, strict=True)}
        loyal = [beside_unpruned(exam, run, unpruned) for run in runs]
        row |= {f"loyalty{end}": statistics.fmean(each[f"loyalty{end}"] for each in loyal) for end in SPREAD}
        smaller = found.get((SMALLER, keep, ORIGINAL))
        row |= beside_downsampled(exam, answers, unpruned, smaller[0] if smaller else None)
        rows.append(row)
    return rows


def _order(method: str, keep: str, positions: str) -> tuple[Any, ...]:
    return method != UNPRUNED, positions != ORIGINAL, -float(parse_keep(keep)), method


def _difference(exam: Exam, answers: Answers, other: Answers) -> tuple[float, float, float]:
    """By how much the first is better."""
    loss, low, high = paired_loss(exam.headline(answers.scores), exam.headline(other.scores))
    return loss, low, high


def markdown(rows: Iterable[dict[str, Any]], model: str, command: str, apart: Sequence[str] = LEFT_OUT) -> str:
    """The table, in per cent and points."""

    def shown(row: dict[str, Any], name: str, sign: str = "") -> str:
        numbers = [row[f"{name}{end}"] for end in SPREAD]
        if any(number in ("", None) for number in numbers):
            return ""
        middle, low, high = (f"{100 * number:{sign}.1f}" for number in numbers)
        return f"{middle} ({low} to {high})"

    lines = [
        f"# Question by question, {model}",
        "",
        f"Made by `{command}` from the answers that `python benchmarks/accuracy.py --answers` wrote. Per cent and "
        f"points with 95 % intervals, without {all_of(apart)}. Minus DivPrune, minus random: paired differences, same "
        "questions, same keep. Loyalty: answers that are the unpruned model's, right or wrong. Hard: of the questions "
        "that the whole picture answers and a smaller one of as many tokens does not, how many are answered.",
        "",
        "| method | keep | positions | accuracy | minus DivPrune | minus random | loyalty | hard questions | hard |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        cells = [row["method"], row["keep"], row["positions"], shown(row, "accuracy")]
        cells += [shown(row, f"minus_{other}", "+") for other in OTHERS]
        number = row["hard_questions"]
        cells += [shown(row, "loyalty"), "" if number is None else str(number), shown(row, "hard")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Option(help="As for accuracy.py.")] = "photovlm",
    answers: Annotated[
        Path | None, typer.Option(help="The sheet; default: benchmarks/results/answers_photovlm.csv, or of the other.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: paired_photovlm.csv beside it.")] = None,
) -> None:
    """Compare, print the table, write the CSV and its Markdown rendering."""
    named = model.replace("-", "_")
    answers = answers or Path(f"benchmarks/results/answers_{named}.csv")
    out = out or answers.with_name(f"paired_{named}.csv")
    apart = getattr(importlib.import_module(MODELS[model]), "LEFT_OUT", LEFT_OUT)
    rows = rows_of(*read(answers, apart))
    write_csv([{"model": model} | row for row in rows], out)
    command = "python benchmarks/paired.py" + ("" if model == "photovlm" else f" --model {model}")
    page = markdown(rows, model, command, apart)
    out.with_suffix(".md").write_text(page)
    typer.echo(page)


if __name__ == "__main__":
    typer.run(main)
