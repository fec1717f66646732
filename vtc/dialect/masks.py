"""Mask builders, and what a config says of each layer's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import masking_utils

from vtc.dialect.arguments import CACHE, EMBEDS, MASK, POSITIONS, Spelling


@functools.cache
def _builder(name: str) -> tuple[Callable[..., Any], Spelling]:
    build = getattr(masking_utils, name)
    return build, Spelling(build, f"transformers.masking_utils.{name}", (EMBEDS, MASK, CACHE, POSITIONS))


def check() -> None:
    """Look for the builders.

    Raises:
        UnsupportedModelError: they want arguments that vtc does not know.
    """
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        _builder(name)


def causal_mask(
    config: Any, layer: int, hidden: Tensor, padding: Tensor | None, cache: Any, positions: Tensor | None = None
) -> Any:
    """What transformers would build for one layer if its cache were all there is.

    Args:
        config: the decoder's.
        layer: its index.
        hidden: [B, M, d], what enters it.
        padding: bool [B, past + M], what is no padding; ``None``: nothing is.
        cache: the cache of the call, or ``None``.
        positions: position ids [B or 1, M] where samples that restart in them are packed into one row.
    """
    sliding = window_of(config, layer) is not None
    build, spelling = _builder("create_sliding_window_causal_mask" if sliding else "create_causal_mask")
    call = spelling.bind((), {"config": config, "layer_idx": layer})
    call[EMBEDS], call[MASK], call[CACHE], call[POSITIONS] = hidden, padding, cache, positions
    return build(**call.named)


def attention_kinds(config: Any) -> list[str] | None:
    """The kind of attention of each layer, ``None`` where the config does not tell kinds apart."""
    return getattr(config, "layer_types", None)


def layer_type(config: Any, index: int) -> str | None:
    """The kind of attention of one layer, where the config tells."""
    types = attention_kinds(config)
    return None if types is None else types[index]


def window_of(config: Any, index: int) -> int | None:
    """How far a layer looks back, ``None`` if all the way."""
    window = getattr(config, "sliding_window", None)
    kind = layer_type(config, index)
    return window if kind is None or "sliding" in kind else None


def set_window(config: Any, window: int) -> None:
    """Let those layers of a config that have a window look back no further than this."""
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = window


def last_layer_before_reuse(config: Any, depth: int) -> int | None:
    """Where the last layers reuse keys of earlier ones: the last layer up to which none of those keys was made.

    ``None`` where every layer makes its own.
    """
    if not (shared := shared_layers(config)):
        return None
    own = (attention_kinds(config) or [])[: depth - shared]
    return min(len(own) - 1 - own[::-1].index(kind) for kind in set(own))


def shared_layers(config: Any) -> int:
    """How many of the last layers reuse keys."""
    return getattr(config, "num_kv_shared_layers", 0) or 0
