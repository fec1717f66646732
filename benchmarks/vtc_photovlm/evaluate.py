"""Measure the checkpoint as a user runs it: `python -m vtc_photovlm.evaluate`.

Accuracy of each type with 95 % Wilson intervals; beside it what the same model says of a grey picture, and what the
most frequent answer to the same question in training would score. Questions that turn on cut-outs which training never
shows are counted apart, too.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from vtc.profiling.provenance import provenance
from vtc_tinyvlm.evaluate import SCORES, generate, percent, prepare, score, type_rows, write_csv

from .batches import KINDS
from .data import Question, example, prompt_of, split_questions
from .model import CHECKPOINT, MAX_NEW_TOKENS, load
from .questions import TYPES, sample_questions

PARTS = ("all", "seen", "held")
"""Of the questions: all, those on cut-outs that training shows, and those that turn on one it never shows."""


def most_frequent(asked: Sequence[Question], pictures: int = 5000, assets: Any = None) -> list[str]:
    """What guessing says: the answer that a question in the same words has most often in training, or its type."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(pictures):
        scene, _ = example("train", index, assets)
        for q in sample_questions(scene, KINDS[type(scene)], np.random.default_rng((index, 3))):
            by_text[prompt_of(q)][q.answer] += 1
            by_type[q.type][q.answer] += 1
    return [(by_text.get(q.prompt) or by_type[q.type] or Counter([""])).most_common(1)[0][0] for q in asked]


def without_picture(asked: Sequence[Question]) -> list[Question]:
    """The same questions about a grey picture."""
    return [dataclasses.replace(q, image=Image.new("RGB", q.image.size, (124, 116, 104))) for q in asked]


def answers(model: Any, processor: Any, asked: Sequence[Question], batch: int = 32, what: str = "") -> list[str]:
    """Greedy answers, with a progress bar."""
    from tqdm import tqdm

    texts: list[str] = []
    for inputs in tqdm(prepare(asked, processor, batch), desc=what):
        texts += generate(model, processor, inputs, MAX_NEW_TOKENS)
    return texts


def rows_of(
    asked: Sequence[Question], texts: Sequence[str], blind: Sequence[str], guess: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per part and type; ``blind`` and ``guess`` are shares of right answers, without intervals."""
    rows = []
    for part in PARTS:
        index = [i for i, q in enumerate(asked) if part == "all" or q.held == (part == "held")]
        some = [asked[i] for i in index]
        columns = [[each[i] for i in index] for each in (texts, blind, guess)]
        full, *others = (type_rows(score(column, some), some, TYPES) for column in columns)
        for row, of_blind, of_guess in zip(full, *others, strict=True):
            if row["questions"]:
                rows.append({"part": part} | row | {"blind": of_blind["answer"], "guess": of_guess["answer"]})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The model card's table."""
    lines = ["| part | type | questions | answer | exact match | blind | guess |", "| --- " * 7 + "|"]
    for row in rows:
        shown = [row["part"], row["type"], str(row["questions"]), *(percent(row, name) for name in SCORES)]
        lines.append(f"| {' | '.join(shown)} | {100 * row['blind']:.1f} | {100 * row['guess']:.1f} |")
    return "\n".join(lines)


def main(
    split: Annotated[str, typer.Option(help="validation, or evaluation once the checkpoint is frozen.")] = "validation",
    number: Annotated[int, typer.Option("--questions", help="In equal shares of the types.")] = 2000,
    checkpoint: Annotated[Path, typer.Option(help="The trained part.")] = CHECKPOINT,
    threads: int = 1,
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Answer questions of a split and print the table."""
    import torch

    torch.set_num_threads(threads)
    began = time.time()
    model, processor = load(checkpoint)
    asked = split_questions(number, split)
    texts = answers(model, processor, asked, what=split)
    blind = answers(model, processor, without_picture(asked), what="blind")
    rows = rows_of(asked, texts, blind, most_frequent(asked))
    typer.echo(table(rows))
    everything = [row for row in rows if row["part"] == "all"]
    for name in SCORES:
        typer.echo(f"{name}: mean of types {sum(row[name] for row in everything) / len(everything):.4f}")
    typer.echo(f"{time.time() - began:.0f} s")
    if out is not None:
        write_csv([{"model": "photovlm", "split": split} | row | provenance() for row in rows], out)


if __name__ == "__main__":
    typer.run(main)
