"""Repeat the papers' headlines: `python benchmarks/reproduce/reproduce.py list | commands | dry-run | run NAME`.

Needs the extra `lmms-eval`; `run` needs a GPU and the hub. `dry-run` starts each recipe's exact command with an empty
cache and no hub: everything up to the first hub access is checked (tasks, base, method, options), and it must stop
there, saying so. Its times are in dry_runs.csv.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from recipes import RECIPES, Recipe

from vtc_lmms_eval import runs

HERE = Path(__file__).parent
STOPPED = "the first thing wanted from the hub, cannot be had"
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def settings_of(recipe: Recipe, device: str = "cuda", processes: int = 1) -> runs.Settings:
    """Shared by its runs: one sample per batch, as the papers."""
    return runs.Settings(recipe.base, recipe.pretrained, device, 1, processes)


def run_of(recipe: Recipe, task: str) -> runs.Run:
    """One run of it."""
    return runs.Run(recipe.name, "", task, recipe.pruning)


def command(recipe: Recipe) -> list[str]:
    """All its tasks in one run of lmms-eval, to be copied to a shell."""
    line = run_of(recipe, ",".join(recipe.tasks)).command(settings_of(recipe), Path("reproduced", recipe.name))
    return ["python", *line[1:]]


def chosen(names: list[str] | None) -> list[Recipe]:
    """Recipes by name, all without names."""
    known = {recipe.name: recipe for recipe in RECIPES}
    if unknown := [name for name in names or [] if name not in known]:
        typer.echo(f"no recipe {', '.join(unknown)}; known: {', '.join(known)}", err=True)
        raise typer.Exit(2)
    return [known[name] for name in names] if names else list(RECIPES)


def markdown() -> str:
    """The table of the README."""
    lines = [
        "| recipe | paper | model | arguments | expected (unpruned) | tolerance | reproduced by us |",
        "| --- " * 7 + "|",
    ]
    for r in RECIPES:
        numbers = [f"{n.task} {n.pruned:g}{'' if n.unpruned is None else f' ({n.unpruned:g})'}" for n in r.numbers]
        numbers += [] if r.retention is None else [f"mean retention {r.retention.percent:g} %"]
        tolerances = {f"{n.tolerance:g}" + (" (mme)" if n.task == "mme" else "") for n in r.numbers}
        tolerances |= set() if r.retention is None else {f"{r.retention.tolerance:g}"}
        arguments = f"`{','.join(r.pruning)}`"
        cells = (
            f"`{r.name}`",
            r.paper,
            f"`{r.pretrained}`",
            arguments,
            ", ".join(numbers),
            ", ".join(sorted(tolerances)),
        )
        lines.append(f"| {' | '.join(cells)} | no: not run, no weights here |")
    return "\n".join(lines) + "\n"


@app.command("list")
def list_() -> None:
    """The recipes, as the table of the README."""
    typer.echo(markdown(), nl=False)


@app.command()
def commands(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """The exact commands."""
    for recipe in chosen(names):
        typer.echo(f"# {recipe.name}: {recipe.paper}" + (f"; {recipe.note}" if recipe.note else ""))
        typer.echo(shlex.join(command(recipe)))


@app.command("dry-run")
def dry_run(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Start each command without a hub; it must stop at the first hub access, and say so."""
    rows, wrong = [], 0
    for recipe in chosen(names):
        run, settings = run_of(recipe, ",".join(recipe.tasks)), settings_of(recipe)
        with tempfile.TemporaryDirectory() as folder:
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": folder}
            began, used = time.perf_counter(), os.times()
            done = subprocess.run(
                run.command(settings, Path(folder)), env=os.environ | offline, capture_output=True, text=True
            )
            seconds, now = time.perf_counter() - began, os.times()
            cpu = sum(getattr(now, n) - getattr(used, n) for n in ("children_user", "children_system"))
        said = next((line for line in done.stderr.splitlines() if line.startswith("vtc: ")), done.stderr[-300:])
        as_meant = done.returncode == 1 and STOPPED in said
        wrong += not as_meant
        rows.append(
            {
                "recipe": recipe.name,
                "seconds": f"{seconds:.1f}",
                "cpu_seconds": f"{cpu:.1f}",
                "status": done.returncode,
                "said": said,
            }
        )
        typer.echo(f"{recipe.name}: {'stopped at the hub' if as_meant else 'WRONG'} after {seconds:.1f} s: {said}")
    if not names:
        with (HERE / "dry_runs.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    raise typer.Exit(bool(wrong))


@app.command()
def run(
    names: list[str],
    out: Path = Path("reproduced"),
    device: str = "cuda",
    processes: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Run recipes, unpruned and pruned, one task at a time; what is there already is not run again."""
    missed = 0
    for recipe in chosen(names):
        settings, scores = settings_of(recipe, device, processes), []
        for label, pruning in (("none", ("method=none",)), (recipe.name, recipe.pruning)):
            found: dict[tuple[str, str], float] = {}
            for task in recipe.tasks:
                outcome = runs.execute(runs.Run(label, "", task, pruning), settings, out)
                if outcome.reason:
                    typer.echo(f"vtc: {recipe.name} {task}: {outcome.reason}", err=True)
                    raise typer.Exit(1)
                found |= outcome.scores
            scores.append(found)
        for line, fits in judged(recipe, *scores):
            missed += not fits
            typer.echo(f"{recipe.name}: {line}: {'reproduced' if fits else 'NOT reproduced'}")
    raise typer.Exit(bool(missed))


def judged(
    recipe: Recipe, whole: dict[tuple[str, str], float], pruned: dict[tuple[str, str], float]
) -> list[tuple[str, bool]]:
    """Each expected number beside the one measured, and whether it is within tolerance."""
    found = []
    for n in recipe.numbers:
        for label, scores, published in (("unpruned", whole, n.unpruned), ("pruned", pruned, n.pruned)):
            value = scores[n.task, n.metric] * n.scale
            if published is not None:
                line = f"{n.task} {n.metric} {label} {value:.2f}, published {published:g} ± {n.tolerance:g}"
                found.append((line, abs(value - published) <= n.tolerance))
    if (r := recipe.retention) is not None:
        value = 100 * sum(pruned[key] / whole[key] for key in r.over) / len(r.over)
        line = f"mean retention {value:.2f} %, published {r.percent:g} ± {r.tolerance:g}"
        found.append((line, abs(value - r.percent) <= r.tolerance))
    return found


if __name__ == "__main__":
    app()
