"""`vtc eval`: lmms-eval for several methods and keeps, with progress, resuming, and one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vtc.commands.shared import A_MODEL, Device, KeepTexts, Threads, clear_errors, listed, parse_keeps, pick_device
from vtc.names import SHIPPED

if TYPE_CHECKING:
    from vtc_lmms_eval.runs import Outcome, Settings

NOT_LOADED = {"tinyvlm-mqt": "lmms-eval's llava_hf knows no model_type 'llava_mqt'"}
"""Shipped models that lmms-eval cannot load, and why."""


def evaluate(
    model: Annotated[str, typer.Argument(help=f"A checkpoint: {A_MODEL}.")] = "tinyvlm",
    base: Annotated[
        str, typer.Option(help="The model id of lmms-eval that loads it: llava_hf, qwen2_5_vl ...")
    ] = "llava_hf",
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="Tasks of lmms-eval, with commas; vtc_scenes needs no download.")
    ] = "vtc_scenes",
    method: Annotated[
        str,
        typer.Option(
            "--method", "--methods", "-m", help="Some of `vtc methods` or files vtc_config.json, with commas."
        ),
    ] = "divprune",
    keep: KeepTexts = "0.25",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="METHOD.NAME=VALUE, as todre.stage2=true; repeatable.")
    ] = None,
    unpruned: Annotated[bool, typer.Option(help="Also run the model as it is, to compare with.")] = True,
    model_arg: Annotated[
        list[str] | None, typer.Option("--model-arg", help="NAME=VALUE for the base, as dtype=float16; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results; what is there already is not run again.")] = Path("vtc-eval"),
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, for a try.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions that vtc_scenes is made of.")] = 600,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch, where the base can.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Data-parallel processes, one GPU each.")] = 1,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Benchmark pruned models with lmms-eval and compare them in one table.

    Exit status 1 when a run failed, with the reason; 2 for bad input, before anything is run.
    """
    with clear_errors():
        from vtc_lmms_eval import runs

        names = [*(["none"] if unpruned else []), *listed(method, "method")]
        if method.strip() == "all":
            raise ValueError("--method all: every run of lmms-eval takes long; name methods, with commas")
        chosen, keeps = listed(tasks, "tasks"), [repr(each) for each in parse_keeps(keep)]
        if model in NOT_LOADED:
            raise ValueError(f"{model} is not evaluated: {NOT_LOADED[model]}. What would work: vtc sweep {model}")
        if model in SHIPPED or "vtc_scenes" in chosen:
            include_path, model = _scenes(include_path, out / f"scenes-{questions}", questions, model)
        settings = runs.Settings(
            base,
            model,
            pick_device(device),
            batch,
            processes,
            limit,
            include_path,
            threads,
            tuple(model_arg or []),
        )
        todo = runs.plan(names, keeps, option or [], chosen)
        runs.check(todo, settings)
    outcomes = _run(todo, settings, out)
    show(Console(), outcomes)
    for o in (failed := [o for o in outcomes if o.reason]):
        run = f"{o.run.label} {o.run.keep} {o.run.task}"
        typer.echo(f"vtc: {run} failed: {o.reason} (log: {o.folder / 'log.txt'})", err=True)
    if failed:
        raise typer.Exit(1)


def _scenes(include: Path | None, folder: Path, questions: int, model: str) -> tuple[Path, str]:
    """The task of the shipped scenes, and a shipped model where that was asked for."""
    from vtc_lmms_eval import scenes

    if include is not None:
        raise ValueError(
            f"--include-path {include} cannot be combined with {scenes.TASK} or a model that comes with vtc: run them "
            "apart"
        )
    if not (folder / "model" / "chat_template.jinja").is_file():
        scenes.write(folder, questions)
    if model not in SHIPPED:
        return folder, model
    written = folder / ("model" if model == "tinyvlm" else model)
    if not (written / "chat_template.jinja").is_file():
        scenes.write_model(written, model)
    return folder, str(written)


def _run(todo: list[Any], settings: Settings, out: Path) -> list[Outcome]:
    from vtc_lmms_eval import runs

    outcomes: list[Outcome] = []
    share_done = TextColumn("{task.percentage:>3.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), share_done, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        whole = bars.add_task("all runs", total=len(todo))
        for run in todo:
            bar = bars.add_task(f"{run.label} {run.keep} {run.task}", total=1.0)
            outcomes.append(runs.execute(run, settings, out, lambda share, bar=bar: bars.update(bar, completed=share)))
            bars.update(bar, completed=1.0)
            bars.advance(whole)
            runs.write_csv(outcomes, out / "summary.csv")  # after every run: an interrupted one leaves what it has
    return outcomes


def show(console: Console, outcomes: list[Outcome]) -> None:
    """One row per method and keep: the first metric of every task, tokens and times."""
    from vtc_lmms_eval import runs, samples

    rows = runs.joined(outcomes)
    shown = runs.headlines(rows)
    whole = next((row for row in rows if row.run.label == "none"), None)
    head = ["method", "keep", *(f"{task}\n{metric}" for task, metric in shown), "retention\nloyalty"]
    table = Table(*head, "visual tokens", "TTFT ms", "decode\ntokens/s", "realised\nfraction")
    for row in rows:
        shares = [] if whole is None else [runs.retention(row, whole, shown), samples.loyalty(row.said, whole.said)]
        n = row.numbers
        table.add_row(
            row.run.label,
            row.run.keep,
            *(f"{row.scores[key]:.4f}" if key in row.scores else "failed" for key in shown),
            "\n".join("-" if share is None else f"{share:.1%}" for share in shares),
            f"{n['visual_tokens_before']:.1f} → {n['visual_tokens_after']:.1f}" if "visual_tokens_before" in n else "",
            *(f"{n[k]:.{d}f}" if k in n else "" for k, d in _COLUMNS),
        )
    console.print(table)
    if any(row.numbers.get("prompts") for row in rows):
        console.print(
            "TTFT: median over generate calls, vision tower included; realised fraction: measured over FLOPs speed-up "
            "of the prefill, median of the first prompts; retention: mean score / unpruned score; loyalty: answers "
            "that are the unpruned model's, word for word.",
            style="dim",
        )


_COLUMNS = (("ttft_ms_median", 1), ("decode_tokens_per_s_and_sequence", 1), ("realised_fraction_median", 2))
