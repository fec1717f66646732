"""What calibrated attention adds to its logits: RESTORE (ICML 2026), equations 3, 4 and 9."""

from __future__ import annotations

import torch
from torch import Tensor


def size_bias(size: Tensor) -> Tensor:
    """The logarithm of s: a key that stands for s tokens weighs as much as s equal keys would.

    Args:
        size: float [...], how many tokens each place stands for.

    Returns:
        float32 [...]; 0 where no token stands (holes, padding).
    """
    size = size.float()
    return torch.where(size > 0, size, 1.0).log()


def turns(cos: Tensor, sin: Tensor) -> Tensor:
    """How the rotary embedding turns each token, as unit vectors.

    The product of two is D, the mean cosine of the angles between them over all frequencies. With multimodal RoPE each
    frequency turns by the axis that is its own, so that the product is the weighted sum over axes of equation 9.

    Args:
        cos: float [..., r], as the rotary embedding gives it, scaled or not.
        sin: the same.

    Returns:
        float32 [..., 2r].
    """
    return torch.nn.functional.normalize(torch.cat([cos.float(), sin.float()], dim=-1), dim=-1)


def distance_bias(rows: Tensor, keys: Tensor, c: float = 2.0) -> Tensor:
    """The logarithm of c - D: what rotary embeddings take from far keys is given back.

    Args:
        rows: float [..., T, 2r], how queries are turned (see :func:`turns`).
        keys: float [..., L, 2r], how keys are.
        c: of the paper. With 2 a key at the query's own place is given nothing.

    Returns:
        float32 [..., T, L].
    """
    with torch.autocast(rows.device.type, enabled=False):
        like = rows.float() @ keys.float().mT
    return (c - like.clamp(max=1.0)).log()
