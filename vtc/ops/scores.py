"""Scores of single tokens, and of crops: what the methods inside the language model rank by.

The torch code here is the reference; on a GPU the kernels in ``vtc.ops.kernels`` do the same in one read of the
inputs (attention rows: two). Through those no gradient flows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.ops.backend import backend
from vtc.ops.proof import proved

ROWS = 64  # attention rows computed at a time: memory is O(ROWS x keys) per head


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
        Float32 [B, L]. A row of zeros, or one whose float32 norm is not finite, has cosine 0, and weight 0 if it is
        that of ``before`` or not finite.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not bool.
    """
    if before.shape != after.shape or before.ndim != 3:
        raise ValueError(f"before {tuple(before.shape)} and after {tuple(after.shape)} must both be the same [B, L, d]")
    _check_bool("mask", mask, before.shape[:2])
    if backend(before.device) == "triton":
        from vtc.ops.kernels import transition

        a, b = transition.operands(before, after)
        if proved(before.device, lambda: transition.case(a, b, mask, absolute), variation_in_torch):
            return transition.transition_variation(a, b, mask, absolute)
    return variation_in_torch(before, after, mask, absolute)


def variation_in_torch(before: Tensor, after: Tensor, mask: Tensor | None, absolute: bool) -> Tensor:
    """:func:`transition_variation` in torch, for arguments that have been checked."""
    a, b = before.float(), after.float()
    norm_a, norm_b = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
    sound = torch.isfinite(norm_a + norm_b)
    if mask is not None:
        sound = sound & mask
    tiny = torch.finfo(torch.float32).tiny
    # a.b is at most |a||b|: it is finite where the norms are, and the first division leaves at most |b|
    cosine = (a * b).sum(-1) / norm_a.clamp_min(tiny) / norm_b.clamp_min(tiny)
    cosine = cosine.masked_fill(~sound, 0.0)
    turn = 1.0 - (cosine.abs() if absolute else cosine)
    weight = torch.exp(turn) if mask is None else torch.exp(turn) * mask
    share = weight / weight.sum(-1, keepdim=True).clamp_min(tiny)
    return torch.where(sound & (norm_a > 0), norm_b / norm_a.clamp_min(tiny), 0.0) * share


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
        TypeError: a mask that is not bool.
    """
    steps, length = query.shape[2], key.shape[2]
    counted = None if mask is None else mask[:, length - steps :]
    return row_attention(query, key, scale, counted=counted, mask=mask)[:, key_slice]


def row_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    position: Tensor | None = None,
    counted: Tensor | None = None,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
    window: int | None = None,
    cap: float | None = None,
    each: bool = False,
) -> Tensor:
    """Softmax attention of some rows to all keys, averaged over heads and rows.

    What :func:`instruction_attention` is made of, with all that a decoder layer may do to its logits.

    Args:
        query: float [B, H, T, dh], after RoPE.
        key: float [B, Hkv, L, dh], after RoPE; H is a multiple of Hkv.
        scale: factor of the logits.
        position: LongTensor [B, T], where each row stands among the keys: it sees none behind. ``None``: at the end.
        counted: bool [B, T], the rows to average over; ``None``: all of them. A sample without any gets zeros.
        mask: bool [B, L], False for padding, which is not attended to.
        allowed: bool [B, T, L], what a row may attend to besides (prefix-LM families, with ``position`` at the end).
        window: how many keys back a row sees, itself included; ``None``: all.
        cap: logits become ``cap * tanh(logit / cap)``; ``None``: they stay.
        each: average over heads only; there is no kernel for it.

    Returns:
        Float32 [B, L]; a row gives 0 to what it does not see. With ``each`` [B, T, L], zeros for rows not counted.

    Raises:
        ValueError: shapes that do not fit, a position that is not long.
        TypeError: a mask that is not bool.
    """
    (b, heads, steps, dh), (groups, length) = query.shape, key.shape[1:3]
    if key.shape[0] != b or key.shape[3] != dh or heads % groups or (position is None and steps > length):
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit")
    if position is not None and (position.dtype != torch.long or position.shape != (b, steps)):
        raise ValueError(f"position {tuple(position.shape)}, {position.dtype}, must be long {(b, steps)}")
    _check_bool("counted", counted, (b, steps))
    _check_bool("mask", mask, (b, length))
    _check_bool("allowed", allowed, (b, steps, length))
    if backend(query.device) == "triton" and not each:
        from vtc.ops.kernels import rows

        q, k = rows.operands(query, key)
        options = (position, counted, mask, allowed, window, cap)
        if proved(query.device, lambda: rows.case(q, k, *options), attention_in_torch):
            return rows.row_attention(q, k, scale, *options)
    return attention_in_torch(query, key, scale, position, counted, mask, allowed, window, cap, each)


def attention_in_torch(
    query: Tensor,
    key: Tensor,
    scale: float,
    position: Tensor | None,
    counted: Tensor | None,
    mask: Tensor | None,
    allowed: Tensor | None,
    window: int | None,
    cap: float | None,
    each: bool = False,
) -> Tensor:
    """:func:`row_attention` in torch, for arguments that have been checked."""
    (b, heads, steps, dh), (groups, length) = query.shape, key.shape[1:3]
    if position is None:
        position = torch.arange(length - steps, length, device=query.device).expand(b, -1)
    if counted is None:
        counted = query.new_ones(b, steps, dtype=torch.bool)
    q, k = query.float().masked_fill(~counted[:, None, :, None], 0.0), key.float()
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0.0)
    column = torch.arange(length, device=query.device)
    total, apart = q.new_zeros(b, length), []
    for first in range(0, steps, ROWS):
        some = slice(first, first + ROWS)
        at = position[:, some, None]
        seen = column <= at
        if window is not None:
            seen = seen & (column > at - window)
        if mask is not None:
            seen = seen & mask[:, None]
        if allowed is not None:
            seen = seen & allowed[:, some]
        with torch.autocast(query.device.type, enabled=False):
            grouped = q[:, :, some].reshape(b, groups, -1, dh)  # the query heads of a group share its keys
            logits = torch.matmul(grouped, k.mT).mul(scale).reshape(b, heads, -1, length)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = logits.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
        weights = logits.softmax(-1).mean(1).masked_fill(~(seen & counted[:, some, None]), 0.0)
        if each:
            apart.append(weights)
        else:
            total = total + weights.sum(1)
    if each:
        return torch.cat(apart, 1)
    return total / counted.sum(1, keepdim=True).clamp_min(1)


def _check_bool(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is None:
        return
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, not {tensor.dtype}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} {tuple(tensor.shape)} does not fit: {tuple(shape)} is expected")


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
