"""What tests that generate share: a model and its batch, a call of `generate`, and the inputs of a second turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zoo import GREEDY, Batch, get_model, make_batch


def prepared(family: str, **options: Any) -> tuple[Any, Batch]:
    model = get_model(family)
    model.set_attn_implementation("sdpa")
    return model, make_batch(family, **options)


def generate(model: Any, inputs: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**inputs, **(GREEDY | options))


def second_turn(batch: Batch, first: Tensor, new: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a second, text-only turn: from scratch (with the images), and for the cache of the first turn."""
    more = torch.randint(20, 200, (first.shape[0], new), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([first, more], dim=1)
    grown = ids.shape[1] - batch["input_ids"].shape[1]
    whole = dict(batch) | {"input_ids": ids}
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    whole["attention_mask"] = torch.nn.functional.pad(mask, (0, grown), value=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in batch:
            whole[name] = torch.nn.functional.pad(batch[name], (0, grown))
    text = {
        n: v for n, v in whole.items() if n in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    return whole, text
