"""Train the language model on the frozen encoder: `python -m vtc_photovlm.train --state DIR`. Resumable.

First the encoder's features of N pictures and of the validation pictures are cached (STATE/features), then projector
and Llama are trained on them: warm-up, constant rate, linear decay. Stopped by a signal, it goes on from where it was
when called again, in both parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from vtc_tinyvlm import fast, loop
from vtc_tinyvlm.train import choose_threads, rate

from . import encoder, losses
from .batches import Source
from .features import Store, statistics
from .model import LAYERS, TOWER, WIDTH, assemble, build_config, save
from .photos import SIZE
from .questions import TYPES

SHOWN = ("answer_loss", "place", "patch")


class Trainer(loop.Trainer):
    """Projector and language model; the tower in it is a stand-in without use."""

    def __init__(
        self, seed: int, width: int, layers: int, lr: float, muon_lr: float, place_weight: float, patch_weight: float
    ) -> None:
        from transformers import Dinov2Config

        self.weights = place_weight, patch_weight
        torch.manual_seed(seed)
        unused = Dinov2Config(hidden_size=encoder.WIDTH, num_hidden_layers=1, image_size=14, patch_size=14, mlp_ratio=1)
        model = assemble(build_config(width, layers, unused))
        heads = losses.Heads(width)
        matrices: list[nn.Parameter] = []
        rest = list(heads.parameters())
        for name, p in model.named_parameters():
            if name.startswith(TOWER):
                p.requires_grad_(False)
            else:
                (matrices if p.dim() == 2 and ".layers." in name else rest).append(p)
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
        super().__init__(model, heads, [(muon, muon_lr), (adam, lr)])
        self.progress["phase"] = "joint"  # there is no other: the encoder is frozen

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Answers and places, computed in bf16."""
        params = fast.parameters_in(self.model, torch.bfloat16)
        return losses.loss(self.model, self.heads, params, batch, *self.weights)  # type: ignore[arg-type]


def prepare(state: Path, pictures: int, validation: int, seed: int) -> tuple[Source, Source, Tensor, Tensor]:
    """Encode what is missing; the sources of both splits, and mean and deviation of the features.

    Raises:
        Unavailable: pictures, fonts or encoder cannot be had.
        ValueError: the cache is of something else.
    """
    stores = [
        Store(state / "features" / split, split, n) for split, n in (("train", pictures), ("validation", validation))
    ]
    if any(store.done() < store.pictures for store in stores):
        tower = encoder.load(SIZE)
        for store in stores:
            store.fill(tower)
    arrays = [store.open() for store in stores]
    mean, deviation = statistics(arrays[0])
    train, held = (Source(s.split, x[: s.pictures], mean, deviation, seed) for s, x in zip(stores, arrays, strict=True))
    return train, held, mean, deviation


def run(
    trainer: Trainer,
    sources: tuple[Source, Source],
    normal: tuple[Tensor, Tensor],
    state: Path,
    *,
    steps: int,
    decay_steps: int,
    batch: int,
    lr: float,
    evaluate_every: float,
    validation: int,
    resume: bool = True,
    threads: int = 1,
) -> None:
    """The loop, on features that are there; leaves STATE/checkpoint and STATE/curve.csv.

    Args:
        trainer: at its beginning.
        sources: of training and of validation pictures.
        normal: mean and deviation of the features.
        state: folder of the resumable state.
        steps: in all.
        decay_steps: how many of them decay, at the end.
        batch: pictures of a step.
        lr: AdamW's, for the curve.
        evaluate_every: minutes.
        validation: pictures of an evaluation.
        resume: go on from the state found there.
        threads: at most.
    """

    def write(model: nn.Module, directory: Path) -> None:
        save(model, directory, *normal)

    loop.train(
        trainer,
        loop.Schedule(0, steps - decay_steps, decay_steps, 0, batch, lr, rate, evaluate_every),
        state,
        resume=resume,
        make_batch=lambda start, size, phase: sources[0].batch(start, size),
        evaluate=lambda phase: losses.evaluate(trainer.model, sources[1], validation),
        save=write,
        shown=SHOWN,
        columns=(*TYPES, "mean", *SHOWN),
        before_step=lambda step: choose_threads(threads) if step % 20 == 0 else None,
    )


def main(
    state: Annotated[
        Path, typer.Option(help="Folder of the features, the resumable state, the curve, the checkpoint.")
    ],
    pictures: Annotated[int, typer.Option(help="Encoded once: about 0.1 CPU seconds and 393 kB each.")] = 20_000,
    epochs: Annotated[float, typer.Option(help="How often each picture is seen, with new questions each time.")] = 3.0,
    resume: Annotated[bool, typer.Option(help="Go on from the state found there.")] = True,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="At most; more than one only on an idle machine.")] = 2,
    width: Annotated[int, typer.Option(help="Of the language model, a multiple of 64.")] = WIDTH,
    layers: int = LAYERS,
    batch: Annotated[int, typer.Option(help="Pictures of a step.")] = 16,
    decay: Annotated[float, typer.Option(help="Share of the steps in which the rate falls, at the end.")] = 0.3,
    lr: float = 1.5e-3,
    muon_lr: float = 3e-3,
    place_weight: Annotated[float, typer.Option(help="Of the loss for where named things stand.")] = 0.2,
    patch_weight: Annotated[float, typer.Option(help="Of the loss for what stands under each patch.")] = 0.5,
    evaluate_every: Annotated[float, typer.Option(help="Minutes between evaluations.")] = 6.0,
    validation: Annotated[int, typer.Option(help="Pictures of an evaluation.")] = 400,
) -> None:
    """Encode, train (or go on), and leave a checkpoint in STATE/checkpoint."""
    choose_threads(threads)
    train, held, *normal = prepare(state, pictures, validation, seed)
    torch.set_num_threads(1)
    steps = round(pictures * epochs / batch)
    run(
        Trainer(seed, width, layers, lr, muon_lr, place_weight, patch_weight),
        (train, held),
        (normal[0], normal[1]),
        state,
        steps=steps,
        decay_steps=round(steps * decay),
        batch=batch,
        lr=lr,
        evaluate_every=evaluate_every,
        validation=validation,
        resume=resume,
        threads=threads,
    )


if __name__ == "__main__":
    typer.run(main)
