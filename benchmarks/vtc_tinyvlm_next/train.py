"""Train tinyvlm-next: `python -m vtc_tinyvlm_next.train --state DIR`. Resumable, seeded, one progress bar.

Everything but image_newline starts from the first checkpoint. Two phases. *vision*: the ViT alone, on per-patch labels
of thumbnails and crops; it is frozen afterwards. *joint*: projector and LM, on questions packed behind their picture,
with a warmup-stable-decay schedule: the rate stays constant until `--joint-steps` is reached (or a file named `decay`
appears in the state directory) and then falls linearly to 2 % in `--decay-steps`. Every evaluation uses the validation
split and appends a row to the learning curve.
"""

from __future__ import annotations

import csv
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from vtc_tinyvlm import fast

from . import losses
from .batches import KINDS, make_batch
from .data import SPLITS
from .model import build_model, save

CURVE_COLUMNS = (
    "phase", "step", "images", "cpu_minutes", "wall_minutes", "lr", "color", "shape", "count", "digit", "rel", "exist",
    "mean", "mean_without_count", "x", "y", "t_color", "t_shape", "t_digit", "t_x", "t_y", "referent", "target",
    "place", "answer", "end",
)  # fmt: skip
VISION = "model.vision_tower."


class Trainer:
    """Model, heads, optimizers and the counters a resumed run needs."""

    def __init__(self, seed: int, lr: float, muon_lr: float, ground_weight: float, place_weight: float) -> None:
        self.weights = (ground_weight, place_weight)
        torch.manual_seed(seed)
        self.model = build_model()
        config = self.model.config
        self.heads = losses.Heads(config.vision_config.hidden_size, config.text_config.hidden_size)
        matrices, rest = [], []
        for name, p in self.model.named_parameters():
            (matrices if p.dim() == 2 and ".layers." in name else rest).append(p)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05),
            torch.optim.AdamW(self.heads.parameters(), lr=4 * lr, betas=(0.9, 0.98), weight_decay=0.05),
        ]
        self.base_lr = (muon_lr, lr, 4 * lr)  # the heads start from nothing
        self.progress: dict[str, Any] = {
            "phase": "vision", "step": 0, "images": 0, "cpu": 0.0, "wall": 0.0, "decay": None
        }  # fmt: skip

    def set_rate(self, scale: float) -> None:
        """Set every learning rate to its base times `scale`."""
        for optimizer, base in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale

    def step(self, batch: Any) -> dict[str, float]:
        """One optimizer step; returns losses and training accuracies. What has no gradient stays as it is."""
        params, config = fast.parameters_in(self.model, torch.bfloat16), self.model.config
        if self.progress["phase"] == "vision":
            loss, report = losses.vision_loss(self.heads, params, config.vision_config, batch)
        else:
            loss, report = losses.joint_loss(self.heads, params, config, batch, *self.weights)
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
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = state["progress"]
        torch.set_rng_state(state["random"])


def rate(phase: str, step: int, steps: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate multiple. vision: 70 %, falling in the last 40 %. joint: constant, then linear to 2 %."""
    warmup = min(1.0, (step + 1) / 30)
    if phase == "vision":
        return 0.7 * warmup * min(1.0, 0.05 + 0.95 * (steps - step) / (0.4 * steps))
    if decay is None or step < decay[0]:
        return warmup
    return max(0.02, 1 - (step - decay[0]) / decay[1])


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
    threads: int = 1,
    vision_steps: int = 260,
    joint_steps: Annotated[int, typer.Option(help="Constant-rate steps before the decay starts.")] = 1350,
    decay_steps: int = 400,
    vision_batch: int = 12,
    joint_batch: int = 8,
    lr: float = 8e-4,
    muon_lr: float = 1.6e-3,
    ground_weight: Annotated[float, typer.Option(help="Of the two grounding losses.")] = 0.2,
    place_weight: Annotated[float, typer.Option(help="Of the loss that tells image tokens where they are.")] = 0.1,
    evaluate_every: Annotated[float, typer.Option(help="Minutes between evaluations.")] = 4.0,
    validation_images: int = 64,
) -> None:
    """Train from the first checkpoint (or resume) and leave a checkpoint in STATE/checkpoint."""
    torch.set_num_threads(threads)
    state.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(seed, lr, muon_lr, ground_weight, place_weight)
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
        if progress["phase"] != "vision":
            save(trainer.model, state / "checkpoint")
        result = losses.evaluate(
            trainer.model, trainer.heads, SPLITS["validation"], validation_images, progress["phase"]
        )
        row = {"phase": progress["phase"], "step": progress["step"], "images": progress["images"]}
        row |= {"cpu_minutes": progress["cpu"], "wall_minutes": progress["wall"], "lr": scale * lr}
        row |= {k: mean[k] for k in ("referent", "target", "place", "answer", "end") if k in mean}
        write_row(state / "curve.csv", row | result)
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
        report = trainer.step(make_batch(key, progress["images"], size, None if vision else KINDS))
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in report.items()}
        progress["step"] += 1
        progress["images"] += size
        bar.update()
        bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
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
