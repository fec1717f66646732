"""The parts of ``generate`` that are methods, not modules: wrapped on the instance, and taken off again.

What prepares the inputs of a step builds 4-D masks for caches of fixed size before any hook runs, outside the compiled
graph; there the translation from logical to physical columns has to happen. Ways of generating that would cut an image
in two, or that replace the attention cache, are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.dialect.arguments import CACHE, EMBEDS, IDS, MASK, NEW_LENGTH, POSITIONS, Spelling
from vtc.dialect.caches import has_fixed_size, physical_length
from vtc.dialect.compilers import never_alone
from vtc.dialect.generation import PREFILL, chunk_size
from vtc.engine.compiled import between_graphs
from vtc.engine.context import Prepared, change, current, running_call
from vtc.engine.lengths import slot_map


def preparing(prepare: Callable[..., Any], positions: str) -> Callable[..., Any]:
    """Wrap what prepares the inputs of a step, for caches of fixed size."""
    spelling = Spelling(prepare, "the method that prepares the inputs of a step", (IDS,))

    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = spelling.bind(args, kwargs)
        cache = given[CACHE]
        if current().bypassed or not has_fixed_size(cache):
            return prepare(*args, **kwargs)
        mask = logical = given[MASK]
        if (slots := slot_map(cache)) is not None:
            ids = given[IDS] if given[EMBEDS] is None else given[EMBEDS]
            new = given[NEW_LENGTH] or ids.shape[1]
            given[MASK] = mask = slots.physical_mask(mask, physical_length(cache) + new)
        inputs = prepare(**given.named)
        ids, shifted = POSITIONS.read(inputs), None
        if slots is not None and positions == "compact" and ids is not None:
            shifted = ids - slots.dropped.to(ids.device)[:, None]
            inputs |= {name: shifted for name in POSITIONS.names if name in inputs}
        change(prepared=Prepared(logical, mask, cache, shifted))
        return inputs

    return call


def prefilling(
    prefill: Callable[..., Any], placeholders: frozenset[int], later_turn: Callable[[], None]
) -> Callable[..., Any]:
    """Wrap what runs the prompt: refuse chunks, which hold parts of images; notice a later turn on a pruned cache."""

    @functools.wraps(prefill)
    def call(*args: Any, **kwargs: Any) -> Any:
        ids, generation_config, model_kwargs = PREFILL.read(prefill, args, kwargs)
        if slot_map(CACHE.read(model_kwargs)) is not None and not current().bypassed:
            later_turn()
        size = chunk_size(generation_config)
        if size is not None and not current().bypassed and any((ids == token).any() for token in placeholders):
            raise NotImplementedError(
                f"prefill_chunk_size={size} would select within chunks, not within images. Prune before the prefill "
                "instead: model.generate(..., custom_generate=vtc.generate) (transformers with mm_encoder_outputs), "
                "or leave prefill_chunk_size out."
            )
        return prefill(*args, **kwargs)

    return call


def never_compiled(*args: Any, **kwargs: Any) -> bool:
    """Stands in for what decides on compiling decode steps: no graph expects layers that store different lengths, or
    that get masks of their own.
    """
    return False


def no_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """Stands in for what generates from a paged cache."""
    raise NotImplementedError(
        "generate_batch (continuous batching) keeps a paged cache that does not know about dropped tokens; use "
        "generate(), or vtc.unpatch(model) first"
    )


def pruning_labels(loss: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """Wrap the loss: labels lose the columns that the logits lost."""

    @between_graphs
    def shortened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        running = running_call(owner)
        if running is not None and running.compaction is not None and running.left is not None:
            shorten = running.left.labels
            shape = running.compaction.keep.shape
            args = tuple(shorten(a) if _are_labels(a, shape) else a for a in args)
            kwargs = {name: shorten(v) if _are_labels(v, shape) else v for name, v in kwargs.items()}
        return args, kwargs

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = shortened(args, kwargs)
        return loss(*args, **kwargs)

    never_alone(call)
    return call


def _are_labels(value: Any, shape: torch.Size) -> bool:
    """Only labels are integer tensors as wide as the prompt; logits already have the short width."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.shape == shape
