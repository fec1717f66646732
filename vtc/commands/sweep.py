"""`vtc sweep`: methods at several budgets, accuracy and time, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.commands.shared import (
    SHIPPED,
    Device,
    Positions,
    Threads,
    clear_errors,
    listed,
    numbers,
    parse_keep,
    pick_device,
)

if TYPE_CHECKING:
    from vtc.profiling.sweep import Exam

ModelName = Annotated[
    str | None,
    typer.Argument(help="tinyvlm, tinyvlm-next, or a checkpoint that can do the task; default: the task's own model."),
]
TaskName = Annotated[
    str | None, typer.Option(help="Where the questions are from; default: the model's own, or tinyvlm.")
]


def sweep(
    model: ModelName = None,
    task: TaskName = None,
    methods: Annotated[
        str, typer.Option("--methods", "--method", "-m", help="Some of `vtc methods`, with commas.")
    ] = "divprune,todre",
    keep: Annotated[str, typer.Option("--keep", "-k", help="Several of 0.25 or 64, with commas.")] = "0.5,0.25,0.1",
    batch: Annotated[str, typer.Option(help="Batch sizes that are timed, with commas.")] = "8",
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also random, grid, downsample and pool, where they fit.")
    ] = True,
    questions: Annotated[int, typer.Option("--questions", "-n", min=1, help="How many questions are asked.")] = 600,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    positions: Positions = "original",
    device: Device = "auto",
    threads: Threads = 1,
    out: Annotated[Path, typer.Option(help="Folder for sweep.csv, which is gone on with, and sweep.html.")] = Path(
        "vtc-sweep"
    ),
) -> None:
    """Measure methods at several budgets beside the baselines that they have to beat, and write one page about it."""
    from rich.console import Console

    console = Console(stderr=True)

    def tell(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    with clear_errors():
        from tqdm import tqdm

        from vtc.profiling import sweep as work
        from vtc.profiling.page import write_report

        keeps, batches = [parse_keep(each) for each in listed(keep, "keep")], numbers(batch, "batch")
        exam, name = make_exam(model, task, questions, pick_device(device), threads)
        wanted = work.fitting_baselines(exam) if baselines else []
        cells = work.plan(exam, [*wanted, *listed(methods, "methods")], keeps, positions)
        with tqdm(total=len(cells), desc="cells") as bar:
            rows = work.sweep(
                exam,
                cells,
                batches,
                out / "sweep.csv",
                name=name,
                repeats=repeats,
                tell=tell,
                tick=lambda cell: bar.update(),
            )
        page = out / "sweep.html"
        write_report(rows, page)
        Console().print(f"{len(rows)} rows: {out / 'sweep.csv'}\nreport:  {page}", markup=False, highlight=False)
    if wrong := [row for row in rows if row["correct"] != "True"]:
        for row in wrong:
            typer.echo(f"vtc: {row['method']} keep={row['keep']} batch={row['batch']}: {row['faults']}", err=True)
        raise typer.Exit(1)


def make_exam(model: str | None, task: str | None, questions: int, device: str, threads: int) -> tuple[Exam, str]:
    """The model with the questions it is asked, and its name."""
    import torch
    from transformers.utils import logging

    from vtc.checkpoint import Checkpoint
    from vtc.profiling.sweep import Exam
    from vtc.profiling.tasks import get_task, load

    chosen = get_task(task or (model if model in SHIPPED else "tinyvlm"))
    name = model or chosen.model
    if name is None:
        raise ValueError(f"task {chosen.name!r} has no model of its own; name a checkpoint")
    if model is not None and model not in SHIPPED and task is None:
        raise ValueError(f"--task is needed: which questions can {model!r} answer?")
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if name in SHIPPED:
        vlm, processor = load(name, SHIPPED[name])
        vlm = vlm.to(device).eval()
    else:
        checkpoint = Checkpoint.load(name, device)
        vlm, processor = checkpoint.model, checkpoint.processor
    asked = chosen.questions(questions)
    exam = Exam(vlm, processor, chosen, asked)
    if not exam.counted:
        raise ValueError(f"--questions {questions}: none of them counts towards the accuracy of {chosen.name!r}")
    return exam, name
