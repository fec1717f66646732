"""Measure the checkpoint as a user runs it: `python -m vtc_tinyvlm.evaluate`.

Plain `from_pretrained`, processor, left-padded batches, greedy `generate`. Prints the model card's table and writes it
as CSV. The pieces are shared with benchmarks/accuracy.py.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.profiling.intervals import wilson
from vtc.profiling.provenance import provenance

from .data import split_questions
from .model import CHECKPOINT, load
from .questions import TYPES
from .scoring import is_correct, is_exact

SCORES = {"answer": is_correct, "exact": is_exact}


def prepare(asked: Sequence[Any], processor: Any, size: int = 64) -> list[dict[str, Any]]:
    """Processor outputs in batches."""
    chunks = [asked[i : i + size] for i in range(0, len(asked), size)]
    return [
        dict(processor(images=[q.image for q in c], text=[q.prompt for q in c], return_tensors="pt", padding=True))
        for c in chunks
    ]


def generate(model: Any, processor: Any, batch: dict[str, Any], max_new_tokens: int = 3) -> list[str]:
    """Greedy answers of one prepared batch, without special tokens."""
    import torch

    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def score(texts: Iterable[str], asked: Sequence[Any]) -> dict[str, list[float]]:
    """Per question 1 or 0: is the answer word right, and does the model also stop after it?"""
    texts = list(texts)
    return {
        name: [float(test(text, q.answer)) for text, q in zip(texts, asked, strict=True)]
        for name, test in SCORES.items()
    }


def type_rows(
    scores: dict[str, list[float]], asked: Sequence[Any], types: Sequence[str] = TYPES
) -> list[dict[str, Any]]:
    """One row per question type: count, both scores, 95 % Wilson intervals."""
    rows = []
    for kind in types:
        index = [i for i, q in enumerate(asked) if q.type == kind]
        row: dict[str, Any] = {"type": kind, "questions": len(index)}
        for name, values in scores.items():
            right = sum(values[i] for i in index)
            low, high = wilson(right, len(index))
            row |= {name: right / max(1, len(index)), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows, each column where a row first has it; floats with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def percent(row: dict[str, Any], name: str) -> str:
    """`94.2 (93.1-95.1)`."""
    return f"{100 * row[name]:.1f} ({100 * row[f'{name}_low']:.1f}-{100 * row[f'{name}_high']:.1f})"


def main(
    split: Annotated[str, typer.Option(help="validation, or evaluation once the checkpoint is frozen.")] = "validation",
    number: Annotated[int, typer.Option("--questions")] = 6000,
    checkpoint: Path = CHECKPOINT,
    threads: int = 1,
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Answer questions of a split and print the per-type table."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    model, processor = load(checkpoint)
    asked, began = split_questions(number, split), time.time()
    texts: list[str] = []
    for batch in tqdm(prepare(asked, processor), desc=split):
        texts += generate(model, processor, batch)
    rows = type_rows(score(texts, asked), asked)
    typer.echo("| type | questions | answer word | exact match |\n| --- | --- | --- | --- |")
    for row in rows:
        typer.echo(f"| {row['type']} | {row['questions']} | {percent(row, 'answer')} | {percent(row, 'exact')} |")
    for name in SCORES:
        without = sum(r[name] for r in rows if r["type"] != "rel") / (len(TYPES) - 1)
        typer.echo(f"{name}: mean {sum(r[name] for r in rows) / len(TYPES):.4f}, without rel {without:.4f}")
    typer.echo(f"{time.time() - began:.0f} s")
    if out is not None:
        write_csv([{"model": "tinyvlm", "split": split} | row | provenance() for row in rows], out)


if __name__ == "__main__":
    typer.run(main)
