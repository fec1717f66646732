"""What a method returned, looked at before anything is dropped by it.

A wrong index would not raise anywhere: columns of the prompt would be counted as gone that are still there, and every
position behind them would be off. Types, shapes and numbers on the host are always looked at; values on a CPU always,
and on CUDA by an assertion that the device makes for itself, so that nobody waits, for methods that are not vtc's own.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.tokens import column

_OURS = ("vtc", "vtc_vllm")


def check_budget(method: object, budget: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """What ``budget`` returned, as host integers: for each image at least 1 and at most all of its tokens."""
    counts = _host(f"{_name(method)}.budget", "budgets", budget, len(lengths))
    for row, (k, n) in enumerate(zip(counts, lengths, strict=True)):
        if not min(1, n) <= k <= n:
            raise ValueError(f"{_name(method)}.budget: row {row} has {k}, not 1 to {n}, the tokens of that image")
    return counts


def check_picks(method: object, picks: Any, budget: tuple[int, ...], lengths: tuple[int, ...], like: Tensor) -> None:
    """What ``select`` returned: ``budget[g]`` different indices of [0, ``lengths[g]``) at the head of row g.

    Args:
        method: whose.
        picks: the result.
        budget: of each image.
        lengths: its tokens.
        like: a tensor on the device where the picks have to be.
    """
    who = f"{_name(method)}.select"
    wanted = f"a LongTensor ({len(budget)}, {max(budget)}) of token indices"
    if not isinstance(picks, Tensor):
        raise ValueError(f"{who} returned {_kind(picks)}, not {wanted}")
    if picks.dtype != torch.long:
        hint = "; of a mask, the indices are mask.nonzero()" if picks.dtype == torch.bool else ""
        raise ValueError(f"{who} returned picks of {picks.dtype}, not {wanted}{hint}")
    if picks.ndim != 2 or picks.shape[0] != len(budget) or picks.shape[1] < max(budget):
        raise ValueError(
            f"{who} returned picks of shape {tuple(picks.shape)}, not ({len(budget)}, {max(budget)}): a row for each "
            "image"
        )
    _same_device(who, picks, like)
    if not _looks(method, picks.device):
        return
    picks = picks[:, : max(budget)]
    ks, ns = column(budget, picks.device), column(lengths, picks.device)
    read = torch.arange(picks.shape[1], device=picks.device) < ks
    outside = read & ((picks < 0) | (picks >= ns))
    seen = picks.new_zeros(len(budget), max(lengths) + 1, dtype=torch.bool)  # the last column takes what is not read
    seen = seen.scatter(1, picks.masked_fill(~read | outside, max(lengths)), True)[:, :-1]

    def wrong(row: int) -> str:
        own, n = picks[row, : budget[row]].tolist(), lengths[row]
        odd = next((p for p in own if not 0 <= p < n), None)
        what = f"picks {odd}" if odd is not None else f"picks {next(p for p in own if own.count(p) > 1)} twice"
        return f"row {row} {what}; its image has tokens 0 to {n - 1}, and {budget[row]} different ones were asked for"

    _require(seen.sum(1) == ks[:, 0], who, "indices must be different tokens of their image", wrong)


def check_kept(
    method: object, call: str, result: Any, allowed: Tensor, limits: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """What ``keep_inside``, ``choose`` or ``keep_mask`` returned: a mask and the counts of its rows, as they are used.

    Args:
        method: whose.
        call: which of them.
        result: the result.
        allowed: bool [G, N], the tokens that there are.
        limits: how many those are (host integers).
    """
    who = f"{_name(method)}.{call}"
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{who} returned {_kind(result)}, not (bool {tuple(allowed.shape)}, counts)")
    mask, counts = result
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != allowed.shape:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else _kind(mask)
        raise ValueError(f"{who} returned {found}, not a bool mask of shape {tuple(allowed.shape)}")
    _same_device(who, mask, allowed)
    counts = _host(who, "counts", counts, len(limits))
    for row, (k, n) in enumerate(zip(counts, limits, strict=True)):
        if not 0 <= k <= n:
            raise ValueError(f"{who}: row {row} counts {k} of the {n} tokens that are there")
    if not _looks(method, mask.device):
        return mask, counts

    def wrong(row: int) -> str:
        if dead := int((mask & ~allowed)[row].sum()):
            return f"row {row} keeps {dead} tokens that are not there"
        return f"row {row} keeps {int(mask[row].sum())}, counts {counts[row]}"

    right = (mask.sum(1) == column(counts, mask.device)[:, 0]) & ~(mask & ~allowed).any(1)
    _require(right, who, "a mask must be a subset of what is there, and the counts be its own", wrong)
    return mask, counts


def check_scores(method: object, scores: Any, real: Tensor) -> Tensor:
    """What ``transition`` returned: a number for each column of ``real``, bool [B, L]."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != real.shape:
        found = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else _kind(scores)
        raise ValueError(f"{_name(method)}.transition returned {found}, not floats of shape {tuple(real.shape)}")
    return scores


def check_stages(method: object, stages: Any, depth: int) -> None:
    """What ``stages`` returned: places inside a model of ``depth`` layers, by rising layer."""
    who = f"{_name(method)}.stages"
    if not isinstance(stages, (tuple, list)):
        raise ValueError(f"{who} returned {_kind(stages)}, not a tuple of stages")
    at = 0
    for number, stage in enumerate(stages):
        if not at < stage.after < depth:
            raise ValueError(
                f"{who}: stage {number} comes after layer {stage.after}; stages must rise, and lie in [1, {depth - 1}] "
                f"of this model's {depth} layers"
            )
        at = stage.after
        if stage.attention is not None and not 0 <= stage.attention <= at:
            raise ValueError(f"{who}: stage {number} reads the attention of layer {stage.attention}, not of 0 to {at}")
        if odd := [layer for layer in stage.transitions if not 0 <= layer < at]:
            raise ValueError(f"{who}: stage {number} reads transitions of layer {odd[0]}, not of 0 to {at - 1}")


# ------------------------------------------------------------------------------------------------------------- helpers


def _name(method: object) -> str:
    return type(method).__name__


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _host(who: str, what: str, values: Any, rows: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != rows:
        size = f" of {len(values)}" if isinstance(values, Sequence) else ""
        raise ValueError(f"{who} returned {what} as {_kind(values)}{size}, not a tuple of {rows} integers")
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{who}: row {row} of its {what} is {_kind(value)}, not an integer on the host")
    return tuple(map(int, values))


def _same_device(who: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{who} returned a tensor on {tensor.device}; the tokens are on {like.device}")


def _looks(method: object, device: torch.device) -> bool:
    """Whether values are looked at: on a CPU always, elsewhere those of methods that are not vtc's own."""
    ours = type(method).__module__.partition(".")[0] in _OURS
    free = device.type == "cpu" and not torch.compiler.is_compiling()
    return device.type != "meta" and (free or not ours)


def _require(right: Tensor, who: str, rule: str, wrong: Callable[[int], str]) -> None:
    """Raise where bool [G] ``right`` is False; on CUDA and in a graph the device asserts it, and nobody waits."""
    if right.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(right.all(), f"{who}: {rule}")
        return
    if (rows := right.tolist()) and not all(rows):
        raise ValueError(f"{who}: {wrong(rows.index(False))}")
