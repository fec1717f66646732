"""Measure the checkpoint as a user runs it: `python -m vtc_tinyvlm_next.evaluate`.

Plain `from_pretrained`, processor, left-padded batches, greedy `generate`. Prints the model card's table and writes it
as CSV. With `--thumbnail-only` the questions see nothing of the image but the thumbnail's 144 tokens: the crops' tokens
and newlines are removed by hand, what stays keeps its positions.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.profiling.provenance import provenance
from vtc_tinyvlm.building import IMAGE
from vtc_tinyvlm.evaluate import SCORES, generate, percent, prepare, score, type_rows, write_csv
from vtc_tinyvlm.questions import TYPES

from .data import split_questions
from .model import CHECKPOINT, IMAGE_TOKENS, load


def generate_from_thumbnail(model: Any, processor: Any, batch: dict[str, Any]) -> list[str]:
    """Greedy answers of one prepared batch from the thumbnail alone: one forward pass per generated token."""
    import torch

    ids, given = batch["input_ids"], batch["attention_mask"]
    position = (given.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)
        features = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True).pooler_output
        embedded[ids == IMAGE] = torch.cat(list(features))
        # A mask rather than a shorter sequence: thumbnail tokens never see crop tokens, which come later.
        seen = given.clone()
        for row in range(len(ids)):
            seen[row, (ids[row] == IMAGE).nonzero()[IMAGE_TOKENS:, 0]] = 0
        words = []
        for _ in range(2):
            logits = model(inputs_embeds=embedded, attention_mask=seen, position_ids=position).logits[:, -1]
            words.append(logits.argmax(-1))
            embedded = torch.cat([embedded, model.get_input_embeddings()(words[-1])[:, None]], 1)
            seen = torch.cat([seen, seen.new_ones(len(ids), 1)], 1)
            position = torch.cat([position, position[:, -1:] + 1], 1)
    return processor.batch_decode(torch.stack(words, 1), skip_special_tokens=True)


def main(
    split: Annotated[str, typer.Option(help="validation, or evaluation once the checkpoint is frozen.")] = "validation",
    number: Annotated[int, typer.Option("--questions")] = 3000,
    checkpoint: Path = CHECKPOINT,
    thumbnail_only: bool = False,
    batch_size: int = 16,
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
    for start in tqdm(range(0, len(asked), batch_size), desc=split):
        (batch,) = prepare(asked[start : start + batch_size], processor, batch_size)
        texts += (generate_from_thumbnail if thumbnail_only else generate)(model, processor, batch)
    rows = type_rows(score(texts, asked), asked)
    typer.echo("| type | questions | answer word | exact match |\n| --- | --- | --- | --- |")
    for row in rows:
        typer.echo(f"| {row['type']} | {row['questions']} | {percent(row, 'answer')} | {percent(row, 'exact')} |")
    for name in SCORES:
        without = sum(r[name] for r in rows if r["type"] != "count") / (len(TYPES) - 1)
        typer.echo(f"{name}: mean {sum(r[name] for r in rows) / len(TYPES):.4f}, without count {without:.4f}")
    typer.echo(f"{time.time() - began:.0f} s")
    if out is not None:
        seen = "thumbnail" if thumbnail_only else "all"
        write_csv([{"model": "tinyvlm-next", "image": seen, "split": split} | r | provenance() for r in rows], out)


if __name__ == "__main__":
    typer.run(main)
