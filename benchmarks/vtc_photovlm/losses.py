"""What is optimised: answers token by token, and where named things stand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc_tinyvlm import fast
from vtc_tinyvlm.building import BOS
from vtc_tinyvlm.losses import at, bar_row

from .batches import CELLS, IGNORE, NAMED, Batch, Source
from .questions import TYPES
from .vocabulary import VOCABULARY

SHARES = torch.tensor([2.0 if name in ("field", "color") else 1.0 for name in TYPES])
"""What a type of question counts for, however often it is asked and long its answers are. Two are learnt last."""
NOTHING = 0.1
"""Weight of patches under which nothing stands that has a name: most of them, and learnt at once."""


class Heads(nn.Module):
    """Read-outs for training only, from states after half of the layers.

    patch: the word for what stands under a visual token.
    place: column and row of what a word of the question names.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * CELLS))
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY)))


def answer_logits(
    model: Any,
    params: dict[str, Tensor],
    batch: Batch,
    barred: Tensor | None = None,
    image_states: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [rows, V] where there is a label, which of [B, Q, T] those are, and the states after each layer.

    ``image_states`` collects the states of ``<bos> image`` after each layer but the last.
    """
    dtype = params["lm_head.weight"].dtype
    image = fast.project(params, batch.features.to(dtype))
    normed, states = fast.language(params, model.config.text_config, image, BOS, batch.questions, barred, image_states)
    labelled = batch.labels != IGNORE
    return F.linear(normed[labelled], params["lm_head.weight"]).float(), labelled, states


def loss(
    model: Any, heads: Heads, params: dict[str, Tensor], batch: Batch, place_weight: float, patch_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Answer and end token at full weight, plus where named things stand and what stands where; what to show of it."""
    dtype = params["lm_head.weight"].dtype
    barred = bar_row(batch.hidden, batch.last, batch.questions.shape[-1], dtype)
    image_states: list[Tensor] = []
    logits, labelled, states = answer_logits(model, params, batch, barred, image_states)
    answer = by_type(F.cross_entropy(logits, batch.labels[labelled], reduction="none"), batch, labelled)
    half = len(states) // 2 - 1  # naming patches after a third of the layers was learnt later, not sooner: README.md
    words = torch.stack([at(states[half], batch.named[..., i]) for i in range(NAMED)], 2)
    known = batch.place[..., 0] != IGNORE
    guess = heads.place(words[known].float()).unflatten(-1, (2, CELLS))
    place = F.cross_entropy(guess.flatten(0, 1), batch.place[known].flatten()) if known.any() else answer * 0
    close = ((guess.argmax(-1) - batch.place[known]).abs() <= 1).all(-1)
    seen = heads.patch(image_states[half][:, 1:].float()).flatten(0, 1)
    weight = torch.ones(seen.shape[-1])
    weight[0] = NOTHING
    patch = F.cross_entropy(seen, batch.patches.flatten(), weight)
    something = batch.patches.flatten() > 0
    report = {"answer_loss": answer.item(), "place": close.float().mean().item()}
    report["patch"] = (seen.argmax(-1) == batch.patches.flatten())[something].float().mean().item()
    return answer + place_weight * place + patch_weight * patch, report


def by_type(losses: Tensor, batch: Batch, labelled: Tensor) -> Tensor:
    """Mean of the losses [rows] at labels within each type of question, and of these by :data:`SHARES`."""
    kind = batch.kind[..., None].expand_as(labelled)[labelled]
    number = torch.zeros(len(TYPES)).scatter_add(0, kind, torch.ones_like(losses))
    weight = (SHARES / number.clamp(min=1))[kind]
    return (losses * weight).sum() / SHARES[number > 0].sum()


@torch.no_grad()
def right(model: Any, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """Bool [B, Q]: the answer and the end token are the most likely ones, so that greedy decoding gives them."""
    logits, labelled, _ = answer_logits(model, params, batch)
    wrong = torch.zeros_like(labelled)
    wrong[labelled] = logits.argmax(-1) != batch.labels[labelled]
    return ~wrong.any(-1) & (batch.kind >= 0)


def evaluate(model: Any, source: Source, pictures: int, size: int = 16) -> dict[str, float]:
    """Exact match of each type on the first pictures of a split, in bf16, and their mean."""
    params = fast.parameters_in(model, torch.bfloat16)
    total: dict[str, list[float]] = {name: [] for name in TYPES}
    for start in range(0, pictures, size):
        batch = source.batch(start, min(size, pictures - start), shuffled=False)
        found = right(model, params, batch)
        for i, name in enumerate(TYPES):
            total[name] += found[batch.kind == i].float().tolist()
    result = {name: sum(values) / len(values) for name, values in total.items() if values}
    return result | {"mean": sum(result.values()) / max(1, len(result))}
