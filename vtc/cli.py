"""The `vtc` command: `demo` and `run` are here, the others in vtc/commands/.

Bad input ends as one line on stderr and exit code 2; `vtc --traceback ...` shows where it came from.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

try:
    import rich  # noqa: F401
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"vtc: the command line needs {missing.name}: pip install 'visual-token-compression[cli]'")

from vtc.commands.convert import convert
from vtc.commands.doctor import doctor
from vtc.commands.estimate import estimate
from vtc.commands.eval import evaluate
from vtc.commands.listing import methods, models
from vtc.commands.profile import profile
from vtc.commands.serve import PASS_ON, serve
from vtc.commands.shared import (
    A_MODEL,
    TRACEBACK,
    Calibration,
    Device,
    KeepText,
    MethodName,
    Options,
    Positions,
    When,
    build_config,
    clear_errors,
    parse_keep,
    pick_device,
)
from vtc.commands.show import show
from vtc.commands.sweep import sweep
from vtc.commands.tune import tune
from vtc.files import replacing

__all__ = ["app", "main", "parse_keep"]

app = typer.Typer(
    help="Prune the visual tokens of Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vtc {version('visual-token-compression')}")
        raise typer.Exit


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    TRACEBACK.set(traceback)


app.add_typer(convert, name="convert")
app.command()(doctor)
app.command()(estimate)
app.command("eval")(evaluate)
app.command()(methods)
app.command()(models)
app.command()(profile)
app.command(context_settings=PASS_ON)(serve)
app.command()(show)
app.command()(sweep)
app.command()(tune)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="vtc")


# ------------------------------------------------------------------------------------------------------------ commands


@app.command()
def run(
    model: Annotated[str, typer.Argument(help=f"A checkpoint: {A_MODEL}.")],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    method: MethodName = "divprune",
    keep: KeepText = "0.25",
    option: Options = None,
    positions: Positions = None,
    calibration: Calibration = None,
    when: When = "always",
    overlay: Annotated[Path | None, typer.Option(help="Write the image with the kept tokens drawn on it.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Print the unpruned model's answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The answer is cut there.")] = 64,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, float16.")] = "auto",
) -> None:
    """Ask any checkpoint one question about one image, pruned."""
    with clear_errors():
        config = build_config(method, keep, option, positions, calibration, when)
        from vtc.checkpoint import Checkpoint
        from vtc.viz.pixels import open_image

        picture = open_image(image)
        checkpoint = Checkpoint.load(model, device=pick_device(device), dtype=dtype)
        if compare:
            whole = checkpoint.ask(picture, question, max_new_tokens=max_new_tokens)
            typer.echo(f"unpruned: {whole.text}")
        answer = checkpoint.ask(picture, question, config, max_new_tokens=max_new_tokens)
        typer.echo(f"{method}: {answer.text}" if compare else answer.text)
        share = answer.kept / max(1, answer.total)
        typer.echo(f"[{answer.kept} of {answer.total} visual tokens kept, {share:.1%}]", err=True)
        if answer.verdict:
            typer.echo(f"[{answer.verdict}]", err=True)
        if overlay is not None:
            with replacing(overlay) as written:
                answer.draw(picture).save(written)
            typer.echo(f"[kept tokens drawn on {overlay}]", err=True)


@app.command()
def demo(
    method: MethodName = "divprune",
    keep: KeepText = "0.25",
    option: Options = None,
    positions: Positions = None,
    calibration: Calibration = None,
    questions: Annotated[int, typer.Option("--questions", "-n", help="How many questions to ask.")] = 300,
    batch: Annotated[int, typer.Option(help="Questions per batch.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed pairs of prefills.")] = 7,
    out: Annotated[Path, typer.Option(help="Where to draw the kept tokens of the first question.")] = Path(
        "vtc-demo.png"
    ),
    device: Device = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; with a model this small more of them mostly wait for each other.")
    ] = 1,
) -> None:
    """Compare the small model shipped with vtc, unpruned and pruned: accuracy, prefill time, tokens, cache."""
    console = Console()
    with clear_errors():
        import torch
        from transformers.utils import logging

        from vtc.demo import run_demo
        from vtc.demo_report import print_report

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        report = run_demo(
            build_config(method, keep, option, positions, calibration),
            questions=questions,
            batch=batch,
            repeats=repeats,
            overlay=out,
            device=pick_device(device),
            progress=lambda message: console.print(f"[dim]{message} ...[/]"),
        )
        print_report(console, report)
