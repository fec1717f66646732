"""Vision towers with a CLS token, as CLIP and InternViT build them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtc.dialect.compilers import uncompiled
from vtc.tokens import Layout


def cls_attention(tower: nn.Module | None) -> nn.Module | None:
    """The self-attention of the last layer of a tower that has a CLS token, else ``None``.

    ToDRE and GlobalCom² read the last layer, although LLaVA takes its features from the one before.
    """
    tower = getattr(tower, "vision_model", tower)
    embeddings, encoder = getattr(tower, "embeddings", None), getattr(tower, "encoder", None)
    if getattr(embeddings, "class_embedding", None) is None and getattr(embeddings, "cls_token", None) is None:
        return None
    layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
    if not layers:
        return None
    last = uncompiled(layers[-1])
    attention = uncompiled(getattr(last, "self_attn", getattr(last, "attention", None)))
    return attention if hasattr(attention, "q_proj") and hasattr(attention, "k_proj") else None


def keeps_cls(base: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the CLS feature itself becomes a visual token (``vision_feature_select_strategy="full"``)."""
    strategy = arguments.get("vision_feature_select_strategy")
    return (strategy or getattr(base.config, "vision_feature_select_strategy", "default")) == "full"


def one_to_one(rows: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Each picture's patches are its tokens; where CLS is a token too it comes first and scores 0."""
    extra = layouts[0].length - rows.shape[1] if layouts else 0
    return list(nn.functional.pad(rows, (extra, 0)))
