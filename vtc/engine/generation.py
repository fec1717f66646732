"""The parts of ``generate`` that are methods, not modules: wrapped on the instance, and taken off again.

``prepare_inputs_for_generation`` builds 4-D masks for caches of fixed size before any hook runs, outside the compiled
graph; there the translation from logical to physical columns has to happen. Ways of generating that would cut an image
in two, or that replace the attention cache, are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.engine.context import FRAME, PREPARED_MASKS, is_bypassed
from vtc.engine.lengths import physical_length, slot_map


def preparing(prepare: Callable[..., Any], positions: str) -> Callable[..., Any]:
    """Wrap ``prepare_inputs_for_generation`` for caches of fixed size."""
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        named = bound.arguments
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        get = {**named, **named.get(extra, {})}.get
        cache = get("past_key_values")
        if is_bypassed() or not getattr(cache, "is_compileable", False):
            return prepare(*args, **kwargs)
        mask = logical = get("attention_mask")
        if (slots := slot_map(cache)) is not None:
            ids = get("input_ids") if get("inputs_embeds") is None else get("inputs_embeds")
            new = get("next_sequence_length") or ids.shape[1]
            mask = slots.physical_mask(mask, physical_length(cache) + new)
            if "attention_mask" in signature.parameters:
                named["attention_mask"] = mask
            else:
                named.setdefault(extra, {})["attention_mask"] = mask
        PREPARED_MASKS.set((logical, mask))
        inputs = prepare(*bound.args, **bound.kwargs)
        if slots is not None and positions == "compact" and inputs.get("position_ids") is not None:
            ids: Tensor = inputs["position_ids"]
            inputs["position_ids"] = ids - slots.dropped.to(ids.device)[:, None]
            inputs["position_ids"]._vtc_shifted = True
        return inputs

    return call


def prefilling(
    prefill: Callable[..., Any], placeholders: frozenset[int], later_turn: Callable[[], None]
) -> Callable[..., Any]:
    """Wrap ``_prefill``: refuse chunks, which hold parts of images; notice a later turn on a pruned cache."""

    @functools.wraps(prefill)
    def call(input_ids: Tensor, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        if slot_map(model_kwargs.get("past_key_values")) is not None and not is_bypassed():
            later_turn()
        size = getattr(generation_config, "prefill_chunk_size", None)
        if size is not None and not is_bypassed() and any((input_ids == token).any() for token in placeholders):
            raise NotImplementedError(
                f"prefill_chunk_size={size} would select within chunks, not within images. Prune before the prefill "
                "instead: model.generate(..., custom_generate=vtc.generate) (transformers with mm_encoder_outputs), "
                "or leave prefill_chunk_size out."
            )
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    return call


def never_compiled(*args: Any, **kwargs: Any) -> bool:
    """Stands in for ``_valid_auto_compile_criteria`` where layers store different lengths, which no graph expects."""
    return False


def no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """Stands in for ``generate_batch``."""
    raise NotImplementedError(
        "generate_batch (continuous batching) keeps a paged cache that does not know about dropped tokens; use "
        "generate(), or vtc.unpatch(model) first"
    )


def pruning_labels(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``loss_function``: labels lose the columns that the logits lost."""

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is not None and frame.compaction is not None:
            passed = frame.inside.history if frame.inside is not None else []
            shorten = (passed[-1] if passed else frame.compaction).labels
            shape = frame.compaction.keep.shape
            args = tuple(shorten(a) if _are_labels(a, shape) else a for a in args)
            kwargs = {name: shorten(v) if _are_labels(v, shape) else v for name, v in kwargs.items()}
        return loss(*args, **kwargs)

    return call


def _are_labels(value: Any, shape: torch.Size) -> bool:
    """Only labels are integer tensors as wide as the prompt; logits already have the short width."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.shape == shape
