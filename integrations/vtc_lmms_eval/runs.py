"""Running lmms-eval for several methods, keeps and tasks, and reading what came out: the work behind `vtc eval`.

One run of lmms-eval per method, keep and task, each in a process and a folder of its own. A folder is named after all
that its run depends on, so that starting again does only what is missing, and other settings never meet old results.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtc.children import Relay
from vtc.files import replacing, write_text
from vtc.values import shown
from vtc_lmms_eval import MODEL_ID, samples
from vtc_lmms_eval.arguments import UNPRUNED, Asked, split

PREFIX = "avg_vtc_"
"""What our numbers begin with in the `throughput` of lmms-eval's result file."""
_PERCENT = re.compile(rb"Model Responding:\s+(\d+)%")


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Attributes:
        base: a model id of lmms-eval.
        pretrained: the checkpoint.
        device: as lmms-eval's ``--device``.
        batch: samples per batch, where the base can do more than one.
        processes: data-parallel processes, started with torchrun.
        limit: questions per task; ``None``: all.
        include: a folder with further tasks.
        threads: CPU threads of torch in each process; 0 leaves them alone.
        arguments: further ``name=value`` arguments of the base.
    """

    base: str
    pretrained: str
    device: str = "cuda"
    batch: int = 1
    processes: int = 1
    limit: int | None = None
    include: Path | None = None
    threads: int = 0
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run: a task, and how to prune, as ``name=value`` arguments of the model id ``vtc``."""

    label: str
    keep: str
    task: str
    pruning: tuple[str, ...]

    def model_args(self, settings: Settings) -> str:
        """For ``--model_args``."""
        own = (f"base={settings.base}", f"pretrained={settings.pretrained}", *self.pruning)
        return ",".join((*own, *settings.arguments))

    def asked(self, settings: Settings) -> Asked:
        """The same, parsed; raises what :func:`vtc_lmms_eval.arguments.split` raises."""
        from lmms_eval.utils import simple_parse_args_string

        return split(simple_parse_args_string(self.model_args(settings)))

    def command(self, settings: Settings, folder: Path) -> list[str]:
        """What runs."""
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(settings.processes)]
        command = [sys.executable, *(several if settings.processes > 1 else []), "-m", "lmms_eval", "eval"]
        command += ["--model", MODEL_ID, "--model_args", self.model_args(settings), "--tasks", self.task]
        command += ["--device", settings.device, "--batch_size", str(settings.batch)]
        command += ["--log_samples", "--output_path", str(folder)]
        command += [] if settings.limit is None else ["--limit", str(settings.limit)]
        return command + ([] if settings.include is None else ["--include_path", str(settings.include)])

    def folder(self, settings: Settings, out: Path) -> Path:
        """Where it leaves its results: a name for every combination of settings and versions."""
        versions = [importlib.metadata.version(name) for name in ("visual-token-compression", "lmms-eval")]
        said: list[Any] = [self.command(settings, Path())[1:], versions]
        said += [Path(text.partition("=")[2]).read_text() for text in self.pruning if text.startswith("vtc_config=")]
        digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=4).hexdigest()
        return out / re.sub(r"[^\w.+-]", "_", f"{self.label}-{self.keep}-{self.task}-{digest}")


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        run: which.
        reason: why it failed; empty if it did not.
        scores: (task, metric) → value.
        numbers: tokens and times, as :meth:`vtc_lmms_eval.meter.Meter.summary` names them, without ``vtc_``.
        said: what was answered, for :func:`vtc_lmms_eval.samples.loyalty`.
        seconds: of the process; 0 when its results were there already.
        folder: where log and results are.
    """

    run: Run
    reason: str = ""
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    said: samples.Said = field(default_factory=dict)
    seconds: float = 0.0
    folder: Path = Path()


def plan(methods: Sequence[str], keeps: Sequence[str], options: Sequence[str], tasks: Sequence[str]) -> list[Run]:
    """All runs. A method is a name, which meets every keep, or a config file, which has its own.

    Raises:
        ValueError: nothing to run, or an option without a method of that name.
    """
    found: list[Run] = []
    if not methods or not tasks:
        raise ValueError("nothing to run: at least one method and one task are needed")
    for method in methods:
        if method.endswith(".json") or Path(method).is_dir():
            entries = [(Path(method).stem, "config", (f"vtc_config={method}",))]
        elif method == UNPRUNED:
            entries = [(UNPRUNED, "1.0", (f"method={UNPRUNED}",))]
        else:
            own = tuple(f"method.{o.split('.', 1)[1]}" for o in options if o.split(".", 1)[0] == method)
            entries = [(method, keep, (f"method={method}", f"keep={keep}", *own)) for keep in keeps]
        found += [Run(label, keep, task, pruning) for label, keep, pruning in entries for task in tasks]
    for option in options:
        if option.split(".", 1)[0] not in methods or "=" not in option or "." not in option.split("=", 1)[0]:
            raise ValueError(
                f"--option {shown(option)} is not METHOD.NAME=VALUE with METHOD one of {', '.join(methods)}"
            )
    return list(dict.fromkeys(found))


def check(runs: Iterable[Run], settings: Settings) -> None:
    """Refuse bad input before anything is run.

    Raises:
        ValueError: see :mod:`vtc_lmms_eval.bases` and :mod:`vtc_lmms_eval.arguments`.
        OSError: the checkpoint's config cannot be had.
    """
    from vtc_lmms_eval import bases

    bases.check_version()
    cls = None
    for pruning in dict.fromkeys(run.pruning for run in runs):
        asked = Run("", "", "", pruning).asked(settings)
        cls = cls or bases.find(asked.base, simple=False)
        bases.check_batch(cls, asked.base, settings.batch)
        bases.check_family(cls, asked.rest, asked.config)


def execute(run: Run, settings: Settings, out: Path, progress: Callable[[float], None] = lambda share: None) -> Outcome:
    """Run it, unless its results are there; never raises for what the run itself does.

    Args:
        run: which.
        settings: shared by all.
        out: parent of its folder.
        progress: called with the share of requests answered.

    Raises:
        SystemExit: this process was told to end; the run has ended before.
    """
    folder = run.folder(settings, out)
    outcome = read(run, folder)
    if not outcome.reason:
        return outcome
    folder.mkdir(parents=True, exist_ok=True)
    command = run.command(settings, folder)
    write_text(folder / "command.json", json.dumps(command, indent=1) + "\n")
    began = time.perf_counter()
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {})}
    status = _follow(command, environment, folder / "log.txt", progress)
    seconds = time.perf_counter() - began
    if status:
        return Outcome(run, _reason(folder / "log.txt", status), seconds=seconds, folder=folder)
    return dataclasses.replace(read(run, folder), seconds=seconds)


def _follow(command: list[str], environment: dict[str, str], log: Path, progress: Callable[[float], None]) -> int:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with log.open("wb") as file, Relay() as relay, relay.start(command, env=environment, **pipes) as child:
        assert child.stdout is not None
        for chunk in iter(lambda: child.stdout.read1(1 << 16), b""):  # type: ignore[union-attr]
            file.write(chunk)
            file.flush()
            if percents := _PERCENT.findall(chunk):
                progress(int(percents[-1]) / 100)
    if relay.heard:  # the other runs do not begin
        raise SystemExit(128 + relay.heard)
    return child.returncode


def _reason(log: Path, status: int) -> str:
    """The line with which our model ended the process, else the last error, else the last thing that was said.

    torchrun puts the rank before what a process says, and its own report, between rules, behind it.
    """
    text = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
    lines = [re.sub(r"^\[(?:rank)?\d+\]:", "", line).strip() for line in text]
    ours = [line for line in lines if line.startswith("vtc: ")]
    if ours:
        return ours[-1].removeprefix("vtc: ")
    said = [line for line in lines if line.strip("=-")]
    errors = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line) and "ChildFailedError" not in line]
    return f"exit status {status}: {(errors or said or ['nothing was said'])[-1]}"


def read(run: Run, folder: Path) -> Outcome:
    """The results of a finished run, or why there are none."""
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        return Outcome(run, f"lmms-eval left no result file in {folder}", folder=folder)
    try:
        written = json.loads(files[-1].read_text(encoding="utf-8"))
        scores = {
            (task, name.split(",")[0]): float(value)
            for task, values in written["results"].items()
            for name, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in name and not name.startswith("paired")
        }
        numbers = {
            name.removeprefix(PREFIX): float(value)
            for name, value in written.get("throughput", {}).items()
            if name.startswith(PREFIX)
        }
        said = samples.read(files[-1])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return Outcome(run, f"{files[-1]} cannot be read: {type(error).__name__}: {error}", folder=folder)
    if not numbers.get("prompts"):
        reason = f"the pruner never fired: {files[-1]} has none of its numbers"
    elif not scores or not all(map(math.isfinite, scores.values())):
        reason = f"{files[-1]} has no score for {run.task}"
    else:
        reason = ""
    return Outcome(run, reason, scores, numbers, said, folder=folder)


def write_csv(outcomes: Iterable[Outcome], path: Path) -> None:
    """One row per run and score, and one for each failed run; loyalty only where the unpruned model was run too."""
    outcomes = list(outcomes)
    numbers = list(dict.fromkeys(name for o in outcomes for name in o.numbers))
    whole = {o.run.task: o.said for o in outcomes if o.run.label == UNPRUNED}
    with replacing(path) as written, written.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["method", "keep", "task", "metric", "value", "loyalty", *numbers, "failed"])
        for o in outcomes:
            loyal = samples.loyalty(o.said, whole.get(o.run.task, {}))
            for (task, metric), value in (o.scores or {(o.run.task, ""): math.nan}).items():
                cells = ["" if loyal is None else loyal, *(o.numbers.get(name, "") for name in numbers)]
                table.writerow([o.run.label, o.run.keep, task, metric, value, *cells, o.reason])


def headlines(outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    """The first metric of every task."""
    first: dict[str, tuple[str, str]] = {}
    for o in outcomes:
        for task, metric in o.scores:
            first.setdefault(task, (task, metric))
    return list(first.values())


def retention(outcome: Outcome, whole: Outcome, shown: Sequence[tuple[str, str]]) -> float | None:
    """The mean over the shown metrics of score / unpruned score; ``None`` where the latter is missing or 0."""
    shares = [outcome.scores[k] / whole.scores[k] for k in shown if k in outcome.scores and whole.scores.get(k)]
    return sum(shares) / len(shares) if shares else None


def joined(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One outcome per method and keep: the scores of all its tasks, numbers averaged over them by prompts."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.run.label, o.run.keep), []).append(o)
    return [_join(group) for group in groups.values()]


def _join(group: list[Outcome]) -> Outcome:
    good = [o for o in group if not o.reason]
    numbers: dict[str, float] = {}
    for name in dict.fromkeys(name for o in good for name in o.numbers):
        having = [o for o in good if name in o.numbers]
        weight = sum(o.numbers["prompts"] for o in having)
        numbers[name] = sum(o.numbers[name] * o.numbers["prompts"] for o in having) / weight
    numbers["prompts"] = sum(o.numbers["prompts"] for o in good)
    scores = {key: value for o in good for key, value in o.scores.items()}
    said = {key: text for o in good for key, text in o.said.items()}
    reason = "; ".join(dict.fromkeys(o.reason for o in group if o.reason))
    return Outcome(group[0].run, reason, scores, numbers, said, sum(o.seconds for o in group), group[0].folder)
