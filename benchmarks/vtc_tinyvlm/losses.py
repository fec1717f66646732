"""What is optimised: answers, and auxiliary heads that are thrown away with the training state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fast
from .batches import IGNORE, KINDS, PATCH_CLASSES, POSITIONS, Batch, make_batch
from .building import BOS, EOS
from .questions import TYPES

PATCH_WEIGHT = 0.3  # of the vision heads once the language model trains (1 before)
REFERENT_LAYER = 1  # the word naming the object knows where it is after this LM layer (counted from 0) ...
TARGET_LAYER = 3  # ... and the question mark knows where the object asked for is after this one


class Heads(nn.Module):
    """Linear read-outs for training only.

    patch: shape, colour, digit and centre of the object under a patch, from the features the projector takes.
    pairs: which colour-shape pairs are present, from CLS, which gives CLS attention a meaning.
    referent, target: lattice column and row, from two LM states of every question (grounding).
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(vision_width), nn.Linear(vision_width, sum(PATCH_CLASSES)))
        self.pairs = nn.Linear(vision_width, 48)
        self.referent = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * POSITIONS))
        self.target = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * POSITIONS))


def vision_loss(heads: Heads, features: Tensor, cls: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Sum of the patch and pair losses, and foreground patch accuracies."""
    parts = heads.patch(features.float()).split(PATCH_CLASSES, -1)
    names = ("shape", "color", "digit", "x", "y")
    loss = F.binary_cross_entropy_with_logits(heads.pairs(cls.float()), batch.pairs) * 4
    foreground = batch.patches[..., 0] > 0
    report = {}
    for i, (name, logits) in enumerate(zip(names, parts, strict=True)):
        labels = batch.patches[..., i]
        # Background is four fifths of the patches and learnt at once; it must not drown the rest.
        weight = torch.ones(logits.shape[-1])
        if i < 3:
            weight[0] = 0.25
        share = 0.5 if i >= 3 else 1.0
        loss = loss + share * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, ignore_index=IGNORE)
        report[name] = (logits.argmax(-1) == labels)[foreground].float().mean().item()
    return loss, report


def question_logits(
    model: Any, params: dict[str, Tensor], batch: Batch, features: Tensor, barred: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What :func:`read_out` returns, from the tower's features."""
    return read_out(model, params, batch, fast.project(params, features), barred)


def read_out(
    model: Any, params: dict[str, Tensor], batch: Batch, image: Tensor, barred: Tensor | None = None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits at the question mark and at the answer [B, Q, 2, V], per-layer states, and the question mark's index.

    From visual tokens [B, N, d] as they enter the language model.
    """
    normed, states = fast.language(params, model.config.text_config, image, BOS, batch.questions, barred)
    mark = batch.length - 1
    logits = F.linear(torch.stack([at(normed, mark), at(normed, mark + 1)], 2), params["lm_head.weight"])
    return logits.float(), states, mark


def bar_answer_row(batch: Batch, dtype: torch.dtype) -> Tensor:
    """`batch.hidden` as a score mask [B, Q * T, 145] that touches only the rows of answer tokens."""
    return bar_row(batch.hidden, batch.length, batch.questions.shape[-1], dtype)


def bar_row(hidden: Tensor, row: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What one row [B, Q] of each question of so many tokens may not see, bool [B, Q, n], as a score mask
    [B, Q * length, n + 1].
    """
    size, count, tokens = hidden.shape
    barred = torch.zeros(size, count, length, tokens + 1, dtype=dtype)
    rows = torch.zeros(size, count, tokens + 1, dtype=dtype)
    rows[..., 1:].masked_fill_(hidden, float("-inf"))
    barred.scatter_(2, row[..., None, None].expand(-1, -1, 1, tokens + 1), rows[:, :, None])
    return barred.flatten(1, 2)


def at(states: Tensor, index: Tensor) -> Tensor:
    """States [B, Q, T, d], index [B, Q] -> [B, Q, d]."""
    return states.gather(2, index[..., None, None].expand(-1, -1, 1, states.shape[-1])).squeeze(2)


def joint_loss(
    model: Any, heads: Heads, params: dict[str, Tensor], batch: Batch, ground_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Answer and end token at full weight, plus the auxiliary losses."""
    features, cls = fast.vision(params, model.config.vision_config, batch.pixels)
    logits, states, mark = question_logits(model, params, batch, features, bar_answer_row(batch, features.dtype))
    seen, report = vision_loss(heads, features, cls, batch)
    answered, more = answer_loss(heads, logits, states, mark, batch, ground_weight)
    return answered + PATCH_WEIGHT * seen, report | more


def answer_loss(
    heads: Heads, logits: Tensor, states: list[Tensor], mark: Tensor, batch: Batch, ground_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Answer and end token, and grounding, from what :func:`read_out` returns."""
    answer = F.cross_entropy(logits[..., 0, :].flatten(0, 1), batch.answer.flatten())
    end = F.cross_entropy(logits[..., 1, :].flatten(0, 1), torch.full_like(batch.answer, EOS).flatten())
    ground, report = torch.zeros(()), {}
    for name, layer, index, labels in (
        ("referent", REFERENT_LAYER, mark - 1, batch.referent),
        ("target", TARGET_LAYER, mark, batch.target),
    ):
        guess = getattr(heads, name)(at(states[layer], index).float()).unflatten(-1, (2, POSITIONS))
        ground = ground + F.cross_entropy(guess.flatten(0, 2), labels.flatten(), ignore_index=IGNORE)
        known = labels[..., 0] != IGNORE
        report[name] = (guess.argmax(-1) == labels).all(-1)[known].float().mean().item()
    report |= {"answer": answer.item(), "end": end.item()}
    return answer + end + ground_weight * ground, report


@torch.no_grad()
def evaluate(model: Any, heads: Heads, key: int, images: int, phase: str) -> dict[str, float]:
    """Patch accuracies (vision phase) or per-type accuracy on the split with this key: exact match, i.e. the greedy
    answer word is right and the end token follows, in fp32.
    """
    params = fast.parameters_in(model, torch.float32)
    total: dict[str, list[float]] = {}
    for start in range(0, images, 32):
        batch = make_batch(key, start, 32, KINDS if phase != "vision" else None)
        features, cls = fast.vision(params, model.config.vision_config, batch.pixels)
        if phase == "vision":
            for name, value in vision_loss(heads, features, cls, batch)[1].items():
                total.setdefault(name, []).append(value)
            continue
        guess = question_logits(model, params, batch, features)[0].argmax(-1)
        right = (guess[..., 0] == batch.answer) & (guess[..., 1] == EOS)
        for i, name in enumerate(TYPES):
            total.setdefault(name, []).extend(right[batch.kind == i].float().tolist())
    result = {name: sum(values) / max(1, len(values)) for name, values in total.items()}
    if phase != "vision":
        result["mean"] = sum(result[t] for t in TYPES) / len(TYPES)
        result["mean_without_rel"] = (result["mean"] * len(TYPES) - result["rel"]) / (len(TYPES) - 1)
    return result
