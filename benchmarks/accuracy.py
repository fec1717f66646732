"""Answer accuracy under compression: `python benchmarks/accuracy.py [--model tinyvlm-next | tinyvlm-mqt | photovlm]`.

Every registered method that the model can run, and the combinations in `CONFIGURATIONS`. With `--resume` cells that the
CSV has are kept, whatever commit they are of (each row names its own), and only the others are run.

Every cell (method x keep) answers the same evaluation questions through the public API: `vtc.patch` and the model's
own `generate`, in left-padded batches. Two scores per question: the answer word (first generated word right) and the
exact match (the model also stops after it). The headline mean leaves `count` out and shows it beside: counting reads
how much foreground is left here, so any drop shifts it. Intervals are 95 % Wilson intervals over questions; `random` is
the mean of several seeds, its interval that of a single run over as many questions. `tokens` are the visual tokens
left at the end of the language model, `per layer` their average over its layers: the same but for methods that drop
inside it.

Beside the methods there are two baselines that make pictures coarser (vtc.profiling.downsample). Positions are the
original ones; `--positions compact` renumbers them, for methods that can. `--keep` may count tokens (`--keep 16,8`),
with `--methods`. `--answers` keeps what was answered, which `python benchmarks/paired.py` compares.
"""

from __future__ import annotations

import csv
import importlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is no installed package

from benchmarks.answering import CONFIGURATIONS, ORIGINAL, UNPRUNED, AnswerSheet, Paper, Way, able, answer_all
from vtc.budget import Keep
from vtc.commands.shared import parse_keep
from vtc.profiling.provenance import provenance
from vtc_tinyvlm import TYPES, Question
from vtc_tinyvlm.evaluate import SCORES, percent, score, type_rows, write_csv

LEFT_OUT = ("count",)
"""Types of questions that are in no mean, where a package does not say otherwise."""
MEAN = "mean_without_"
HEADLINE = MEAN + "count"

MODELS = {
    "tinyvlm": "vtc_tinyvlm",
    "tinyvlm-next": "vtc_tinyvlm_next",
    "tinyvlm-mqt": "vtc_tinyvlm.mqt_model",
    "photovlm": "vtc_photovlm",
}


@dataclass
class Cell:
    """Scores of one method at one keep: per score and question, the share of seeds that were right."""

    method: str
    keep: Keep
    positions: str
    kept: float
    layer_average: float
    seeds: int
    seconds: float
    scores: dict[str, list[float]]


