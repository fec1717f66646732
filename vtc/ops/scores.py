"""Scores of single tokens, and of crops: what the methods inside the language model rank by."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transition_variation(
    before: Tensor, after: Tensor, *, mask: Tensor | None = None, absolute: bool = False
) -> Tensor:
    """How much a module turns and stretches each token: TransPrune's module TTV (arXiv 2507.20630, section 3.2).

    ``|b| / |a|`` times the softmax over the sample's tokens of ``1 - cos(a, b)``. The released code normalises over
    the whole batch; here each sample has its own sum, so that a batch does not change it. The paper's ``1 - |cos|``
    is not what the code computes; ``absolute=True`` does.

    Args:
        before: a, float [B, L, d]: the module's input after its norm.
        after: b, float [B, L, d]: the module's output before the residual addition.
        mask: bool [B, L], False for padding: weight 0, and left out of the softmax.
        absolute: take ``|cos|``: turning a token round is then no change.

    Returns:
        Float32 [B, L]. A row of zeros or with entries that are not finite has cosine 0, and weight 0 if it is
        that of ``before`` or not finite.

    Raises:
        ValueError: shapes that do not fit.
    """
    if before.shape != after.shape or before.ndim != 3:
        raise ValueError(f"before {tuple(before.shape)} and after {tuple(after.shape)} must both be the same [B, L, d]")
    a, b = before.float(), after.float()
    norm_a, norm_b = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
    sound = torch.isfinite(norm_a) & torch.isfinite(norm_b)
    if mask is not None:
        sound = sound & mask
    a, b = (x.masked_fill(~sound[..., None], 0.0) for x in (a, b))
    norm_a, norm_b = (x.masked_fill(~sound, 0.0) for x in (norm_a, norm_b))
    tiny = torch.finfo(torch.float32).tiny
    cosine = (a / norm_a.clamp_min(tiny)[..., None] * (b / norm_b.clamp_min(tiny)[..., None])).sum(-1)
    turn = 1.0 - (cosine.abs() if absolute else cosine)
    weight = torch.exp(turn) if mask is None else torch.exp(turn) * mask
    share = weight / weight.sum(-1, keepdim=True).clamp_min(tiny)
    return torch.where(norm_a > 0, norm_b / norm_a.clamp_min(tiny), 0.0) * share


def instruction_attention(
    query: Tensor, key: Tensor, scale: float, key_slice: slice, *, mask: Tensor | None = None
) -> Tensor:
    """Attention the last T tokens pay to a run of keys, averaged over heads and rows, from q and k alone.

    TransPrune's instruction-guided attention (arXiv 2507.20630, section 3.3): the softmax runs over all keys, the run
    is cut out afterwards. Grouped-query attention is understood; the released code knows multi-head only.

    Args:
        query: float [B, H, T, dh], after RoPE: the last T of the L tokens, row t at position L - T + t.
        key: float [B, Hkv, L, dh], after RoPE; H is a multiple of Hkv.
        scale: factor of the logits, usually dh ** -0.5.
        key_slice: the n keys whose attention is wanted.
        mask: bool [B, L], False for padding: not attended to, and its query rows not counted.

    Returns:
        Float32 [B, n].

    Raises:
        ValueError: shapes that do not fit.
    """
    b, heads, t, dh = query.shape
    groups, length = key.shape[1], key.shape[2]
    if key.shape[0] != b or key.shape[3] != dh or heads % groups or t > length:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit")
    q, k = query.float(), key.float()
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0.0)
        q = q.masked_fill(~mask[:, None, length - t :, None], 0.0)
    logits = torch.matmul(q.reshape(b, groups, heads // groups * t, dh), k.mT).mul(scale)
    logits = logits.reshape(b, heads, t, length)
    position = torch.arange(length, device=query.device)
    hidden = position > position[length - t :, None]
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :]
    weights = logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)[..., key_slice].mean(1)
    if mask is None:
        return weights.mean(1)
    rows = mask[:, length - t :].to(weights.dtype)
    return (weights * rows[..., None]).sum(1) / rows.sum(1, keepdim=True).clamp_min(1.0)


def crop_budgets(scores: Tensor, grid: tuple[int, int], keep: float, tau: float = 10.0) -> Tensor:
    """The share of its tokens each crop keeps: GlobalCom² (arXiv 2501.05179, section 3.2).

    A crop's claim is the sum of the thumbnail scores over its region; with sigma the softmax of the claims at
    temperature tau, crop c keeps ``min(1, keep * (1 + sigma_c - mean sigma))``. What comes out depends on what goes
    in: the released code scores with the CLS *logits* averaged over heads, the paper words it as softmax attention,
    with which all crops get nearly the same.

    Args:
        scores: float [n * n], the square thumbnail in raster order.
        grid: (columns, rows) of the crops, each at most n. A remainder of n goes to the last column or row.
        keep: the share kept overall, in (0, 1].
        tau: temperature.

    Returns:
        Float64 [columns * rows], raster order.

    Raises:
        ValueError: a thumbnail that is not square, a grid finer than it, a keep outside (0, 1].
    """
    columns, rows = grid
    n = math.isqrt(scores.numel())
    if scores.ndim != 1 or n * n != scores.numel():
        raise ValueError(f"scores {tuple(scores.shape)} are not a square thumbnail in raster order, [n * n]")
    if not (1 <= columns <= n and 1 <= rows <= n):
        raise ValueError(f"grid={grid!r} (columns, rows) does not fit a thumbnail of {n} x {n}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep!r} must lie in (0, 1]")
    cell = torch.arange(n, device=scores.device)

    def member(parts: int) -> Tensor:  # [parts, n]: which rows (columns) of the thumbnail belong to which crop
        owner = (cell // (n // parts)).clamp_max(parts - 1)
        return (owner == torch.arange(parts, device=scores.device)[:, None]).double()

    claim = (member(rows) @ scores.detach().double().reshape(n, n) @ member(columns).mT).reshape(-1)
    return claimed_shares(claim, keep, tau)


def claimed_shares(claims: Tensor, keep: float, tau: float) -> Tensor:
    """The second half of :func:`crop_budgets`: claims float64 [C] to shares [C]."""
    weight = torch.exp((claims - claims.amax()) / tau)
    sigma = weight / (weight.sum() + 1e-8)
    return (keep * (1.0 + sigma - sigma.mean())).clamp_max(1.0)
