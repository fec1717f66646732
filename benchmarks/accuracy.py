"""Answer accuracy under compression: `python benchmarks/accuracy.py [--model tinyvlm-next]`.

Every cell (method x keep) answers the same evaluation questions through the public API: `vtc.patch` and the model's
own `generate`, in left-padded batches. Two scores per question: the answer word (first generated word right) and the
exact match (the model also stops after it). The headline mean leaves `count` out and shows it beside: counting reads
how much foreground is left here, so any drop shifts it. Intervals are 95 % Wilson intervals over questions; `random` is
the mean of several seeds, its interval that of a single run over as many questions. `tokens` are the visual tokens
left at the end of the language model, `per layer` their average over its layers: the same but for methods that drop
inside it.

A method is a registered name, which gets `keep` and is otherwise at its defaults, or a name in `CONFIGURATIONS`.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoConfig

import vtc
from vtc.profiling.provenance import provenance
from vtc_tinyvlm import TYPES, Question
from vtc_tinyvlm.evaluate import SCORES, generate, percent, prepare, score, type_rows, write_csv

HEADLINE = "mean_without_count"
UNPRUNED = "none"

MODELS = {"tinyvlm": "vtc_tinyvlm", "tinyvlm-next": "vtc_tinyvlm_next"}

# What a registered name and a keep cannot say; keep -> method. A chain's two parts drop the same share, so that `keep`
# is what is left at the end.
CONFIGURATIONS: dict[str, Callable[[float], vtc.Method]] = {
    "divprune-newlines": lambda keep: vtc.DivPrune(keep=keep, newlines="keep"),
    "idpruner-newlines": lambda keep: vtc.IDPruner(keep=keep, newlines="keep"),
    "todre-full": lambda keep: vtc.ToDRE(keep=keep, stage2=True),
    "globalcom2-probabilities": lambda keep: vtc.GlobalCom2(keep=keep, scores="probabilities"),
    "globalcom2/divprune": lambda keep: vtc.GlobalCom2(keep=keep, selector=vtc.DivPrune()),
    "allocate/divprune": lambda keep: vtc.Allocate(keep=keep, selector=vtc.DivPrune()),
    "divprune+transprune": lambda keep: vtc.Chain(vtc.DivPrune(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
    "idpruner+transprune": lambda keep: vtc.Chain(vtc.IDPruner(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
    "globalcom2+transprune": lambda keep: vtc.Chain(vtc.GlobalCom2(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
}
METHODS = "random,grid,divprune,todre,todre-full,idpruner,transprune,divprune+transprune,idpruner+transprune"
METHODS_NEXT = METHODS + (
    ",globalcom2,globalcom2-probabilities,globalcom2/divprune,allocate/divprune,globalcom2+transprune"
    ",divprune-newlines,idpruner-newlines"
)


@dataclass
class Cell:
    """Scores of one method at one keep: per score and question, the share of seeds that were right."""

    method: str
    keep: float
    kept: float
    layer_average: float
    seeds: int
    seconds: float
    scores: dict[str, list[float]]


def answer_all(
    model: Any, inputs: list[dict[str, Any]], processor: Any, patch: Any
) -> tuple[list[str], tuple[float, float]]:
    """Generated texts of all prepared batches under a patch, and visual tokens per image: in the last layer, and
    averaged over layers.
    """
    texts: list[str] = []
    last = average = 0.0
    with patch as handle:
        for batch in inputs:
            texts += generate(model, processor, batch)
            if handle is not None:
                layers = handle.report().tokens_per_layer
            else:
                layers = (int((batch["input_ids"] == model.config.image_token_id).sum()) / len(batch["input_ids"]),)
            last += layers[-1] * len(batch["input_ids"])
            average += sum(layers) / len(layers) * len(batch["input_ids"])
    return texts, (last / len(texts), average / len(texts))


def apply(model: Any, method: str, keep: float, seed: int) -> Any:
    """The patch of a cell as a context manager; no patch at all for the unpruned cell."""
    if method == UNPRUNED:
        return nullcontext()
    if method in CONFIGURATIONS:
        return vtc.patch(model, CONFIGURATIONS[method](keep))
    return vtc.patch(model, method, keep=keep, **({"seed": seed} if method == "random" else {}))


def rows_of(cell: Cell, questions: list[Question]) -> list[dict[str, Any]]:
    """The headline row and one row per question type."""
    rows = type_rows(cell.scores, questions)
    parts = [r for r in rows if r["type"] != "count"]
    head: dict[str, Any] = {"type": HEADLINE, "questions": sum(r["questions"] for r in parts)}
    for name in SCORES:
        mean = sum(r[name] for r in parts) / len(parts)
        error = math.sqrt(sum(r[name] * (1 - r[name]) / r["questions"] for r in parts)) / len(parts)
        head |= {
            name: mean,
            f"{name}_low": max(0.0, mean - 1.96 * error),
            f"{name}_high": min(1.0, mean + 1.96 * error),
        }
    about: dict[str, Any] = {"method": cell.method, "keep": str(cell.keep), "kept_tokens": f"{cell.kept:.1f}"}
    about |= {"tokens_per_layer": f"{cell.layer_average:.1f}", "seeds": cell.seeds}
    return [about | row | {"seconds": f"{cell.seconds:.1f}"} for row in (head, *rows)]


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The accuracy table: answer-word accuracy per type, headline and exact-match headline."""
    first = rows[0]
    per_type = next(r["questions"] for r in rows if r["type"] == TYPES[0])
    order = [t for t in TYPES if t != "count"]
    lines = [
        f"# Accuracy under compression, {first['model']}",
        "",
        f"Made by `{command}` on {first['date']}, commit {first['commit']}, {first['device']}, torch {first['torch']}, "
        f"transformers {first['transformers']}. {per_type} {first['split']} questions per type, the same in every row. "
        "Per cent of questions whose answer word is right, with 95 % intervals; `mean` leaves `count` out; "
        "`exact` is that mean when the model must also stop after the answer; `tokens` are the visual tokens in the "
        "last layer, `per layer` their average over layers.",
        "",
        "| method | keep | tokens | per layer | mean | exact | " + " | ".join(order) + " | count |",
        "| --- " * (7 + len(order)) + "|",
    ]
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["keep"]), {})[row["type"]] = row
    for (method, keep), by_type in cells.items():
        head = by_type[HEADLINE]
        seeds = f" ({head['seeds']} seeds)" if head["seeds"] > 1 else ""
        shown = [percent(head, "answer"), percent(head, "exact")]
        shown += [percent(by_type[t], "answer") for t in [*order, "count"]]
        tokens = f"{head['kept_tokens']} | {head['tokens_per_layer']}"
        lines.append(f"| {method}{seeds} | {keep} | {tokens} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def package_of(model: str) -> tuple[ModuleType, Any, Any]:
    """The package of a shipped model (or of one in a directory, by its class), the model and its processor."""
    if model in MODELS:
        package = importlib.import_module(MODELS[model])
        return package, *package.load()
    kind = AutoConfig.from_pretrained(model).model_type
    package = importlib.import_module(MODELS["tinyvlm-next" if kind == "llava_next" else "tinyvlm"])
    return package, *package.load(model)


def main(
    model: Annotated[
        str, typer.Option(help="tinyvlm, tinyvlm-next, or a checkpoint directory of the same make as one of them.")
    ] = "tinyvlm",
    methods: Annotated[
        str, typer.Option(help="Registered names or names in CONFIGURATIONS; default: all that the model can do.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Fractions; 1.0 is run once, unpatched.")] = "1.0,0.5,0.25,0.1",
    questions: int = 2400,
    seeds: Annotated[int, typer.Option(help="Runs of `random`.")] = 3,
    batch: int = 64,
    threads: Annotated[int, typer.Option(help="torch threads; 0 leaves them alone.")] = 0,
    split: Annotated[str, typer.Option(help="validation while anything is still being decided.")] = "evaluation",
    out: Annotated[
        Path | None, typer.Option(help="Default: benchmarks/results/accuracy_tinyvlm.csv, or .._tinyvlm_next.csv.")
    ] = None,
) -> None:
    """Measure every cell, print the table, write the CSV and its Markdown rendering."""
    if threads:
        torch.set_num_threads(threads)
    package, vlm, processor = package_of(model)
    name_of_package = package.__name__.removeprefix("vtc_")
    out = out or Path(f"benchmarks/results/accuracy_{name_of_package}.csv")
    methods = methods or (METHODS_NEXT if name_of_package == "tinyvlm_next" else METHODS)
    command = "python benchmarks/accuracy.py" + ("" if model == "tinyvlm" else f" --model {model}")
    asked = package.split_questions(questions, split)
    inputs = prepare(asked, processor, batch)
    plan: list[tuple[str, float]] = []
    for fraction in (float(k) for k in keep.split(",")):
        plan += [(UNPRUNED, 1.0)] if fraction == 1.0 else [(m, fraction) for m in methods.split(",")]
    source, rows = provenance(), []
    bar = tqdm(total=sum(seeds if m == "random" else 1 for m, _ in plan), desc="cells")
    for name, fraction in plan:
        runs, began = (seeds if name == "random" else 1), time.time()
        totals = {score_name: [0.0] * len(asked) for score_name in SCORES}
        for seed in range(runs):
            texts, (kept, layer_average) = answer_all(vlm, inputs, processor, apply(vlm, name, fraction, seed))
            for key, values in score(texts, asked).items():
                totals[key] = [total + value / runs for total, value in zip(totals[key], values, strict=True)]
            bar.update()
        cell = Cell(name, fraction, kept, layer_average, runs, (time.time() - began) / runs, totals)
        rows += [{"model": model, "split": split} | row | source for row in rows_of(cell, asked)]
        write_csv(rows, out)  # after every cell: an interrupted run leaves what it has
        out.with_suffix(".md").write_text(markdown(rows, command))
    bar.close()
    typer.echo(markdown(rows, command))


if __name__ == "__main__":
    typer.run(main)
