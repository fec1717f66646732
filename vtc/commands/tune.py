"""`vtc tune`: the smallest budget that a task allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.commands.shared import (
    Calibration,
    Device,
    MethodName,
    Options,
    Positions,
    Threads,
    build_config,
    clear_errors,
    pick_device,
)
from vtc.commands.sweep import IncludePath, ModelName, TaskName, make_exam
from vtc.values import shown

if TYPE_CHECKING:
    from vtc.config import CompressionConfig
    from vtc.profiling.exam import Exam


def tune(
    model: ModelName = None,
    method: MethodName = "divprune",
    max_drop: Annotated[
        str, typer.Option("--max-drop", help="Accuracy that may be lost: 1% or 0.01 is one point.")
    ] = "1%",
    task: TaskName = None,
    include_path: IncludePath = None,
    option: Options = None,
    positions: Positions = None,
    calibration: Calibration = None,
    questions: Annotated[int, typer.Option("--questions", "-n", min=1, help="How many questions are asked.")] = 1200,
    device: Device = "auto",
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="Folder that vtc_config.json is written into.")] = Path("."),
) -> None:
    """Find the smallest keep whose loss of accuracy stays within a bound, and write vtc_config.json.

    A keep is good when the upper end of the 95 % interval of its loss is within the bound; the exit code is 1 when the
    sample is too small to find one.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    with clear_errors():
        from tqdm import tqdm

        from vtc.profiling.tune import tune as search

        bound = parse_drop(max_drop)
        config = build_config(method, "0.5", option, positions, calibration)
        exam, name = make_exam(model, task, include_path, questions, pick_device(device), threads)
        from vtc.patching import patch

        patch(exam.model, config).unpatch()  # refused before the questions are asked
        with tqdm(desc="questions", unit="") as bar:
            found = search(exam, config, bound, tick=bar.update)
        table = Table("keep", "tokens", "accuracy", "loss, points", "95 % interval", f"at most {bound:.2%}?")
        for trial in sorted(found.trials, key=lambda trial: trial.keep):
            interval = f"{100 * trial.low:+.2f} to {100 * trial.high:+.2f}"
            numbers = f"{trial.keep:g}", f"{trial.tokens:.1f}", f"{trial.accuracy:.1%}", f"{100 * trial.loss:.2f}"
            table.add_row(*numbers, interval, trial.verdict)
        console.print(table)
        console.print(
            f"{name}, {method}: unpruned {found.accuracy:.1%} on {found.questions} questions. Loss on the same "
            "questions; tokens averaged over layers.",
            highlight=False,
        )
        if (sentence := budget_beside(exam, config)) is not None:
            console.print(sentence, markup=False, highlight=False)
        if found.unsure:
            shown = ", ".join(f"{keep:g}" for keep in found.unsure)
            console.print(f"keep {shown}: {found.questions} questions are too few to tell", highlight=False)
        if found.config is not None:
            path = found.config.save_pretrained(out)
            console.print(f"keep {found.config.options['keep']:g} written to {path}", highlight=False, soft_wrap=True)
    if found.config is None:
        typer.echo(f"vtc: no keep below 1 is surely within a loss of {max_drop}; nothing was written", err=True)
        raise typer.Exit(1)


def budget_beside(exam: Exam, config: CompressionConfig) -> str | None:
    """How a processor's own budget compares with the method at half the tokens, by arithmetic on the first question's
    picture; ``None`` where it has none, or where what it makes of a picture is not known ahead.
    """
    from vtc.profiling.estimate import estimate
    from vtc.profiling.verdict import budget_first

    settings = exam.processor.image_processor.to_dict()
    device = "cpu" if exam.model.device.type == "cpu" else "h200"
    try:
        found = estimate(exam.model, exam.asked[0].image.size, method=config, device=device, settings=settings)
    except ValueError:
        return None
    return budget_first(found) if found.halves else None


def parse_drop(text: str) -> float:
    """``"1%"`` and ``"0.01"`` as 0.01.

    Raises:
        ValueError: anything else, a bare ``1`` among it.
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0.0 < value < 1.0:
        raise ValueError(f"--max-drop {shown(text)} is not a loss between 0 and 100 %; write 1% or 0.01")
    return value
