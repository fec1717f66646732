"""Where the CLS token of a vision tower is among the visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtc.tokens import Layout


def keeps_cls(base: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the CLS feature itself becomes a visual token (``vision_feature_select_strategy="full"``)."""
    strategy = arguments.get("vision_feature_select_strategy")
    return (strategy or getattr(base.config, "vision_feature_select_strategy", "default")) == "full"


def one_to_one(values: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Each picture's patches are its tokens; where CLS is a token too it comes first and gets 0.

    Args:
        values: [pictures, patches] or [pictures, patches, c].
        layouts: of the pictures.
    """
    extra = layouts[0].length - values.shape[1] if layouts else 0
    return list(in_front(values, extra))


def in_front(values: Tensor, extra: int) -> Tensor:
    """Zeros for ``extra`` tokens in front of the patches [pictures, patches, ...].

    Raises:
        ValueError: there are fewer tokens than patches.
    """
    if extra < 0:
        patches = values.shape[1]
        raise ValueError(f"{patches} patches are not among {patches + extra} tokens: a projector made others of them")
    return nn.functional.pad(values, (*(0, 0) * (values.dim() - 2), extra, 0)) if extra else values
