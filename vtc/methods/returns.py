"""What a method said, looked at before anything is dropped by it.

A wrong index would not raise anywhere: columns of the prompt would be counted as gone that are still there, and every
position behind them would be off. Types, shapes and numbers on the host are always looked at; values on a CPU always,
and on CUDA by an assertion that the device makes for itself, so that nobody waits, for methods that are not vtc's own.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.methods.base import Reduction, Stage
from vtc.places import Layer, Place
from vtc.signals import DecoderSignal
from vtc.tokens import Layout, VisualTokens, column
from vtc.values import shown

_OURS = ("vtc", "vtc_vllm")


def check_counts(
    method: object, counts: Any, limits: tuple[int, ...], layouts: Sequence[Layout]
) -> tuple[int, ...] | None:
    """What ``counts`` returned, as host integers: for each image at least 1, and at most what there is of it."""
    if counts is None:
        return None
    who = f"{_name(method)}.counts"
    found = _host(who, "counts", counts, len(layouts))
    for row, (k, n) in enumerate(zip(found, limits, strict=True)):
        if not min(1, n) <= k:
            raise ValueError(f"{who}: row {row} has {k}, not 1 to {n}, the tokens of that image")
    return tuple(map(min, found, limits))


def check_reduction(method: object, found: Any, budget: tuple[int, ...] | None, tokens: VisualTokens) -> Reduction:
    """What ``reduce`` returned: different places of tokens that are there, and values that fit.

    Args:
        method: whose.
        found: the result.
        budget: what was asked for, ``None`` where the method says how many.
        tokens: what it was given.

    Returns:
        The same with its counts written down.
    """
    who = f"{_name(method)}.reduce"
    if not isinstance(found, Reduction):
        hint = "; write Reduction(index)" if isinstance(found, Tensor) else ""
        raise ValueError(f"{who} returned {_kind(found)}, not a Reduction{hint}")
    if found.counts is None and budget is None:
        raise ValueError(f"{who} was given no budget and returned no counts; write Reduction(index, counts=...)")
    if found.counts is not None and budget is not None and tuple(found.counts) != budget:
        raise ValueError(f"{who} returned counts {shown(found.counts)} where the budget is {budget}")
    counts = budget if found.counts is None else _host(who, "counts", found.counts, len(tokens.layouts))
    assert counts is not None
    for row, (k, n) in enumerate(zip(counts, tokens.counts, strict=True)):
        if not 0 <= k <= n:
            raise ValueError(f"{who}: row {row} counts {k} of the {n} tokens that are there")
    _check_index(method, who, found.index, counts, tokens)
    if found.features is not None and not getattr(method, "merges", False):
        raise ValueError(f"{who} returned features, but merges is not set; write `merges = True` in {_name(method)}")
    wanted = (*found.index.shape, tokens.features.shape[-1])
    for what, tensor, shape in (("features", found.features, wanted), ("size", found.size, wanted[:2])):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            given = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else _kind(tensor)
            raise ValueError(f"{who} returned {what} as {given}, not floats of shape {shape}")
        _same_device(who, tensor, tokens.features)
    return replace(found, counts=counts)


def _check_index(method: object, who: str, picks: Any, counts: tuple[int, ...], tokens: VisualTokens) -> None:
    longest = max([0, *counts])
    wanted = f"a LongTensor ({len(counts)}, {longest}) of token indices"
    if not isinstance(picks, Tensor):
        raise ValueError(f"{who} returned an index of {_kind(picks)}, not {wanted}")
    if picks.dtype != torch.long:
        hint = "; of a mask, write Reduction.of_mask(mask, counts)" if picks.dtype == torch.bool else ""
        raise ValueError(f"{who} returned an index of {picks.dtype}, not {wanted}{hint}")
    if picks.ndim != 2 or picks.shape[0] != len(counts) or picks.shape[1] < longest:
        raise ValueError(
            f"{who} returned an index of shape {tuple(picks.shape)}, not ({len(counts)}, {longest}): a row for each "
            "image"
        )
    _same_device(who, picks, tokens.features)
    if not _looks(method, picks.device):
        return
    picks, alive = picks[:, :longest], tokens.mask
    n = alive.shape[1]
    ks = column(counts, picks.device)
    unread = torch.arange(longest, device=picks.device) >= ks
    place = picks.masked_fill(unread | (picks < 0) | (picks > n), n)  # n, the last column, is cut off
    taken = picks.new_zeros(len(counts), n + 1, dtype=torch.bool).scatter(1, place, True)[:, :-1] & alive

    def wrong(row: int) -> str:
        own, left = picks[row, : counts[row]].tolist(), set(alive[row].nonzero()[:, 0].tolist())
        odd = next((p for p in own if p not in left), None)
        what = f"keeps {odd}" if odd is not None else f"keeps {next(p for p in own if own.count(p) > 1)} twice"
        whole = left == set(range(len(left)))
        where = f"tokens 0 to {len(left) - 1}" if whole else f"{len(left)} tokens left"
        return f"row {row} {what}; its image has {where}, and {counts[row]} different ones were asked for"

    _require(taken.sum(1) == ks[:, 0], who, "indices must be different tokens that are there", wrong)


def check_scores(signal: object, scores: Any, real: Tensor) -> Tensor:
    """What a signal's ``score`` returned: a number for each column of ``real``, bool [B, L]."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != real.shape:
        found = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else _kind(scores)
        raise ValueError(f"{_name(signal)}.score returned {found}, not floats of shape {tuple(real.shape)}")
    return scores


def check_stages(method: object, stages: Any, depth: int) -> tuple[Stage, ...]:
    """What ``stages`` returned: places of a model with ``depth`` layers, each behind the one before."""
    who = f"{_name(method)}.stages"
    if not isinstance(stages, (tuple, list)) or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"{who} returned {_kind(stages)}, not a tuple of stages")
    for number, stage in enumerate(stages):
        at = stage.at
        if isinstance(at, Layer) and not 0 < at.after < depth:
            raise ValueError(
                f"{who}: stage {number} comes after layer {at.after}; stages must lie in [1, {depth - 1}] of this "
                f"model's {depth} layers"
            )
        if number and not stages[number - 1].at < at:
            raise ValueError(f"{who}: stage {number} is at {at}, not behind {stages[number - 1].at}; stages must rise")
        for signal in stage.needs:
            if isinstance(signal, DecoderSignal):
                _check_layers(f"{who}: stage {number}", signal, at)
    return tuple(replace(stage, number=number) for number, stage in enumerate(stages))


def _check_layers(who: str, signal: DecoderSignal, at: Place) -> None:
    if not isinstance(at, Layer):
        raise ValueError(f"{who} is at {at} and needs {signal}: the language model has not run there")
    last = max(signal.watched(), default=None)
    if last is not None and last >= at.after:
        raise ValueError(f"{who} reads modules of layer {last}, not of 0 to {at.after - 1}")
    if not 0 <= signal.layer <= at.after:
        raise ValueError(f"{who} reads layer {signal.layer}, not one of 0 to {at.after}")


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
