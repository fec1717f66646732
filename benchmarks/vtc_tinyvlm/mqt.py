"""Train tinyvlm-mqt: `python -m vtc_tinyvlm.mqt --state DIR`. Resumable, seeded, one progress bar.

tinyvlm with a Matryoshka Query Transformer of 36 queries in place of its projector. The vision tower is tinyvlm's and
frozen, as published; the language model starts from tinyvlm's. Two phases (see :mod:`vtc_tinyvlm.loop`). *resampler*:
it alone, with all queries. *joint*: it and the language model, with a random even number of queries in each step; the
learning rate falls linearly to 2 % in `--decay-steps`. Every evaluation uses the validation split and appends a row to
the learning curve: exact match with 36, 24, 16, 8, 4 and 2 tokens, means without `count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vtc.modules import MatryoshkaQueryTransformer, draw_queries

from . import fast, loop, losses, mqt_model
from .batches import KINDS, Batch, make_batch
from .building import EOS
from .data import SPLITS
from .mqt_model import HEADS, QUERIES
from .questions import TYPES

SHARPER = 2.5  # times the usual start of the weights of q and k: queries then differ from the first step on
COUNTS = (36, 24, 16, 8, 4, 2)
SHOWN = ("referent", "target", "answer", "end")
COLUMNS = (*(f"m{m}" for m in COUNTS), *TYPES)
TOWER = "model.vision_tower."
RESAMPLER = "model.multi_modal_projector."


def fresh_model(seed: int) -> Any:
    """The shipped model's tower and language model, and a resampler that depends on nothing but the seed."""
    model = mqt_model.build_model()
    torch.manual_seed(seed)
    width, out = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    resampler = model.model.multi_modal_projector = MatryoshkaQueryTransformer(QUERIES, width, out, HEADS)
    with torch.no_grad():
        resampler.attn.in_proj_weight[: 2 * width] *= SHARPER
    return model.train()


class Trainer(loop.Trainer):
    """One optimizer for the matrices of the language model, one for what else there is in it, one for what is new."""

    def __init__(self, seed: int, lr: float, muon_lr: float, new_lr: float, ground_weight: float) -> None:
        self.ground_weight = ground_weight
        model = fresh_model(seed)
        heads = losses.Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(TOWER) and parameter.requires_grad)
        self.language = [(name, p) for name, p in model.named_parameters() if not name.startswith((TOWER, RESAMPLER))]
        matrices = [p for name, p in self.language if p.dim() == 2 and ".layers." in name]
        rest = [p for name, p in self.language if not (p.dim() == 2 and ".layers." in name)]
        new = [p for name, p in model.named_parameters() if name.startswith(RESAMPLER) and p.requires_grad]
        new += [*heads.referent.parameters(), *heads.target.parameters()]
        muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
        fresh = torch.optim.AdamW(new, lr=new_lr, betas=(0.9, 0.98), weight_decay=0.01)
        super().__init__(model, heads, [(muon, muon_lr), (adam, lr), (fresh, new_lr)], first="resampler")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Answers and grounding, from all queries or from as many as are drawn."""
        alone = self.progress["phase"] == self.first
        for _, parameter in self.language:
            parameter.requires_grad_(not alone)
        resampler = self.model.model.multi_modal_projector
        resampler.keep = None if alone else draw_queries(QUERIES)
        params = fast.parameters_in(self.model, torch.bfloat16)
        with torch.no_grad():
            features, _ = fast.vision(params, self.model.config.vision_config, batch.pixels)
        image = resampler(features.float()).to(torch.bfloat16)
        logits, states, mark = losses.read_out(self.model, params, batch, image)
        return losses.answer_loss(self.heads, logits, states, mark, batch, self.ground_weight)


@torch.no_grad()
def evaluate(model: Any, key: int, images: int, counts: Sequence[int] = COUNTS) -> dict[str, float]:
    """Exact match in fp32 on the split with this key: per number of tokens the mean without `count`, and each type
    with the first of the numbers.
    """
    params = fast.parameters_in(model, torch.float32)
    right: dict[tuple[int, str], list[float]] = {(m, name): [] for m in counts for name in TYPES}
    for start in range(0, images, 32):
        batch = make_batch(key, start, 32, KINDS)
        features, _ = fast.vision(params, model.config.vision_config, batch.pixels)
        for m in counts:
            image = model.model.multi_modal_projector(features, queries=m)
            guess = losses.read_out(model, params, batch, image)[0].argmax(-1)
            fits = (guess[..., 0] == batch.answer) & (guess[..., 1] == EOS)
            for i, name in enumerate(TYPES):
                right[m, name] += fits[batch.kind == i].float().tolist()
    rate = {cell: sum(values) / max(1, len(values)) for cell, values in right.items()}
    rest = [name for name in TYPES if name != "count"]
    means = {f"m{m}": sum(rate[m, name] for name in rest) / len(rest) for m in counts}
    return means | {name: rate[counts[0], name] for name in TYPES}


def rate(phase: str, step: int, steps: int, decay: tuple[int, int] | None) -> float:
    """Learning-rate multiple: warm-up, constant; in the second phase a linear decay."""
    warmup = min(1.0, (step + 1) / 100)
    if phase != "joint" or decay is None or step < decay[0]:
        return warmup
    return max(0.02, 1 - (step - decay[0]) / decay[1])


def main(
    state: Annotated[Path, typer.Option(help="Directory of the resumable state, the curve and the checkpoint.")],
    resume: Annotated[bool, typer.Option(help="Go on from the state found there.")] = True,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
    resampler_steps: int = 100,
    joint_steps: Annotated[int, typer.Option(help="Constant-rate steps before the decay starts.")] = 1000,
    decay_steps: int = 500,
    batch: int = 32,
    lr: float = 1e-3,
    muon_lr: float = 1.5e-3,
    new_lr: float = 2e-3,
    ground_weight: Annotated[float, typer.Option(help="Of the two grounding losses.")] = 0.2,
    evaluate_every: Annotated[float, typer.Option(help="Minutes between evaluations.")] = 5.0,
    validation_images: int = 256,
) -> None:
    """Train from tinyvlm (or resume) and leave a checkpoint in STATE/checkpoint."""
    torch.set_num_threads(threads)
    trainer = Trainer(seed, lr, muon_lr, new_lr, ground_weight)
    loop.train(
        trainer,
        loop.Schedule(resampler_steps, joint_steps, decay_steps, batch, batch, new_lr, rate, evaluate_every),
        state,
        resume=resume,
        make_batch=lambda start, size, phase: make_batch(SPLITS["train"], start, size, KINDS),
        evaluate=lambda phase: evaluate(trainer.model, SPLITS["validation"], validation_images),
        save=mqt_model.save,
        shown=SHOWN,
        columns=(*COLUMNS, *SHOWN),
    )


if __name__ == "__main__":
    typer.run(main)
