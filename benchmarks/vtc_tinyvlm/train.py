"""Train tinyvlm: `python -m vtc_tinyvlm.train --state DIR`. Resumable, seeded, one progress bar.

Two phases. *vision*: the ViT alone, on per-patch labels. *joint*: everything, on questions packed behind their image,
with a warmup-stable-decay schedule: the learning rate stays constant until `--joint-steps` is reached (or a file named
`decay` appears in the state directory) and then falls linearly to 2 % in `--decay-steps`. Every evaluation uses the
validation split and appends a row to the learning curve.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from . import fast, losses
from .batches import KINDS, make_batch
from .data import SPLITS
from .model import build_model, save

CURVE_COLUMNS = (
    "phase", "step", "images", "cpu_minutes", "wall_minutes", "lr", "color", "shape", "count", "digit", "rel", "exist",
    "mean", "mean_without_rel", "x", "y", "referent", "target", "answer_loss",
)  # fmt: skip


class Trainer:
    """Model, heads, optimizers and the counters a resumed run needs."""

    def __init__(self, seed: int, lr: float, muon_lr: float, ground_weight: float) -> None:
        self.ground_weight = ground_weight
        torch.manual_seed(seed)
        self.model = build_model()
        config = self.model.config
        self.heads = losses.Heads(config.vision_config.hidden_size, config.text_config.hidden_size)
        matrices, rest = [], list(self.heads.parameters())
        for name, p in self.model.named_parameters():
            (matrices if p.dim() == 2 and ".layers." in name else rest).append(p)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05),
        ]
        self.base_lr = (muon_lr, lr)
        self.progress: dict[str, Any] = {
            "phase": "vision",
            "step": 0,
            "images": 0,
            "cpu": 0.0,
            "wall": 0.0,
            "decay": None,
        }

    def set_rate(self, scale: float) -> None:
        """Set every learning rate to its base times `scale`."""
        for optimizer, base in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale

    def step(self, batch: Any) -> dict[str, float]:
        """One optimizer step; returns losses and training accuracies."""
        params = fast.parameters_in(self.model, torch.bfloat16)
        if self.progress["phase"] == "vision":
            features, cls = fast.vision(params, self.model.config.vision_config, batch.pixels)
            loss, report = losses.vision_loss(self.heads, features, cls, batch)
        else:
            loss, report = losses.joint_loss(self.model, self.heads, params, batch, self.ground_weight)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        everything = [*self.model.parameters(), *self.heads.parameters()]
        torch.nn.utils.clip_grad_norm_([p for p in everything if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return report | {"loss": loss.item()}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": self.progress,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = state["progress"]


def rate(phase: str, step: int, steps: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate multiple. vision: warm-up, constant, last quarter down to 30 %. joint: warm-up, constant, decay."""
    warmup = min(1.0, (step + 1) / 100)
    if phase == "vision":
        return warmup * min(1.0, 0.3 + 0.7 * (steps - step) / (0.25 * steps))
    if decay is None or step < decay[0]:
        return 0.7 * warmup
    return 0.7 * max(0.02, 1 - (step - decay[0]) / decay[1])


def choose_threads(most: int) -> None:
    """Use more than one thread only while the machine is otherwise idle.

    Beside other busy processes the barriers between threads cost more than the second core brings: steps were up to
    five times slower with two threads than with one.
    """
    others = os.getloadavg()[0] - torch.get_num_threads()
    torch.set_num_threads(most if others < 0.5 else 1)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Append one evaluation to the learning curve."""
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, CURVE_COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


def main(
    state: Annotated[Path, typer.Option(help="Directory of the resumable state, the curve and the checkpoint.")],
    resume: Annotated[bool, typer.Option(help="Go on from the state found there.")] = True,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="At most; more than one only on an idle machine.")] = 2,
    vision_steps: int = 440,
    joint_steps: Annotated[int, typer.Option(help="Constant-rate steps before the decay starts.")] = 1800,
    decay_steps: int = 500,
    vision_batch: int = 64,
    joint_batch: int = 32,
    lr: float = 1.5e-3,
    muon_lr: float = 3e-3,
    ground_weight: Annotated[float, typer.Option(help="Of the two grounding losses; 0 is the ablation.")] = 0.2,
    evaluate_every: Annotated[float, typer.Option(help="Minutes between evaluations.")] = 4.0,
    validation_images: int = 256,
) -> None:
    """Train from scratch (or resume) and leave a checkpoint in STATE/checkpoint."""
    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(seed, lr, muon_lr, ground_weight)
    saved = state / "state.pt"
    if resume and saved.exists():
        trainer.restore(torch.load(saved, weights_only=True))
    progress = trainer.progress
    wall, cpu, base_wall, base_cpu = time.time(), time.process_time(), progress["wall"], progress["cpu"]
    key, bar, last_evaluation, mean = SPLITS["train"], None, time.time(), {}

    def save_state() -> None:
        progress["wall"] = base_wall + (time.time() - wall) / 60
        progress["cpu"] = base_cpu + (time.process_time() - cpu) / 60
        torch.save(trainer.state(), saved.with_suffix(".new"))
        saved.with_suffix(".new").replace(saved)

    def checkpoint() -> None:
        save_state()
        result = losses.evaluate(
            trainer.model, trainer.heads, SPLITS["validation"], validation_images, progress["phase"]
        )
        row = {"phase": progress["phase"], "step": progress["step"], "images": progress["images"]}
        row |= {"cpu_minutes": progress["cpu"], "wall_minutes": progress["wall"], "lr": scale * lr}
        row |= {k: mean[k] for k in ("referent", "target") if k in mean} | {"answer_loss": mean.get("answer", 0.0)}
        write_row(state / "curve.csv", row | result)
        if progress["phase"] != "vision":
            save(trainer.model, state / "checkpoint")
        tqdm.write(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in (row | result).items()))

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    while progress["phase"] != "done":
        if stopped:
            save_state()
            raise SystemExit(f"stopped; resume with --state {state}")
        vision = progress["phase"] == "vision"
        told = progress["step"] >= joint_steps or (state / "decay").exists()
        if not vision and progress["decay"] is None and told:
            progress["decay"] = (progress["step"], decay_steps)
        end = vision_steps if vision else (sum(progress["decay"]) if progress["decay"] else joint_steps + decay_steps)
        if bar is None or bar.desc != progress["phase"] or bar.total != end:
            if bar is not None:
                bar.close()
            bar = tqdm(total=end, initial=progress["step"], desc=progress["phase"], mininterval=10)
            bar.desc = progress["phase"]
        size = vision_batch if vision else joint_batch
        scale = rate(progress["phase"], progress["step"], vision_steps, progress["decay"])
        trainer.set_rate(scale)
        if progress["step"] % 20 == 0:
            choose_threads(threads)
        report = trainer.step(make_batch(key, progress["images"], size, None if vision else KINDS))
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in report.items()}
        progress["step"] += 1
        progress["images"] += size
        bar.update()
        bar.set_postfix({"threads": torch.get_num_threads()} | {k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
        finished = progress["step"] >= end
        if finished or time.time() - last_evaluation > 60 * evaluate_every:
            checkpoint()
            last_evaluation = time.time()
        if finished:
            progress["phase"], mean = ("joint" if vision else "done"), {}
            progress["step"] = 0 if vision else progress["step"]
            save_state()
    if bar is not None:
        bar.close()


if __name__ == "__main__":
    typer.run(main)
