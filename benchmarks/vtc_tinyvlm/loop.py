"""The training loop of all models: two phases, resumable, seeded, one progress bar, a learning curve.

*vision* (or what else a trainer calls its first) trains a part alone, *joint* the rest or everything, with a
warmup-stable-decay schedule: the rate stays constant until ``joint_steps`` is reached (or a file named ``decay``
appears in the state directory) and then falls in ``decay_steps``. A signal that ends the process saves the state first.
"""

from __future__ import annotations

import csv
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

COLUMNS = ("phase", "step", "images", "cpu_minutes", "wall_minutes", "lr")
"""What every row of a learning curve begins with."""


class Trainer(ABC):
    """Model, heads, optimizers and the counters a resumed run needs.

    Args:
        model: what is trained.
        heads: modules of the auxiliary losses.
        optimizers: with the base learning rate of each.
        first: what the first phase is called.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: nn.Module,
        optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
        first: str = "vision",
    ) -> None:
        self.model, self.heads, self.first = model, heads, first
        self.optimizers = [optimizer for optimizer, _ in optimizers]
        self.base_lr = [lr for _, lr in optimizers]
        self.progress: dict[str, Any] = {"phase": first, "step": 0, "images": 0, "cpu": 0.0, "wall": 0.0}
        self.progress["decay"] = None

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch in the present phase, and what to show of it."""

    def step(self, batch: Any) -> dict[str, float]:
        """One optimizer step; returns losses and training accuracies. What has no gradient stays as it is."""
        loss, report = self.loss(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        everything = [*self.model.parameters(), *self.heads.parameters()]
        torch.nn.utils.clip_grad_norm_([p for p in everything if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return report | {"loss": loss.item()}

    def set_rate(self, scale: float) -> None:
        """Set every learning rate to its base times ``scale``."""
        for optimizer, base in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": self.progress,
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = state["progress"]
        torch.set_rng_state(state["random"])


@dataclass(frozen=True)
class Schedule:
    """How long, with how much, and at which rate.

    Attributes:
        vision_steps: of the first phase.
        joint_steps: of the second at a constant rate, before it decays.
        decay_steps: of the decay.
        vision_batch: pictures of a step.
        joint_batch: the same in the second phase.
        lr: base learning rate, for the curve.
        rate: of (phase, step, vision_steps, decay) a multiple of the learning rates; ``decay`` is (its first step, its
            steps), or ``None`` before it begins.
        evaluate_every: minutes.
    """

    vision_steps: int
    joint_steps: int
    decay_steps: int
    vision_batch: int
    joint_batch: int
    lr: float
    rate: Callable[[str, int, int, tuple[int, int] | None], float]
    evaluate_every: float

    def end(self, progress: dict[str, Any]) -> int:
        """The step at which the present phase ends."""
        if progress["phase"] != "joint":
            return self.vision_steps
        return sum(progress["decay"]) if progress["decay"] else self.joint_steps + self.decay_steps


def train(
    trainer: Trainer,
    schedule: Schedule,
    state: Path,
    *,
    resume: bool,
    make_batch: Callable[[int, int, str], Any],
    evaluate: Callable[[str], dict[str, Any]],
    save: Callable[[nn.Module, Path], None],
    shown: Sequence[str],
    columns: Sequence[str],
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train, and leave a checkpoint in STATE/checkpoint.

    Args:
        trainer: at its beginning.
        schedule: of the training.
        state: directory of the resumable state, the curve and the checkpoint; made if missing.
        resume: go on from the state found there.
        make_batch: of (first image, images, phase) a batch.
        evaluate: of a phase what the curve has of it.
        save: writes the model's checkpoint into a folder.
        shown: running means of the step's report that the curve has too.
        columns: of the curve, behind :data:`COLUMNS`.
        before_step: called with the step.

    Raises:
        SystemExit: a signal came; the state is saved.
    """
    state.mkdir(parents=True, exist_ok=True)
    saved = state / "state.pt"
    if resume and saved.exists():
        trainer.restore(torch.load(saved, weights_only=True))
    progress = trainer.progress
    wall, cpu, base_wall, base_cpu = time.time(), time.process_time(), progress["wall"], progress["cpu"]
    bar, last_evaluation, scale = None, time.time(), 0.0
    mean: dict[str, float] = {}

    def save_state() -> None:
        progress["wall"] = base_wall + (time.time() - wall) / 60
        progress["cpu"] = base_cpu + (time.process_time() - cpu) / 60
        torch.save(trainer.state(), saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)

    def checkpoint() -> None:
        save_state()
        if progress["phase"] != trainer.first:
            save(trainer.model, state / "checkpoint")
        row = {"phase": progress["phase"], "step": progress["step"], "images": progress["images"]}
        row |= {"cpu_minutes": progress["cpu"], "wall_minutes": progress["wall"], "lr": scale * schedule.lr}
        row |= {name: mean[name] for name in shown if name in mean} | evaluate(progress["phase"])
        write_row(state / "curve.csv", (*COLUMNS, *columns), row)
        tqdm.write(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    while progress["phase"] != "done":
        if stopped:
            save_state()
            raise SystemExit(f"stopped; resume with --state {state}")
        phase, step = progress["phase"], progress["step"]
        told = step >= schedule.joint_steps or (state / "decay").exists()
        if phase != trainer.first and progress["decay"] is None and told:
            progress["decay"] = (step, schedule.decay_steps)
        end = schedule.end(progress)
        if bar is None or bar.desc != phase or bar.total != end:
            if bar is not None:
                bar.close()
            bar = tqdm(total=end, initial=step, desc=phase, mininterval=10)
            bar.desc = phase
        size = schedule.vision_batch if phase == trainer.first else schedule.joint_batch
        scale = schedule.rate(phase, step, schedule.vision_steps, progress["decay"])
        trainer.set_rate(scale)
        before_step(step)
        report = trainer.step(make_batch(progress["images"], size, phase))
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in report.items()}
        progress["step"] += 1
        progress["images"] += size
        bar.update()
        bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
        finished = progress["step"] >= end
        if finished or time.time() - last_evaluation > 60 * schedule.evaluate_every:
            checkpoint()
            last_evaluation = time.time()
        if finished:
            progress["phase"], mean = ("joint" if phase == trainer.first else "done"), {}
            progress["step"] = 0 if phase == trainer.first else progress["step"]
            save_state()
    if bar is not None:
        bar.close()


def write_row(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Append one evaluation to a learning curve."""
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
