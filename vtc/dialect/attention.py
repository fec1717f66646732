"""The insides of a decoder layer: its attention, its norm, its rotary embedding, and what it does with positions."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import modeling_layers

from vtc.dialect.arguments import HIDDEN, POSITIONS
from vtc.dialect.compilers import uncompiled
from vtc.dialect.towers import beside

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


def set_self_attention(layer: nn.Module, attention: nn.Module) -> None:
    """Put another one there."""
    layer.self_attn = attention


@dataclass(frozen=True)
class Recipe:
    """How one decoder layer makes queries and keys, as far as families and their layers differ.

    Attributes:
        norm: the child of the layer that hidden states pass before its attention sees them, ``None``: no child.
        rotated: how much of each head: ``all`` of it (or as much as the family's own function does), the ``first``
            features, as many as the embedding has, or ``none``.
        normalised: what the norm of queries and keys is given, where there is one: each head of a token (``heads``),
            the heads before their tokens (``outer``), all heads at once (``whole``), or what was rotated (``late``).
    """

    norm: str | None = "input_layernorm"
    rotated: Literal["all", "first", "none"] = "all"
    normalised: Literal["heads", "outer", "whole", "late"] = "heads"


def recipes(layer: nn.Module, entering: Tensor, entered: Tensor) -> Iterator[Recipe]:
    """Every recipe by which a layer might make of ``entering`` [B, T, d] what ``entered`` its attention."""
    attention = self_attention(layer)
    normalised = ("heads",) if _norm(attention, "q") is None else ("heads", "outer", "whole", "late")
    norms = _norms_between(layer, entering, entered)
    return itertools.starmap(Recipe, itertools.product(norms, ("all", "first", "none"), normalised))


def _norms_between(layer: nn.Module, entering: Tensor, entered: Tensor) -> Iterator[str | None]:
    if torch.equal(entering, entered):
        yield None
    for name, child in layer.named_children():
        with contextlib.suppress(Exception):  # what cannot be called with hidden states is no norm of theirs
            if torch.equal(child(entering), entered):
                yield name


def norm(layer: nn.Module, hidden: Tensor, recipe: Recipe) -> Tensor:
    """What a decoder layer does to hidden states before its attention sees them."""
    return hidden if recipe.norm is None else getattr(layer, recipe.norm)(hidden)


def has_projections(attention: nn.Module | None) -> bool:
    """Whether queries and keys have projections of their own."""
    return hasattr(attention, "q_proj") and hasattr(attention, "k_proj")


def project(attention: nn.Module, x: Tensor, rotary: Sequence[Tensor], side: str, recipe: Recipe) -> Tensor:
    """A decoder's queries (``side="q"``) or keys (``"k"``): [B, T, d] → [B, heads, T, dh].

    Args:
        attention: the layer's.
        x: what enters it.
        rotary: cos and sin, each [B, T, r]; nothing where the layer gets none.
        side: which.
        recipe: of the layer.
    """
    normalise = _norm(attention, side)

    def normalised(y: Tensor, where: str) -> Tensor:
        return y if normalise is None or recipe.normalised != where else normalise(y)

    y = normalised(getattr(attention, f"{side}_proj")(x), "whole")
    y = normalised(y.unflatten(-1, (-1, attention.head_dim)), "heads")
    y = normalised(y.transpose(1, 2), "outer")
    if (most := getattr(getattr(attention, "config", None), "clip_qkv", None)) is not None:
        y = y.clamp(-most, most)
    if side == "q" and (factor := getattr(attention, "qk_scale_factor", None)) is not None:
        y = y * factor
    if recipe.rotated != "none" and rotary:
        cos, sin = rotary
        y = _rotate(attention, y, cos, sin, whole=recipe.rotated == "all")
    return normalised(y, "late")


def _norm(attention: nn.Module | None, side: str) -> Callable[[Tensor], Tensor] | None:
    """The norm of queries or of keys, under one of the names that families have for it."""
    long = {"q": "query", "k": "key"}[side]
    names = (f"{side}_norm", f"{side}_layernorm", f"{long}_layernorm", "qk_norm")
    return next((found for name in names if callable(found := getattr(attention, name, None))), None)


def project_in_tower(attention: nn.Module, x: Tensor, side: str) -> Tensor:
    """The same of a vision tower, before any rotation; its norm (InternViT) runs over all heads."""
    if hasattr(attention, "qkv"):
        return _fused(attention, x)["qk".index(side)]
    y, normalise = getattr(attention, f"{side}_proj")(x), _norm(attention, side)
    return (y if normalise is None else normalise(y)).unflatten(-1, _heads(attention)).transpose(1, 2)


def attending_in_tower(attention: nn.Module, x: Tensor, rotary: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys of a vision tower as they meet: [B, T, d] → two of [B, heads, T, dh].

    Args:
        attention: of a layer.
        x: what enters it.
        rotary: cos and sin, each [T, r], where it turns them.
    """
    both = _fused(attention, x)[:2] if hasattr(attention, "qkv") else [project_in_tower(attention, x, s) for s in "qk"]
    query, key = both
    if not rotary:
        return query, key
    turn = beside(attention, "apply_rotary_pos_emb_vision", "apply_rotary_pos_emb")  # the other may be the decoder's
    turned = [turn(q, k, *rotary) for q, k in zip(query.transpose(1, 2), key.transpose(1, 2), strict=True)]
    query, key = (torch.stack(each).transpose(1, 2) for each in zip(*turned, strict=True))
    return query, key


def _fused(attention: Any, x: Tensor) -> Tensor:
    """[3, B, heads, T, dh] of the one projection that some have for queries, keys and values."""
    return attention.qkv(x).unflatten(-1, (3, *_heads(attention))).movedim(-3, 0).transpose(2, 3)


def _heads(attention: Any) -> tuple[int, int]:
    """To unflatten a projection with."""
    return (attention.num_heads, -1) if hasattr(attention, "num_heads") else (-1, attention.head_dim)


def _rotate(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, whole: bool) -> Tensor:
    """The family's own rotary embedding, found where its attention was defined."""
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    x, rest = (x, x[..., :0]) if whole else x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    # of pairs only one is wanted: keys of no head
    x = apply(x, x[:, :0], cos, sin)[0] if _rotates_pairs(apply) else apply(x, cos, sin)
    return x if whole else torch.cat([x, rest], dim=-1)


@functools.cache
def _rotates_pairs(apply: Callable[..., Any]) -> bool:
    """Whether it wants queries and keys together."""
    return {"q", "k"} <= inspect.signature(apply).parameters.keys()


def scale_by_position(attention: Any, query: Tensor, positions: Tensor | None) -> Tensor:
    """Queries [B, H, T, dh] after the rotary embedding, scaled by positions [B, T] as Ministral 3 does.

    The function stands where its attention was defined.
    """
    scale = getattr(sys.modules[type(attention).__module__], "get_llama_4_attn_scale", None)
    if scale is None or positions is None:
        return query
    rope = attention.config.rope_parameters
    factor = scale(positions, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return query * factor.to(query.dtype)


def scaling(attention: Any) -> float:
    """What a decoder's products of query and key are multiplied with."""
    return attention.scaling


def scaling_in_tower(attention: Any) -> float:
    """The same of a vision tower."""
    return attention.scale if hasattr(attention, "scale") else attention.scaling


def softcap(attention: nn.Module) -> float | None:
    """Where those products are capped by a tanh, at what."""
    return getattr(attention, "attn_logit_softcapping", None)


def is_causal(layer: nn.Module) -> bool:
    """Whether a layer's attention, given no mask, sees nothing that comes later."""
    return bool(getattr(self_attention(layer), "is_causal", True))


def head_width(layer: nn.Module) -> int | None:
    """How many features a head of a layer's attention has, where it tells."""
    return getattr(self_attention(layer), "head_dim", None)


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
    return attention is not None and _computes_with_positions(type(attention))  # type: ignore[arg-type]


def picks_blocks(layer: nn.Module) -> bool:
    """Whether an indexer in a layer's attention cuts the keys into blocks and finds a token's own by its position."""
    attention = self_attention(layer)
    children = [] if attention is None else attention.children()
    return any(hasattr(child, "block_size") and _computes_with_positions(type(child)) for child in children)  # type: ignore[arg-type]


@functools.cache
def _computes_with_positions(attention: Any) -> bool:
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
