"""Train tinyvlm-next: `python -m vtc_tinyvlm_next.train --state DIR`. Resumable, seeded, one progress bar.

Everything but image_newline starts from the first checkpoint. Two phases (see :mod:`vtc_tinyvlm.loop`). *vision*: the
ViT alone, on per-patch labels of thumbnails and crops; it is frozen afterwards. *joint*: projector and LM, on questions
packed behind their picture; the learning rate falls linearly to 2 % in `--decay-steps`. Every evaluation uses the
validation split and appends a row to the learning curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vtc_tinyvlm import fast, loop

from . import losses
from .batches import KINDS, make_batch
from .data import SPLITS
from .model import build_model, save

SHOWN = ("referent", "target", "place", "answer", "end")
COLUMNS = (
    "color", "shape", "count", "digit", "rel", "exist", "mean", "mean_without_count", "x", "y", "t_color", "t_shape",
    "t_digit", "t_x", "t_y",
)  # fmt: skip
VISION = "model.vision_tower."


class Trainer(loop.Trainer):
    """One optimizer for matrices, one for the rest, and a faster one for the heads, which start from nothing."""

    def __init__(self, seed: int, lr: float, muon_lr: float, ground_weight: float, place_weight: float) -> None:
        self.weights = (ground_weight, place_weight)
        torch.manual_seed(seed)
        model = build_model()
        heads = losses.Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
        matrices, rest = [], []
        for name, p in model.named_parameters():
            (matrices if p.dim() == 2 and ".layers." in name else rest).append(p)
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
        fast_adam = torch.optim.AdamW(heads.parameters(), lr=4 * lr, betas=(0.9, 0.98), weight_decay=0.05)
        super().__init__(model, heads, [(muon, muon_lr), (adam, lr), (fast_adam, 4 * lr)])

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Per-patch labels, or answers, grounding and places."""
        params, config = fast.parameters_in(self.model, torch.bfloat16), self.model.config
        if self.progress["phase"] == "vision":
            return losses.vision_loss(self.heads, params, config.vision_config, batch)
        return losses.joint_loss(self.heads, params, config, batch, *self.weights)


def rate(phase: str, step: int, steps: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate multiple. vision: 70 %, falling in the last 40 %. joint: constant, then linear to 2 %."""
    warmup = min(1.0, (step + 1) / 30)
    if phase == "vision":
        return 0.7 * warmup * min(1.0, 0.05 + 0.95 * (steps - step) / (0.4 * steps))
    if decay is None or step < decay[0]:
        return warmup
    return max(0.02, 1 - (step - decay[0]) / decay[1])


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
    trainer = Trainer(seed, lr, muon_lr, ground_weight, place_weight)
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
        shown=SHOWN,
        columns=(*COLUMNS, *SHOWN),
    )


if __name__ == "__main__":
    typer.run(main)
