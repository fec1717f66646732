"""Train tinyvlm: `python -m vtc_tinyvlm.train --state DIR`. Resumable, seeded, one progress bar.

Two phases (see :mod:`vtc_tinyvlm.loop`). *vision*: the ViT alone, on per-patch labels. *joint*: everything, on
questions packed behind their image; the learning rate falls linearly to 2 % in `--decay-steps`. Every evaluation uses
the validation split and appends a row to the learning curve.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from . import fast, loop, losses
from .batches import KINDS, make_batch
from .data import SPLITS
from .model import build_model, save

SHOWN = ("referent", "target")
COLUMNS = ("color", "shape", "count", "digit", "rel", "exist", "mean", "mean_without_rel", "x", "y")


class Trainer(loop.Trainer):
    """One optimizer for matrices, one for the rest and the heads."""

    def __init__(self, seed: int, lr: float, muon_lr: float, ground_weight: float) -> None:
        self.ground_weight = ground_weight
        torch.manual_seed(seed)
        model = build_model()
        heads = losses.Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
        matrices, rest = [], list(heads.parameters())
        for name, p in model.named_parameters():
            (matrices if p.dim() == 2 and ".layers." in name else rest).append(p)
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
        super().__init__(model, heads, [(muon, muon_lr), (adam, lr)])

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Per-patch labels, or answers and grounding."""
        params = fast.parameters_in(self.model, torch.bfloat16)
        if self.progress["phase"] == "vision":
            features, cls = fast.vision(params, self.model.config.vision_config, batch.pixels)
            loss, report = losses.vision_loss(self.heads, features, cls, batch)
        else:
            loss, report = losses.joint_loss(self.model, self.heads, params, batch, self.ground_weight)
        return loss, report | {"answer_loss": report.get("answer", 0.0)}  # as the curve calls it


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
    trainer = Trainer(seed, lr, muon_lr, ground_weight)
    loop.train(
        trainer,
        loop.Schedule(vision_steps, joint_steps, decay_steps, vision_batch, joint_batch, lr, rate, evaluate_every),
        state,
        resume=resume,
        make_batch=lambda start, size, phase: make_batch(
            SPLITS["train"], start, size, None if phase == "vision" else KINDS
        ),
        evaluate=lambda phase: losses.evaluate(
            trainer.model, trainer.heads, SPLITS["validation"], validation_images, phase
        ),
        save=save,
        shown=(*SHOWN, "answer_loss"),
        columns=(*COLUMNS, *SHOWN, "answer_loss"),
        before_step=lambda step: choose_threads(threads) if step % 20 == 0 else None,
    )


if __name__ == "__main__":
    typer.run(main)
