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

A method is a registered name, which gets `keep` and is otherwise at its defaults, or a name in `CONFIGURATIONS`.
Positions are the original ones; `--positions compact` renumbers them, for methods that can. `--keep` may count tokens
(`--keep 16,8`), with `--methods`.
"""

from __future__ import annotations

import csv
import importlib
import math
import time
from collections.abc import Callable, Sequence
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
from vtc.budget import Keep
from vtc.commands.shared import parse_keep
from vtc.methods import make_method, method_class
from vtc.methods.video import VideoMethod
from vtc.profiling.provenance import provenance
from vtc_tinyvlm import TYPES, Question
from vtc_tinyvlm.evaluate import SCORES, generate, percent, prepare, score, type_rows, write_csv

HEADLINE = "mean_without_count"
UNPRUNED, ORIGINAL = "none", "original"

MODELS = {
    "tinyvlm": "vtc_tinyvlm",
    "tinyvlm-next": "vtc_tinyvlm_next",
    "tinyvlm-mqt": "vtc_tinyvlm.mqt_model",
    "photovlm": "vtc_photovlm",
}

# What a registered name and a keep cannot say; keep -> method. A chain's two parts drop the same share, so that `keep`
# is what is left at the end.
CONFIGURATIONS: dict[str, Callable[[float], vtc.Method]] = {
    "divprune-centred": lambda keep: vtc.DivPrune(keep=keep, centered=True),
    "idpruner-centred": lambda keep: vtc.IDPruner(keep=keep, centered=True),
    "merge/divprune": lambda keep: vtc.Merge(vtc.DivPrune(keep=keep)),
    "merge/fastervlm": lambda keep: vtc.Merge(vtc.FasterVLM(keep=keep)),
    "adaptive-0.1/divprune": lambda keep: vtc.Adaptive(vtc.DivPrune(keep=keep), radius=0.1),
    "adaptive-0.2/divprune": lambda keep: vtc.Adaptive(vtc.DivPrune(keep=keep), radius=0.2),
    "intower-diverse": lambda keep: vtc.InTower(rule="diverse", keep=keep),
    "intower-late": lambda keep: vtc.InTower(keep=keep, after=2 / 3),
    "intower/divprune": lambda keep: vtc.InTower(keep=keep**0.5, then=vtc.DivPrune(keep=keep)),
    "prumerge-adaptive": lambda keep: vtc.PruMerge(adaptive=True),
    "vscan-full": lambda keep: vtc.VScan(keep=keep, stage2=True),
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
FIRST = ("random", "grid", "divprune")
"""What every method has to beat, and the plainest that does."""
MADE_OF_OTHERS = ("allocate", "chain", "merge", "adaptive")
"""At their defaults they say nothing of their own."""


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


def answer_all(
    model: Any, inputs: list[dict[str, Any]], processor: Any, patch: Any, max_new_tokens: int = 3
) -> tuple[list[str], tuple[float, float]]:
    """Generated texts of all prepared batches under a patch, and visual tokens per image: in the last layer, and
    averaged over layers.
    """
    texts: list[str] = []
    last = average = 0.0
    with patch as handle:
        for batch in inputs:
            texts += generate(model, processor, batch, max_new_tokens)
            if handle is not None:
                layers = handle.report().tokens_per_layer
            else:
                layers = (int((batch["input_ids"] == model.config.image_token_id).sum()) / len(batch["input_ids"]),)
            last += layers[-1] * len(batch["input_ids"])
            average += sum(layers) / len(layers) * len(batch["input_ids"])
    return texts, (last / len(texts), average / len(texts))


def method_of(name: str, keep: Keep, seed: int = 0) -> vtc.Method:
    """A registered name or one of the combinations."""
    if name in CONFIGURATIONS:
        return CONFIGURATIONS[name](keep)
    return make_method(name, keep=keep, **({"seed": seed} if name == "random" else {}))


def apply(model: Any, name: str, keep: Keep, seed: int, positions: str) -> Any:
    """The patch of a cell as a context manager; no patch at all for the unpruned cell."""
    if name == UNPRUNED:
        return nullcontext()
    return vtc.patch(model, method_of(name, keep, seed), positions=positions)


def able(model: Any, keep: float, positions: str) -> list[str]:
    """The methods that this model can run; why not of the others goes to stderr."""
    rest = [n for n in vtc.list_methods() if not issubclass(method_class(n), VideoMethod)]
    rest = [n for n in rest if n not in (*FIRST, *MADE_OF_OTHERS)]
    found = []
    for name in (*FIRST, *rest, *CONFIGURATIONS):
        try:
            vtc.patch(model, method_of(name, keep), positions=positions).unpatch()
        except ValueError as reason:
            typer.echo(f"{name}: {reason}", err=True)
        else:
            found.append(name)
    return found


def rows_of(cell: Cell, questions: list[Question], types: Sequence[str] = TYPES) -> list[dict[str, Any]]:
    """The headline row and one row per question type."""
    rows = type_rows(cell.scores, questions, types)
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
        if row["type"] != HEADLINE:
            cell = row["method"], parse_keep(row["keep"]), row["positions"]
            asked[cell] = asked.get(cell, 0) + int(row["questions"])
    return {cell for cell, number in asked.items() if number == questions}


def markdown(rows: list[dict[str, Any]], command: str, types: Sequence[str] = TYPES) -> str:
    """The accuracy table: answer-word accuracy per type, headline and exact-match headline."""
    first = rows[0]
    per_type = next(r["questions"] for r in rows if r["type"] == types[0])
    order = [t for t in types if t != "count"]
    lines = [
        f"# Accuracy under compression, {first['model']}",
        "",
        f"Made by `{command}`, on {first['device']}; the CSV beside this names date, commit and versions of every row. "
        f"{per_type} {first['split']} questions per type, the same in every row. "
        "Per cent of questions whose answer word is right, with 95 % intervals; `mean` leaves `count` out; "
        "`exact` is that mean when the model must also stop after the answer; `tokens` are the visual tokens in the "
        "last layer, `per layer` their average over layers.",
        "",
        "| method | keep | positions | tokens | per layer | mean | exact | " + " | ".join(order) + " | count |",
        "| --- " * (8 + len(order)) + "|",
    ]
    cells: dict[tuple[str, Keep, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["method"], parse_keep(row["keep"]), row["positions"]), {})[row["type"]] = row
    ordered = sorted(cells.items(), key=lambda cell: (cell[0][2] != ORIGINAL, -cell[0][1]))
    for (method, keep, positions), by_type in ordered:
        head = by_type[HEADLINE]
        seeds = f" ({head['seeds']} seeds)" if int(head["seeds"]) > 1 else ""
        shown = [percent(head, "answer"), percent(head, "exact")]
        shown += [percent(by_type[t], "answer") for t in [*order, "count"]]
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
    rows = read_rows(out) if resume else []
    have = finished(rows, len(asked))
    plan: list[tuple[str, Keep, str]] = []
    for kind in positions.split(","):
        for share in map(parse_keep, keep.split(",")):
            if isinstance(share, int) and (not methods or set(methods.split(",")) & CONFIGURATIONS.keys()):
                raise typer.BadParameter(f"--keep {share} counts tokens: name registered --methods for it")
            whole = isinstance(share, float) and share == 1.0
            names = [UNPRUNED] if whole else methods.split(",") if methods else able(vlm, share, kind)
            plan += [(name, share, kind) for name in names if not whole or kind == ORIGINAL]
    plan = [cell for cell in plan if cell not in have]
    source, inputs = provenance(), prepare(asked, processor, batch)
    bar = tqdm(total=sum(seeds if m == "random" else 1 for m, _, _ in plan), desc="cells")
    for name, share, kind in plan:
        runs, began = (seeds if name == "random" else 1), time.time()
        totals = {score_name: [0.0] * len(asked) for score_name in SCORES}
        for seed in range(runs):
            texts, (kept, layer_average) = answer_all(
                vlm, inputs, processor, apply(vlm, name, share, seed, kind), limit
            )
            for key, values in score(texts, asked).items():
                totals[key] = [total + value / runs for total, value in zip(totals[key], values, strict=True)]
            bar.update()
        cell = Cell(name, share, kind, kept, layer_average, runs, (time.time() - began) / runs, totals)
        rows += [{"model": model, "split": split} | row | source for row in rows_of(cell, asked, package.TYPES)]
        write_csv(rows, out)  # after every cell: an interrupted run leaves what it has
        out.with_suffix(".md").write_text(markdown(rows, command, package.TYPES))
    bar.close()
    typer.echo(markdown(rows, command, package.TYPES))


if __name__ == "__main__":
    typer.run(main)
