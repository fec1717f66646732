"""What is optimised: answers, and auxiliary heads that are thrown away with the training state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc_tinyvlm import fast
from vtc_tinyvlm.batches import IGNORE, PATCH_CLASSES
from vtc_tinyvlm.building import BOS, EOS
from vtc_tinyvlm.losses import REFERENT_LAYER, TARGET_LAYER, at, bar_answer_row
from vtc_tinyvlm.model import IMAGE_TOKENS
from vtc_tinyvlm.questions import TYPES
from vtc_tinyvlm.scenes import GRID, PATCH

from .batches import CELLS, KINDS, POSITIONS, Batch, make_batch
from .scenes import crop_grid

PLACE_LAYER = 1  # image tokens know where in the picture they are after this LM layer (counted from 0)


class Heads(nn.Module):
    """Linear read-outs for training only: the first checkpoint's, and `place` (own column and row of image tokens)."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(vision_width), nn.Linear(vision_width, sum(PATCH_CLASSES)))
        self.pairs = nn.Linear(vision_width, 48)
        self.referent = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * POSITIONS))
        self.target = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * POSITIONS))
        self.place = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * CELLS))


def vision_loss(heads: Heads, params: dict[str, Tensor], config: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Sum of the patch and pair losses over all tiles; foreground patch accuracies of crops, and of thumbnails (t_)."""
    features, cls = fast.vision(params, config, batch.pixels.flatten(0, 1))
    parts = heads.patch(features.float()).split(PATCH_CLASSES, -1)
    patches = batch.patches.flatten(0, 1)
    loss = F.binary_cross_entropy_with_logits(heads.pairs(cls.float()), batch.pairs.flatten(0, 1)) * 4
    foreground = patches[..., 0] > 0
    thumbnail = torch.zeros(batch.pixels.shape[:2], dtype=torch.bool)
    thumbnail[:, 0] = True
    thumbnail = thumbnail.flatten()[:, None]
    report = {}
    for i, (name, logits) in enumerate(zip(("shape", "color", "digit", "x", "y"), parts, strict=True)):
        weight = torch.ones(logits.shape[-1])
        if i < 3:
            weight[0] = 0.25
        share = 0.5 if i >= 3 else 1.0
        labels = patches[..., i]
        loss = loss + share * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, ignore_index=IGNORE)
        right = (logits.argmax(-1) == labels).float()
        report[name] = right[foreground & ~thumbnail].mean().item()
        report["t_" + name] = right[foreground & thumbnail].mean().item()
    return loss, report


def arrange(tiles: Tensor, picture: tuple[int, int], newline: Tensor) -> Tensor:
    """Projected tiles [B, 1 + gh * gw, 144, d] -> image tokens [B, N, d] as LLaVA-NeXT lays them out: the thumbnail,
    then the unpadded rows of the picture, each ended by `newline`.
    """
    width, height = picture
    gh, gw = crop_grid(width, height)
    batch, _, _, d = tiles.shape
    crops = tiles[:, 1:].reshape(batch, gh, gw, GRID, GRID, d).transpose(2, 3).reshape(batch, gh * GRID, gw * GRID, d)
    rows, columns = height // PATCH, width // PATCH
    top, left = (gh * GRID - rows) // 2, (gw * GRID - columns) // 2
    crops = crops[:, top : top + rows, left : left + columns]
    crops = torch.cat([crops, newline.expand(batch, rows, 1, d)], 2)
    return torch.cat([tiles[:, 0], crops.flatten(1, 2)], 1)


def place_labels(picture: tuple[int, int]) -> Tensor:
    """Column and row of every image token in 8-pixel cells of the picture, [N, 2]; IGNORE for newlines."""
    columns, rows = picture[0] // PATCH, picture[1] // PATCH
    small = torch.arange(GRID)
    thumbnail = torch.stack(torch.meshgrid(small * columns // GRID, small * rows // GRID, indexing="xy"), -1)
    x = torch.cat([torch.arange(columns), torch.tensor([IGNORE])])
    whole = torch.stack(torch.meshgrid(x, torch.arange(rows), indexing="xy"), -1)
    whole[:, -1] = IGNORE
    return torch.cat([thumbnail.flatten(0, 1), whole.flatten(0, 1)])


def image_tokens(params: dict[str, Tensor], config: Any, batch: Batch) -> Tensor:
    """Projected image tokens [B, N, d] of the stock model. The vision tower gets no gradient."""
    with torch.no_grad():
        features, _ = fast.vision(params, config.vision_config, batch.pixels.flatten(0, 1))
    projected = fast.project(params, features).unflatten(0, batch.pixels.shape[:2])
    return arrange(projected, batch.picture, params["model.image_newline"])


def question_logits(
    params: dict[str, Tensor],
    config: Any,
    batch: Batch,
    image: Tensor,
    barred: Tensor | None = None,
    image_states: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits at the question mark and at the answer [B, Q, 2, V], per-layer states, and the question mark's index."""
    normed, states = fast.language(params, config.text_config, image, BOS, batch.questions, barred, image_states)
    mark = batch.length - 1
    logits = F.linear(torch.stack([at(normed, mark), at(normed, mark + 1)], 2), params["lm_head.weight"])
    return logits.float(), states, mark


def joint_loss(
    heads: Heads, params: dict[str, Tensor], config: Any, batch: Batch, ground_weight: float, place_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Answer and end token at full weight, plus the auxiliary losses."""
    image = image_tokens(params, config, batch)
    image_states: list[Tensor] = []
    barred = bar_answer_row(batch, image.dtype)
    logits, states, mark = question_logits(params, config, batch, image, barred, image_states)
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
    labels = place_labels(batch.picture)
    keep = torch.randperm(len(labels))[: len(labels) // 4]  # a quarter of the tokens is plenty
    guess = heads.place(image_states[PLACE_LAYER][:, 1 + keep].float()).unflatten(-1, (2, CELLS))
    labels = labels[keep].expand(len(image), -1, -1)
    place = F.cross_entropy(guess.flatten(0, 2), labels.flatten(), ignore_index=IGNORE)
    report["place"] = (guess.argmax(-1) == labels).all(-1)[labels[..., 0] != IGNORE].float().mean().item()
    report |= {"answer": answer.item(), "end": end.item()}
    return answer + end + ground_weight * ground + place_weight * place, report


def bar_crops(batch: Batch, tokens: int, dtype: torch.dtype) -> Tensor:
    """Score mask [B, Q * T, 1 + N] that leaves the questions nothing of the image but the thumbnail.

    The same as removing all other image tokens with the rest's positions kept: the thumbnail comes first in a causal
    model.
    """
    size, count, length = batch.questions.shape
    barred = torch.zeros(size, count * length, 1 + tokens, dtype=dtype)
    barred[..., 1 + IMAGE_TOKENS :] = float("-inf")
    return barred


@torch.no_grad()
def evaluate(model: Any, heads: Heads, key: int, images: int, phase: str, thumbnail: bool = False) -> dict[str, float]:
    """Patch accuracies (vision phase) or per-type accuracy on the split with this key: exact match, i.e. the greedy
    answer word is right and the end token follows. `thumbnail` keeps the crops' tokens from the questions.
    """
    vision = phase == "vision"
    params = fast.parameters_in(model, torch.bfloat16)
    total: dict[str, list[float]] = {}
    for start in range(0, images, 8):
        batch = make_batch(key, start, 8, None if vision else KINDS)
        if vision:
            for name, value in vision_loss(heads, params, model.config.vision_config, batch)[1].items():
                total.setdefault(name, []).append(value)
            continue
        image = image_tokens(params, model.config, batch)
        barred = bar_crops(batch, image.shape[1], image.dtype) if thumbnail else None
        guess = question_logits(params, model.config, batch, image, barred)[0].argmax(-1)
        right = (guess[..., 0] == batch.answer) & (guess[..., 1] == EOS)
        for i, name in enumerate(TYPES):
            total.setdefault(name, []).extend(right[batch.kind == i].float().tolist())
    result = {name: sum(values) / max(1, len(values)) for name, values in total.items()}
    if not vision:
        result["mean"] = sum(result[t] for t in TYPES) / len(TYPES)
        result["mean_without_count"] = (result["mean"] * len(TYPES) - result["count"]) / (len(TYPES) - 1)
    return result
