"""Attention of some rows to all keys, averaged over heads and rows; no rows x keys matrix is ever stored.

A mean over rows of softmaxes needs every row's normaliser before the first weight, so the keys are read twice. Three
launches: ``normalisers`` gives each row's maximum and sum over chunks of keys; ``weights`` puts the chunks together,
computes the logits again and sums the weights over the rows of one key head; ``mean`` adds the heads up and divides.
Query heads that share a key head are rows of the same tile, so grouped keys are read once for all of them.

There are no atomics, and how the work is cut depends on lengths and never on the batch: a sample's result is the same
bits next to any others. Keys that pad it on the right change nothing either, as long as there are at most 8192.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.ops.backend import interpreted, launching
from vtc.ops.cpu import exact_float32
from vtc.ops.kernels.layout import is_even, laid_out, noise
from vtc.ops.kernels.variant import Variant
from vtc.ops.proof import Case

CHUNKS = tl.constexpr(16)  # of keys at most: a row's partial normalisers fit in one thread's registers
CHUNK = 512  # keys at least: six chunks x 32 heads fill a big GPU with the 2944 keys of one picture
STRIDES = ("query_b", "query_h", "query_t", "key_b", "key_h", "key_l", "allowed_b", "allowed_t")
INTERPRETED = tl.constexpr(interpreted())
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = (3e-5, 1e-7)  # sums of float32 in another order than torch's
KEYS_TRIED = 100  # of the small job that tries the launches


@triton.jit
def _logits(query, key, row_at, key_at, row_there, key_there, scale, cap, DH: tl.constexpr, WIDTH: tl.constexpr):
    """Float32 [rows, keys], in units of log 2: exp2 is what the hardware has."""
    total = tl.zeros((row_at.shape[0], key_at.shape[0]), tl.float32)
    for start in tl.static_range(0, DH, WIDTH):
        d = start + tl.arange(0, WIDTH)
        q = tl.load(query + row_at[:, None] + d[None, :], row_there[:, None] & (d < DH)[None, :], 0.0)
        k = tl.load(key + key_at[None, :] + d[:, None], key_there[None, :] & (d < DH)[:, None], 0.0)
        if INTERPRETED:  # which multiplies the bit patterns of bf16; products of bf16 and fp16 are exact in float32
            q, k = q.to(tl.float32), k.to(tl.float32)
        # float32 stays float32: TF32 would put errors of 1e-3 into the logits of those who asked for full precision
        total = tl.dot(q, k, total, input_precision="ieee")
    total *= scale
    if cap is not None:
        total = cap * (2.0 * tl.sigmoid(total) - 1.0)  # tanh(x) = 2 sigmoid(2 x) - 1, its factors folded by the host
    return total


@triton.jit
def _seen(
    sample, step, row_there, column, position, mask, allowed, allowed_b, allowed_t, window, steps, length
):  # fmt: skip
    """Bool [rows, keys]: what each row looks at. Selected with, never multiplied by: padding may hold NaN."""
    at = length - steps + step
    if position is not None:
        at = tl.load(position + sample * steps + step, row_there, 0)
    seen = row_there[:, None] & (column < length)[None, :] & (column[None, :] <= at[:, None])
    if window is not None:
        seen = seen & (column[None, :] > (at - window)[:, None])
    if mask is not None:
        seen = seen & tl.load(mask + sample * length + column, column < length, 0).to(tl.int1)[None, :]
    if allowed is not None:
        cell = sample * allowed_b + step[:, None] * allowed_t + column[None, :]
        seen = seen & tl.load(allowed + cell, seen, 0).to(tl.int1)
    return seen


@triton.jit(do_not_specialize=[*STRIDES, "steps", "length", "chunk", "window"])
def normalisers(
    query, key, position, mask, allowed, peaks, sums,
    query_b, query_h, query_t, key_b, key_h, key_l, allowed_b, allowed_t,
    groups, steps, length, chunk, window, scale, cap,
    SHARE: tl.constexpr, DH: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Each row's largest logit and sum of exponentials over one chunk of keys."""
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    sample, group = head // groups, head % groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    step, row_there = row % steps, row < SHARE * steps
    row_at = (sample * query_b + (group * SHARE + row // steps) * query_h + step * query_t) * UNIT
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(part * chunk, min(part * chunk + chunk, length), KEYS):
        column = first + tl.arange(0, KEYS)
        key_at = (sample * key_b + group * key_h + column.to(tl.int64) * key_l) * UNIT
        logits = _logits(query, key, row_at, key_at, row_there, column < length, scale, cap, DH, WIDTH)
        seen = _seen(
            sample, step, row_there, column, position, mask, allowed, allowed_b, allowed_t, window, steps, length
        )  # fmt: skip
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet: exp2(-inf) = 0
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = higher
    slot = (head * SHARE * steps + row) * CHUNKS + part
    tl.store(peaks + slot, peak, row_there)
    tl.store(sums + slot, total, row_there)


@triton.jit(do_not_specialize=[*STRIDES, "steps", "length", "chunks", "window"])
def weights(
    query, key, position, mask, counted, allowed, peaks, sums, parts,
    query_b, query_h, query_t, key_b, key_h, key_l, allowed_b, allowed_t,
    groups, steps, length, chunks, window, scale, cap,
    SHARE: tl.constexpr, DH: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The weights of a block of keys, summed over the counted rows of one key head."""
    head = tl.program_id(1).to(tl.int64)
    sample, group = head // groups, head % groups
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key_at = (sample * key_b + group * key_h + column.to(tl.int64) * key_l) * UNIT
    chunk = tl.arange(0, CHUNKS)
    total = tl.zeros((KEYS,), tl.float32)
    for first in range(0, SHARE * steps, ROWS):
        row = first + tl.arange(0, ROWS)
        step, row_there = row % steps, row < SHARE * steps
        row_at = (sample * query_b + (group * SHARE + row // steps) * query_h + step * query_t) * UNIT
        if counted is not None:
            row_there = row_there & tl.load(counted + sample * steps + step, row_there, 0).to(tl.int1)
        slot = (head * SHARE * steps + row)[:, None] * CHUNKS + chunk[None, :]
        written = row_there[:, None] & (chunk < chunks)[None, :]
        peak = tl.load(peaks + slot, written, float("-inf"))
        highest = tl.max(peak, 1)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        whole = tl.sum(tl.load(sums + slot, written, 0.0) * tl.exp2(peak - base[:, None]), 1)
        logits = _logits(query, key, row_at, key_at, row_there, column < length, scale, cap, DH, WIDTH)
        seen = _seen(
            sample, step, row_there, column, position, mask, allowed, allowed_b, allowed_t, window, steps, length
        )  # fmt: skip
        weight = tl.exp2(logits - base[:, None]) / whole[:, None]
        total += tl.sum(tl.where(seen, weight, 0.0), 0)
    tl.store(parts + head * length + column, total, column < length)


@triton.jit(do_not_specialize=["steps", "length"])
def mean(parts, counted, out, groups, steps, length, SHARE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """The sum over key heads, divided by heads and rows."""
    sample = tl.program_id(1).to(tl.int64)
    column, head = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, HEADS)
    there = (head < groups)[:, None] & (column < length)[None, :]
    total = tl.sum(tl.load(parts + (sample * groups + head)[:, None] * length + column[None, :], there, 0.0), 0)
    rows = steps
    if counted is not None:
        rows = 0
        for first in range(0, steps, 1024):
            step = first + tl.arange(0, 1024)
            rows += tl.sum(tl.load(counted + sample * steps + step, step < steps, 0).to(tl.int32))
        rows = max(rows, 1)
    tl.store(out + sample * length + column, total / (rows * groups * SHARE).to(tl.float32), column < length)


def operands(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors as the kernels take them: of one float type that they know, rows in one piece."""
    if query.dtype != key.dtype or query.dtype not in FLOATS:
        query, key = query.float(), key.float()
    query, key = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (query, key))
    return query, key


def row_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    position: Tensor | None,
    counted: Tensor | None,
    mask: Tensor | None,
    allowed: Tensor | None,
    window: int | None,
    cap: float | None,
    least: int | None = None,
) -> Tensor:
    """:func:`vtc.ops.scores.row_attention`, whose arguments these are, checked; the tensors from :func:`operands`.

    ``least`` keys are in a chunk, by default CHUNK; no constant depends on it, so few keys can try more than one.
    """
    position, counted, mask = (None if x is None else x.contiguous() for x in (position, counted, mask))
    if allowed is not None and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    (b, heads, steps, dh), (groups, length) = query.shape, key.shape[1:3]
    out = query.new_empty(b, length, dtype=torch.float32)
    if not out.numel() or not steps or not heads:
        return out.zero_()
    share = heads // groups
    chunk = max(least or CHUNK, triton.next_power_of_2(triton.cdiv(length, CHUNKS.value)))
    chunks = triton.cdiv(length, chunk)
    peaks = query.new_empty(2, b * heads * steps, CHUNKS.value, dtype=torch.float32)
    parts = query.new_empty(b * groups, length, dtype=torch.float32)
    strides = (*query.stride()[:3], *key.stride()[:3])
    unit = _unit(query, key)
    constants, options = _tiles(query.dtype, dh, share * steps, unit)
    strides = (*(stride // unit for stride in strides), *((0, 0) if allowed is None else allowed.stride()[:2]))
    factor = scale * math.log2(math.e) if cap is None else 2.0 * scale / cap
    limit = None if cap is None else cap * math.log2(math.e)
    blocks = (triton.cdiv(share * steps, constants["ROWS"]), chunks, b * groups)
    adding, adding_options = _adding(groups)
    with launching(query.device):
        normalisers[blocks](
            query, key, position, mask, allowed, peaks[0], peaks[1], *strides,
            groups, steps, length, chunk, window, factor, limit, SHARE=share, **constants, **options,
        )  # fmt: skip
        weights[triton.cdiv(length, constants["KEYS"]), b * groups](
            query, key, position, mask, counted, allowed, peaks[0], peaks[1], parts, *strides,
            groups, steps, length, chunks, window, factor, limit, SHARE=share, **constants, **options,
        )  # fmt: skip
        mean[triton.cdiv(length, adding["KEYS"]), b](
            parts, counted, out, groups, steps, length, SHARE=share, **adding, **adding_options,
        )  # fmt: skip
    return out


def _unit(query: Tensor, key: Tensor) -> int:
    return 1 if any(stride % 16 for x in (query, key) for stride in x.stride()[:3]) else 16


def _tiles(dtype: torch.dtype, dh: int, rows: int, unit: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of the first two kernels.

    Strides count units of 16 values where they can: then the compiler knows that rows are aligned and loads 16 bytes
    at once, whatever lengths went into the strides.
    """
    full, wide = dtype == torch.float32, dh > 128  # both need smaller tiles: operands must fit in registers
    constants = {
        "DH": dh,
        "UNIT": unit,
        "WIDTH": min(max(triton.next_power_of_2(dh), 16), 32 if full else 64 if wide else 128),
        "ROWS": min(max(triton.next_power_of_2(rows), 16), 32 if full or wide else 64),
        "KEYS": 32 if full else 64,
    }
    return constants, {"num_warps": 8, "num_stages": 2 if full or wide else 3}


def _adding(groups: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of the last kernel."""
    heads = triton.next_power_of_2(groups)
    return {"HEADS": heads, "KEYS": max(4096 // heads, 16)}, {"num_warps": 4}


def case(
    query: Tensor,
    key: Tensor,
    position: Tensor | None,
    counted: Tensor | None,
    mask: Tensor | None,
    allowed: Tensor | None,
    window: int | None,
    cap: float | None,
) -> Case | None:
    """What the launches are compiled for, and two samples that try it; what is not to be seen is NaN."""
    (_, heads, steps, dh), (_, groups, length) = query.shape, key.shape[:3]
    if not query.numel() or not length:
        return None
    share, unit, dtype = heads // groups, _unit(query, key), query.dtype
    even = is_even(query), is_even(key)
    tile = _tiles(dtype, dh, share * steps, unit)[0]["ROWS"]
    few = min(steps, -(-(tile + 1) // share))  # rows that fill such a tile, and begin another if the call's do
    given = tuple(x is not None for x in (position, counted, mask, allowed, window, cap))
    names = ("position", "counted", "mask", "allowed", "window", "cap")
    told = "+".join(name for name, there in zip(names, given, strict=True) if there) or "nothing"
    facts = (
        ("dtype", dtype), ("width", dh), ("heads", f"{groups} x {share}"), ("rows at a time", tile), ("unit", unit),
        ("even query", even[0]), ("even keys", even[1]), ("with", told),
    )  # fmt: skip

    def arguments(device: torch.device) -> tuple[Any, ...]:
        random, cpu = torch.Generator("cpu").manual_seed(0), torch.device("cpu")

        def coins(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=random, device=cpu) < 0.7

        q = noise(1, 2, heads, few, dh, dtype=torch.float32, device=cpu)
        k = noise(2, 2, groups, KEYS_TRIED, dh, dtype=torch.float32, device=cpu)
        if not exact_float32():  # torch may then cut float32 down to bfloat16: these numbers are the same in both
            q, k = q.bfloat16().float(), k.bfloat16().float()
        at = torch.randint(0, KEYS_TRIED, (2, few), generator=random, device=cpu)
        some, real, free = coins(2, few), coins(2, KEYS_TRIED), coins(2, few, KEYS_TRIED)
        if counted is not None:
            q = q.masked_fill(~some[:, None, :, None], float("nan"))
        if mask is not None:
            k = k.masked_fill(~real[:, None, :, None], float("nan"))
        q, k = (laid_out(x.to(dtype), device, unit == 16, begins) for x, begins in zip((q, k), even, strict=True))
        every = (at.to(device), some.to(device), real.to(device), free.to(device), KEYS_TRIED // 2, 3.0)
        return q, k, dh**-0.5, *(x if there else None for x, there in zip(every, given, strict=True))

    return Case("attention rows", facts, arguments, functools.partial(row_attention, least=64), TOLERANCE)


def _variants(
    name: str, dtype: str, groups: int, share: int, dh: int, steps: int, *optional: str
) -> tuple[Variant, ...]:
    """The first two kernels as launched for key heads, query heads to each, head size and rows."""
    types = {"position": "*i64", "mask": "*u1", "counted": "*u1", "allowed": "*u1", "window": "i32", "cap": "fp32"}
    signature: dict[str, str] = {"query": f"*{dtype}", "key": f"*{dtype}", "scale": "fp32"}
    signature |= {x: types[x] for x in optional}
    signature |= dict.fromkeys(("peaks", "sums", "parts"), "*fp32")
    signature |= dict.fromkeys((*STRIDES, "groups", "steps", "length", "chunk", "chunks"), "i32")
    tiles, options = _tiles(getattr(torch, TORCH[dtype]), dh, share * steps, 16)
    constants: dict[str, Any] = dict.fromkeys(types.keys() - set(optional)) | {"SHARE": share} | tiles
    return tuple(
        Variant(
            f"{kernel.fn.__name__}, {name}, {dtype}",
            kernel,
            {x: signature[x] for x in kernel.arg_names if x in signature},
            {x: constants[x] for x in kernel.arg_names if x in constants},
            options,
        )
        for kernel in (normalisers, weights)
    )


TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PLAIN = ("position", "counted", "mask")
VARIANTS = (
    *_variants("dh=128, 1 x 64 rows", "bf16", 32, 1, 128, 64, *PLAIN),
    *_variants("dh=128, 1 x 64 rows", "fp32", 32, 1, 128, 64, *PLAIN),
    *_variants("dh=128, 7 x 64 rows", "bf16", 4, 7, 128, 64, "mask", "counted"),
    *_variants("dh=128, 1 row", "bf16", 32, 1, 128, 1),
    *_variants("dh=256, all options", "bf16", 4, 2, 256, 64, *PLAIN, "allowed", "window", "cap"),
    *_variants("dh=80", "fp16", 32, 1, 80, 64, *PLAIN),
    *_variants("dh=96, all options", "fp32", 32, 1, 96, 64, *PLAIN, "allowed", "window", "cap"),
    *(
        Variant(
            f"mean, {groups} key heads",
            mean,
            {"parts": "*fp32", "counted": "*u1", "out": "*fp32", "groups": "i32", "steps": "i32", "length": "i32"},
            {"SHARE": 32 // groups} | _adding(groups)[0],
            _adding(groups)[1],
        )
        for groups in (4, 32)
    ),
)
