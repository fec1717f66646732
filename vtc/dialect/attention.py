"""The insides of a decoder layer: its attention, its norm, its rotary embedding, and what it does with positions."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import modeling_layers

from vtc.dialect.arguments import HIDDEN, POSITIONS
from vtc.dialect.compilers import uncompiled

# Newer releases checkpoint a layer's forward and leave the hooks outside; older ones its __call__.
CHECKPOINTS_HOOKS = "__call__" in modeling_layers.GradientCheckpointingLayer.__dict__

_INTERFACE = "attention_interface"
"""What attention modules call the backend; it takes positions only to tell packed samples apart."""


def self_attention(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's attention."""
    return uncompiled(getattr(layer, "self_attn", None))


def mlp(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's feed-forward network."""
    return uncompiled(getattr(layer, "mlp", None))


def norm(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What a decoder layer does to hidden states before its attention sees them."""
    return layer.input_layernorm(hidden)


def has_projections(attention: nn.Module | None) -> bool:
    """Whether queries and keys have projections of their own."""
    return hasattr(attention, "q_proj") and hasattr(attention, "k_proj")


def project(attention: nn.Module, x: Tensor, side: str) -> Tensor:
    """A decoder's queries (``side="q"``) or keys (``"k"``) before the rotary embedding: [B, T, d] → [B, heads, T, dh].

    Normalised where the family does that, head by head.
    """
    y = getattr(attention, f"{side}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    normalise = getattr(attention, f"{side}_norm", None)
    return (y if normalise is None else normalise(y)).transpose(1, 2)


def project_in_tower(attention: nn.Module, x: Tensor, side: str) -> Tensor:
    """The same of a vision tower, whose norm (InternViT) runs over all heads."""
    y = getattr(attention, f"{side}_proj")(x)
    normalise = getattr(attention, f"{side}_norm", None)
    return (y if normalise is None else normalise(y)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def rotate(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The family's own rotary embedding, found where its attention was defined."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if _rotates_pairs(apply):
        return apply(x, x[:, :0], cos, sin)[0]  # keys of no head: only one of the two is wanted
    return apply(x, cos, sin)


@functools.cache
def _rotates_pairs(apply: Callable[..., Any]) -> bool:
    """Whether it wants queries and keys together."""
    return {"q", "k"} <= inspect.signature(apply).parameters.keys()


def scale_by_position(attention: nn.Module, query: Tensor, positions: Tensor | None) -> Tensor:
    """Queries [B, H, T, dh] after the rotary embedding, scaled by positions [B, T] as Ministral 3 does.

    The function stands where its attention was defined.
    """
    scale = getattr(sys.modules[type(attention).__module__], "get_llama_4_attn_scale", None)
    if scale is None or positions is None:
        return query
    rope = attention.config.rope_parameters
    factor = scale(positions, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return query * factor.to(query.dtype)


def scaling(attention: nn.Module) -> float:
    """What a decoder's products of query and key are multiplied with."""
    return attention.scaling


def scaling_in_tower(attention: nn.Module) -> float:
    """The same of a vision tower."""
    return attention.scale


def softcap(attention: nn.Module) -> float | None:
    """Where those products are capped by a tanh, at what."""
    return getattr(attention, "attn_logit_softcapping", None)


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What enters a layer, an attention or a feed-forward network: first by position, or by name."""
    return args[0] if args else HIDDEN.read(kwargs)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether training will run this layer a second time, for the gradients."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def reads_positions(layer: nn.Module) -> bool:
    """Whether a decoder layer computes with position ids (rotary embeddings are made before the layers).

    Passing them on to the backend does not count. Where that cannot be told, the answer is yes: it costs flash
    attention some time, and nothing else.
    """
    attention = self_attention(layer)
    return attention is not None and _computes_with_positions(type(attention))


@functools.cache
def _computes_with_positions(attention: type[nn.Module]) -> bool:
    spelled = set(POSITIONS.names)
    if not spelled & inspect.signature(attention.forward).parameters.keys():
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(attention.forward))))
    except (OSError, SyntaxError):
        return True
    passed = {
        id(value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == _INTERFACE
        for value in [*call.args, *(keyword.value for keyword in call.keywords)]
    }
    return any(isinstance(n, ast.Name) and n.id in spelled and id(n) not in passed for n in ast.walk(tree))
