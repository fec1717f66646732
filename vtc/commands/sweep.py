"""`vtc sweep`: methods at several budgets, accuracy and time, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.commands.shared import (
    A_MODEL,
    Calibration,
    Device,
    KeepTexts,
    MethodNames,
    Positions,
    Threads,
    clear_errors,
    numbers,
    numbers_table,
    parse_keeps,
    parse_methods,
    pick_device,
)
from vtc.values import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from vtc.profiling.exam import Exam
    from vtc.profiling.tasks import Task

ModelName = Annotated[
    str | None,
    typer.Argument(help=f"A checkpoint that can do the task: {A_MODEL}; default: the task's own model."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="tinyvlm, tinyvlm-next, photovlm, or a task of lmms-eval by its name there; default: the model's own."
    ),
]
IncludePath = Annotated[Path | None, typer.Option(help="A folder with lmms-eval tasks of your own.")]


def sweep(
    model: ModelName = None,
    task: TaskName = None,
    include_path: IncludePath = None,
    method: MethodNames = "divprune,todre",
    keep: KeepTexts = "0.5,0.25,0.1",
    batch: Annotated[str, typer.Option(help="Batch sizes that are timed, with commas.")] = "8",
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also random, grid, downsample and pool, where they fit.")
    ] = True,
    questions: Annotated[int, typer.Option("--questions", "-n", min=1, help="How many questions are asked.")] = 600,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    positions: Positions = None,
    calibration: Calibration = None,
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

        keeps, batches = parse_keeps(keep), numbers(batch, "batch")
        exam, name = make_exam(model, task, include_path, questions, pick_device(device), threads)
        wanted = work.fitting_baselines(exam) if baselines else []
        methods = parse_methods(method, lambda name: work.plan(exam, [name], keeps, positions, calibration), tell)
        cells = work.plan(exam, [*wanted, *methods], keeps, positions, calibration)
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
        Console().print(table_of(rows))
        page = out / "sweep.html"
        write_report(rows, page)
        Console().print(f"{len(rows)} rows: {out / 'sweep.csv'}\nreport:  {page}", markup=False, highlight=False)
    if wrong := [row for row in rows if row["correct"] != "True"]:
        for row in wrong:
            typer.echo(f"vtc: {row['method']} keep={row['keep']} batch={row['batch']}: {row['faults']}", err=True)
        raise typer.Exit(1)


def table_of(rows: Sequence[Mapping[str, str]]) -> Table:
    """One line for each method and keep, with a speed-up for each batch size."""
    from vtc.profiling.sweep import UNPRUNED

    batches = sorted({int(row["batch"]) for row in rows})
    table = numbers_table(
        None,
        *("", "tokens", "accuracy", "loss, points (95 %)", "loyalty", "hard"),
        *(f"speed-up\nbatch {batch}" for batch in batches),
    )
    cells: dict[tuple[str, ...], dict[int, Mapping[str, str]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in ("method", "keep", "options")), {})[int(row["batch"])] = row
    for (method, keep, _), by_batch in cells.items():
        row = next(iter(by_batch.values()))
        whole = method == UNPRUNED
        loss = [f"{100 * float(row[name]):.2f}" for name in ("loss", "loss_low", "loss_high") if row[name]]
        times = (by_batch.get(batch, {}).get("speedup") for batch in batches)
        table.add_row(
            "unpruned" if whole else f"{method} {keep}",
            f"{float(row['kept_tokens']):.0f}",
            f"{100 * float(row['accuracy']):.1f} %",
            f"{loss[0]} [dim]({loss[1]} to {loss[2]})[/]" if len(loss) == 3 and not whole else "",
            *(f"{100 * float(row[name]):.0f} %" if row[name] and not whole else "" for name in ("loyalty", "hard")),
            *(f"{float(each):.2f}x" if each else "" for each in times),
        )
    return table


def find_task(name: str, include: Path | None) -> Task:
    """One of vtc's own tasks, or else of lmms-eval's.

    Raises:
        ValueError: there is none of that name, or it has no accuracy.
    """
    from vtc.profiling.tasks import get_task, list_tasks

    if name not in (shipped := list_tasks()):
        from vtc_lmms_eval.tasks import find

        return find(name, include, also=shipped)
    if include is not None:
        raise ValueError(f"--include-path {include} is for tasks of lmms-eval, and {shown(name)} is vtc's own")
    return get_task(name)


def make_exam(
    model: str | None, task: str | None, include: Path | None, questions: int, device: str, threads: int
) -> tuple[Exam, str]:
    """The model with the questions it is asked, and its name."""
    import torch
    from transformers.utils import logging

    from vtc.checkpoint import Checkpoint
    from vtc.names import SHIPPED, load
    from vtc.profiling.exam import Exam

    if model is not None and model not in SHIPPED and task is None:
        raise ValueError(f"--task is needed: which questions can {shown(model)} answer?")
    chosen = find_task(task or (SHIPPED[model].task if model in SHIPPED else "tinyvlm"), include)
    name = model or chosen.model
    if name is None:
        raise ValueError(f"task {chosen.name!r} has no model of its own; name a checkpoint")
    asked = chosen.questions(questions)  # before the weights: what cannot be asked is refused without them
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if name in SHIPPED:
        vlm, processor = load(name)
        vlm = vlm.to(device).eval()
    else:
        checkpoint = Checkpoint.load(name, device)
        vlm, processor = checkpoint.model, checkpoint.processor
        processor.tokenizer.padding_side = "left"  # or a batch would go on after its padding
    if chosen.wording is not None:
        asked = chosen.wording(asked, processor)
    exam = Exam(vlm, processor, chosen, asked)
    if not exam.counted:
        raise ValueError(f"--questions {questions}: none of them counts towards the accuracy of {chosen.name!r}")
    return exam, name
