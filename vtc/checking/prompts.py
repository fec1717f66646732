"""Prompts to check with, made from the user's own: what cannot be used, variants, a padded batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.checking.byhand import IDS, PADDING, Inputs, visual_columns
from vtc.dialect.arguments import EMBEDS, POSITIONS
from vtc.dialect.generation import pad_token_of
from vtc.models import Parts

LONGER = 3
"""Tokens by which the variant of a prompt is longer, and the prompt beside it padded."""


def check_inputs(parts: Parts, inputs: Inputs) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: a model without placeholders; no ids, no image, no two-dimensional mask, padding on the right, or
            positions of the caller's own.
    """
    if not parts.placeholders:
        raise ValueError(
            f"verify finds images by their placeholders, and {type(parts.root).__name__} has none: it embeds prompts "
            "in a method of its own. tests/integrations/test_llava_original.py compares such models with pruning by "
            "hand"
        )
    ids, mask = inputs.get(IDS), inputs.get(PADDING)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{IDS} must be a LongTensor [samples, columns], as a processor makes it, not {_shown(ids)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(f"{PADDING} must have the shape of {IDS}, {tuple(ids.shape)}, not {_shown(mask)}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("the prompts are padded on the right, where generate() goes on: pad them on the left")
    if given := [role.what for role in (POSITIONS, EMBEDS) if role.read(inputs) is not None]:
        raise ValueError(f"leave {' and '.join(given)} out: verify takes a prompt as a processor makes it")
    if not any(len(visual_columns(parts, inputs, row)) for row in range(len(ids))):
        raise ValueError(
            f"the inputs hold no image: none of the placeholders {dict(parts.placeholders)} is in {IDS}. Give what the "
            "processor makes of a picture and a question"
        )


def longer_variant(parts: Parts, inputs: Inputs) -> dict[str, Any]:
    """The same prompt with its last text token said a few times more: in a batch its picture stands elsewhere."""
    width = inputs[IDS].shape[1]
    text = torch.ones(width, dtype=torch.bool)
    text[visual_columns(parts, inputs, 0).cpu()] = False
    last = int(text.nonzero()[-1]) if text.any() else width - 1
    order = torch.tensor([*range(width), *[last] * LONGER], device=inputs[IDS].device)
    return {name: value[:, order] if _aligned(value, inputs) else value for name, value in inputs.items()}


def without_images(parts: Parts, inputs: Inputs) -> dict[str, Any]:
    """The text of a prompt: from it nothing is dropped, so that the rows of a batch do not all lose as much."""
    stays = torch.ones(inputs[IDS].shape[1], dtype=torch.bool, device=inputs[IDS].device)
    stays[visual_columns(parts, inputs, 0)] = False
    return {name: value[:, stays] for name, value in inputs.items() if _aligned(value, inputs)}


def padded(parts: Parts, prompts: Sequence[Inputs]) -> dict[str, Any]:
    """Prompts of one sample each as one batch, padded on the left; pixels and their sizes one after another."""
    width = max(inputs[IDS].shape[1] for inputs in prompts)
    batch: dict[str, Any] = {}
    for name, first in {PADDING: None, **prompts[0]}.items():
        if name == PADDING or _aligned(first, prompts[0]):
            filler = pad_id(parts) if name == IDS else 0
            rows = [torch.ones_like(inputs[IDS]) if name not in inputs else inputs[name] for inputs in prompts]
            rows = [torch.nn.functional.pad(row, (width - row.shape[1], 0), value=filler) for row in rows]
            batch[name] = torch.cat(rows)
        elif isinstance(first, Tensor) and first.dim():
            batch[name] = torch.cat([inputs[name] for inputs in prompts if name in inputs])
        elif isinstance(first, list):
            batch[name] = [entry for inputs in prompts for entry in inputs.get(name, [])]
        else:
            batch[name] = first
    return batch


def pad_id(parts: Parts) -> int:
    """What prompts are padded with; 0 where the model does not say."""
    return pad_token_of(parts.root)


def _aligned(value: Any, inputs: Inputs) -> bool:
    """Whether there is an entry for every column of the prompt."""
    return isinstance(value, Tensor) and value.shape[:2] == inputs[IDS].shape


def _shown(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value).__name__)