def rows_of(
    cell: Cell, questions: list[Question], types: Sequence[str] = TYPES, apart: Sequence[str] = LEFT_OUT
) -> list[dict[str, Any]]:
    """The headline row and one row per question type."""
    rows = type_rows(cell.scores, questions, types)
    parts = [r for r in rows if r["type"] not in apart]
    head: dict[str, Any] = {"type": MEAN + "_".join(apart), "questions": sum(r["questions"] for r in parts)}
    for name in SCORES:
        mean = sum(r[name] for r in parts) / len(parts)
        error = math.sqrt(sum(r[name] * (1 - r[name]) / r["questions"] for r in parts)) / len(parts)
        head |= {
            name: mean,
            f"{name}_low": max(0.0, mean - 1.96 * error),
            f"{name}_high": min(1.0, mean + 1.96 * error),
        }
    about: dict[str, Any] = {"method": cell.method, "keep": str(cell.keep), "positions": cell.positions}
    about |= {"kept_tokens": f"{cell.kept:.1f}"}
    about |= {"tokens_per_layer": f"{cell.layer_average:.1f}", "seeds": cell.seeds}
    return [about | row | {"seconds": f"{cell.seconds:.1f}"} for row in (head, *rows)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as they were written, scores as numbers again."""
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        rows: list[dict[str, Any]] = list(csv.DictReader(handle))
    numbers = [f"{name}{end}" for name in SCORES for end in ("", "_low", "_high")]
    return [row | {name: float(row[name]) for name in numbers} for row in rows]


def finished(rows: list[dict[str, Any]], questions: int) -> set[tuple[str, Keep, str]]:
    """Method, keep and positions of the cells that were asked so many questions."""
    asked: dict[tuple[str, Keep, str], int] = {}
    for row in rows:
        if not row["type"].startswith(MEAN):
            cell = row["method"], parse_keep(row["keep"]), row["positions"]
            asked[cell] = asked.get(cell, 0) + int(row["questions"])
    return {cell for cell, number in asked.items() if number == questions}


def all_of(names: Sequence[str]) -> str:
    """Types of questions in a sentence."""
    return " and ".join(f"`{name}`" for name in names)


def markdown(
    rows: list[dict[str, Any]], command: str, types: Sequence[str] = TYPES, apart: Sequence[str] = LEFT_OUT
) -> str:
    """The accuracy table: answer-word accuracy per type, headline and exact-match headline."""
    first = rows[0]
    per_type = next(r["questions"] for r in rows if r["type"] == types[0])
    order = [*(t for t in types if t not in apart), *apart]
    lines = [
        f"# Accuracy under compression, {first['model']}",
        "",
        f"Made by `{command}`, on {first['device']}; the CSV beside this names date, commit and versions of every row. "
        f"{per_type} {first['split']} questions per type, the same in every row. "
        f"Per cent of questions whose answer word is right, with 95 % intervals; `mean` leaves {all_of(apart)} out; "
        "`exact` is that mean when the model must also stop after the answer; `tokens` are the visual tokens in the "
        "last layer, `per layer` their average over layers.",
        "",
        "| method | keep | positions | tokens | per layer | mean | exact | " + " | ".join(order) + " |",
        "| --- " * (7 + len(order)) + "|",
    ]
    cells: dict[tuple[str, Keep, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], parse_keep(row["keep"]), row["positions"]), {})[row["type"]] = row
    ordered = sorted(cells.items(), key=lambda cell: (cell[0][2] != ORIGINAL, -cell[0][1]))
    for (method, keep, positions), by_type in ordered:
        head = by_type[MEAN + "_".join(apart)]
        seeds = f" ({head['seeds']} seeds)" if int(head["seeds"]) > 1 else ""
        shown = [percent(head, "answer"), percent(head, "exact")]
        shown += [percent(by_type[t], "answer") for t in order]
        tokens = f"{head['kept_tokens']} | {head['tokens_per_layer']}"
        lines.append(f"| {method}{seeds} | {keep} | {positions} | {tokens} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def package_of(model: str) -> tuple[ModuleType, Any, Any]:
    """The package of a shipped model (or of one in a directory, by its class), the model and its processor."""
    if model in MODELS:
        package = importlib.import_module(MODELS[model])
        return package, *package.load()
    config = AutoConfig.from_pretrained(model)
    named = {"llava_next": "tinyvlm-next", "llava_mqt": "tinyvlm-mqt"}.get(config.model_type, "tinyvlm")
    if config.model_type == "llava" and config.vision_config.model_type == "dinov2":
        named = "photovlm"
    package = importlib.import_module(MODELS[named])
    return package, *package.load(model)


def main(
    model: Annotated[
        str,
        typer.Option(
            help="tinyvlm, tinyvlm-next, tinyvlm-mqt, photovlm, or a directory of the same make as one of them."
        ),
    ] = "tinyvlm",
    methods: Annotated[
        str, typer.Option(help="Registered names or names in CONFIGURATIONS; default: all that the model can run.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Fractions, or tokens; 1.0 is run once, unpatched.")] = "1.0,0.5,0.25,0.1",
    positions: Annotated[str, typer.Option(help="original, compact, or both with a comma.")] = ORIGINAL,
    questions: int = 2400,
    seeds: Annotated[int, typer.Option(help="Runs of `random`.")] = 3,
    batch: int = 64,
    threads: Annotated[int, typer.Option(help="torch threads; 0 leaves them alone.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the cells that the CSV has.")] = False,
    split: Annotated[str, typer.Option(help="validation while anything is still being decided.")] = "evaluation",
    out: Annotated[
        Path | None, typer.Option(help="Default: benchmarks/results/accuracy_tinyvlm.csv, or that of the other model.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="A CSV for the words answered; with --resume cells that it lacks are run again.")
    ] = None,
) -> None:
    """Measure every cell, print the table, write the CSV and its Markdown rendering."""
    if threads:
        torch.set_num_threads(threads)
    package, vlm, processor = package_of(model)
    named = {module: name for name, module in MODELS.items()}[package.__name__]
    out = out or Path(f"benchmarks/results/accuracy_{named.replace('-', '_')}.csv")
    command = "python benchmarks/accuracy.py" + ("" if model == "tinyvlm" else f" --model {model}")
    command += f" --methods {methods} --keep {keep} --positions {positions}" if methods else ""
    asked, limit = package.split_questions(questions, split), getattr(package, "MAX_NEW_TOKENS", 3)
    kinds = package.TYPES, getattr(package, "LEFT_OUT", LEFT_OUT)
    rows = read_rows(out) if resume else []
    sheet = AnswerSheet(answers, asked) if answers else None
    have = finished(rows, len(asked))
    if sheet:
        have = {cell for cell in have if Way(*cell).column in sheet.columns}
    plan: list[tuple[str, Keep, str]] = []
    for kind in positions.split(","):
        for share in map(parse_keep, keep.split(",")):
            if isinstance(share, int) and (not methods or set(methods.split(",")) & CONFIGURATIONS.keys()):
                raise typer.BadParameter(f"--keep {share} counts tokens: name registered --methods for it")
            whole = isinstance(share, float) and share == 1.0
            names = [UNPRUNED] if whole else methods.split(",") if methods else able(vlm, processor, share, kind)
            plan += [(name, share, kind) for name in names if not whole or kind == ORIGINAL]
    plan = [cell for cell in plan if cell not in have]
    source, paper = provenance(), Paper(asked, processor, batch)
    rows = [row for row in rows if (row["method"], parse_keep(row["keep"]), row["positions"]) not in plan]
    bar = tqdm(total=sum(seeds if m == "random" else 1 for m, _, _ in plan), desc="cells")
    for name, share, kind in plan:
        runs, began = (seeds if name == "random" else 1), time.time()
        totals = {score_name: [0.0] * len(asked) for score_name in SCORES}
        for seed in range(runs):
            way = Way(name, share, kind, seed)
            texts, (kept, layer_average) = answer_all(vlm, paper, way, limit)
            if sheet:
                sheet.add(way, texts)
            for key, values in score(texts, asked).items():
                totals[key] = [total + value / runs for total, value in zip(totals[key], values, strict=True)]
            bar.update()
        cell = Cell(name, share, kind, kept, layer_average, runs, (time.time() - began) / runs, totals)
        rows += [{"model": model, "split": split} | row | source for row in rows_of(cell, asked, *kinds)]
        write_csv(rows, out)  # after every cell: an interrupted run leaves what it has
        out.with_suffix(".md").write_text(markdown(rows, command, *kinds))
    bar.close()
    typer.echo(markdown(rows, command, *kinds))


if __name__ == "__main__":
    typer.run(main)
