"""The greedy family on a GPU: three launches for all picks, or one for each where features are too many to multiply.

The kernels, and why they give the picks of :mod:`vtc.ops.recursion` bit for bit, are in
:mod:`vtc.ops.kernels.recursion`.

**Gram resident** (N <= GRAM_TOKENS). ``begin`` reads the mask, ``digits`` makes the digits, ``gram`` all similarities
from the tiles on and above the diagonal, and one program for each image makes all its picks (``loop``): its state stays
in registers, and a pick is a gather of one row and one reduction. The matrix has four bytes for each pair of tokens;
the batch is worked off in parts, so that matrices and digits never hold more than RESIDENT bytes.

**Matrix-free** (larger N, or so few picks that single rows are cheaper). One launch for each pick, over blocks of rows
(``step``): it finds the pick among the previous launch's best of each block, multiplies its rows with it, updates their
state and leaves its own best to the next launch. At these sizes a pick has to read all features, tens of microseconds,
in which the next launch is queued: a barrier across the grid inside one launch would save nothing, would need all
blocks to be resident, and hangs where they are not. Extra memory is at most 40 bytes a token, and for the first pick of
farthest-first without a start, which needs all pairs, the digits: 1.5 times features of 16 bits, 0.75 times float32 (d
and N rounded up to multiples of 128).

Features may be bfloat16, float16, float32 or float64 (entries above 1e150 count as not finite); other types are
converted to float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vtc.ops import recursion
from vtc.ops.backend import launching
from vtc.ops.kernels.layout import few_tokens, is_even
from vtc.ops.kernels.recursion import (
    CHUNK,
    PAD_TOKENS,
    PAD_WIDTH,
    WIDEST,
    begin,
    digits,
    gram,
    isolated,
    loop,
    step,
)
from vtc.ops.kernels.variant import Variant
from vtc.ops.proof import Case
from vtc.ops.recursion import Job

GRAM_TOKENS = 8192  # the loop keeps three numbers of each token in registers
GRAM_ROWS_PER_PICK = 64  # a row by itself costs as much as about so many rows of the matrix (H200, d = 4096)
RESIDENT = 4 * 2**30  # bytes of Gram matrices and digits at any time, or what one image needs
GRID = 65535  # images in one launch
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EXACT = {"enable_fp_fusion": False}  # every product is rounded, as torch rounds it


class Way(NamedTuple):
    """How the picks are made; beside dtype, width and mode of a job this decides what is compiled.

    Attributes:
        resident: out of the matrix, or pick by pick.
        images: of one launch.
        tokens: of an image, by which tiles and blocks are chosen.
    """

    resident: bool
    images: int
    tokens: int


def way(job: Job) -> Way:
    """Of a job that :func:`fits`."""
    b, n, d = job.x.shape
    resident = n <= GRAM_TOKENS and (job.all_pairs or n <= GRAM_ROWS_PER_PICK * job.k)
    tokens, width = _padded(n, d)
    memory = 3 * tokens * width * (resident or job.all_pairs) + 4 * tokens * tokens * resident
    return Way(resident, min(b, max(1, RESIDENT // max(memory, 1)), GRID), n)


def fits(job: Job) -> bool:
    """Whether the kernels serve: rows wider than WIDEST go to the reference, whose float64 has room for them."""
    return job.x.numel() > 0 and job.x.shape[-1] <= WIDEST


def picks(job: Job, like: Way | None = None) -> Tensor:
    """:func:`vtc.ops.recursion.picks`, with the same result. Nothing is read back from the device.

    Args:
        job: that :func:`fits`, or the reference does it.
        like: the way to go; by default the job's own.
    """
    if not fits(job):
        return recursion.picks(job)
    x, k, like = job.x, job.k, like or way(job)
    b = len(x)
    x = x if x.dtype in FLOATS else x.float()
    job = dataclasses.replace(
        job,
        x=x if x.stride(-1) == 1 else x.contiguous(),
        mask=job.mask.contiguous().view(torch.uint8),
        start=None if job.start is None else job.start.contiguous(),
        importance=None if job.importance is None else job.importance.contiguous(),
        weights=None if job.weights is None else job.weights.contiguous(),
    )
    out = torch.empty(b, k, dtype=torch.long, device=x.device)
    rest = out
    with launching(x.device):
        for part in job.parts(like.images):
            own, rest = rest[: len(part.x)], rest[len(part.x) :]
            launches = _Launches(part, like)
            launches.with_matrix(own) if like.resident else launches.without_matrix(own)
    return out


def _padded(n: int, d: int) -> tuple[int, int]:
    """Tokens and width rounded up to whole tiles."""
    return triton.cdiv(n, PAD_TOKENS.value) * PAD_TOKENS.value, triton.cdiv(d, PAD_WIDTH.value) * PAD_WIDTH.value


class _Launches:
    """Some images, and the numbers that every kernel needs of each of them."""

    def __init__(self, job: Job, like: Way | None = None) -> None:
        self.x, self.k, self.like = job.x, job.k, like or way(job)
        self.b, self.n, self.d = job.x.shape
        padded, width = _padded(self.n, self.d)
        self.tiles, self.chunks = padded // PAD_TOKENS.value, width // CHUNK.value
        self.strides = job.x.stride()[:2]
        self.aligned = _aligned(job.x)
        self.weight = 1.0 - job.balance
        self.mode = _mode(job)
        self.length, self.first = self._empty(torch.int32), self._empty(torch.int32)
        self.scale = self._empty(torch.float64, self.n)
        self.base = self._empty(torch.float32, padded)
        self.nearest = self._empty(torch.float32, padded) if job.all_pairs else None
        begin[self.b,](
            job.mask, job.importance, job.weights, job.start, self.length, self.first, self.base, self.nearest, self.n,
            self.tiles, job.balance, **_constants("begin"),
        )  # fmt: skip

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(self.b, *shape, dtype=dtype, device=self.x.device)

    def with_matrix(self, out: Tensor) -> None:
        """All picks out of the matrix of all similarities."""
        padded = self.tiles * PAD_TOKENS.value
        matrix = self._empty(torch.float32, padded, padded)
        self._gram(self._planes(), matrix)
        loop[self.b,](
            matrix, self.length, self.base, self.nearest, self.first, out, self.tiles, self.k, self.weight,
            **self.mode, **_constants("loop", tokens=_padded(self.like.tokens, 0)[0]),
        )  # fmt: skip

    def without_matrix(self, out: Tensor) -> None:
        """Pick by pick."""
        if self.nearest is None:
            self._digits(None)
        else:
            self._gram(self._planes(), None)
            isolated[self.b,](self.base, self.nearest, self.first, self.n, self.tiles, **_constants("isolated"))
        constants = _constants("step", tokens=self.like.tokens)
        blocks = triton.cdiv(self.n, constants["ROWS"])
        state = torch.float64 if self.mode["SUM"] else torch.float32
        penalty = torch.empty(2, *self.base.shape, dtype=state, device=out.device)
        best = torch.empty(2, self.b, blocks, dtype=state, device=out.device)
        best_at = torch.empty_like(best, dtype=torch.int32)
        for j in range(self.k):
            step[blocks if j < self.k - 1 else 1, self.b](
                self.x, self.scale, self.length, self.base, penalty, self.first, best, best_at, out,
                self.n, self.d, self.tiles, *self.strides, self.weight, j, self.k,
                ALIGNED=self.aligned, **self.mode, **constants,
            )  # fmt: skip

    def _planes(self) -> Tensor:
        """The rows' digits int8 [images, 3, chunks, tokens, CHUNK], and their scales."""
        planes = self._empty(torch.int8, 3, self.chunks, self.tiles * PAD_TOKENS.value, CHUNK.value)
        self._digits(planes)
        return planes

    def _digits(self, planes: Tensor | None) -> None:
        """Set the rows' scales, and their digits where they are wanted."""
        constants = _constants("digits", width=self.d)
        digits[triton.cdiv(self.n, constants["ROWS"]), self.b](
            self.x, self.length, self.scale, planes, self.n, self.d, self.tiles, self.chunks, *self.strides,
            ALIGNED=self.aligned, **constants,
        )  # fmt: skip

    def _gram(self, planes: Tensor, matrix: Tensor | None) -> None:
        """Fills the matrix, if there is one, and ``nearest``, if that is asked for."""
        constants = _gram_constants(self.like, planes.device)
        tiles = (self.tiles * PAD_TOKENS.value) ** 2 // (constants["ROWS"] * constants["COLUMNS"])
        gram[tiles, self.b](planes, self.length, self.base, matrix, self.nearest, self.tiles, self.chunks, **constants)


def _aligned(x: Tensor) -> bool:
    return all(size % 16 == 0 for size in (x.shape[-1], *x.stride()[:2]))


def _mode(job: Job) -> dict[str, bool]:
    return {"WEIGHTED": job.importance is not None, "EACH": job.weights is not None, "SUM": job.running_sum}


def _gram_constants(like: Way, device: torch.device) -> dict[str, Any]:
    hopper = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return _constants("gram", tokens=like.tokens, images=like.images, hopper=hopper)


def case(job: Job) -> Case | None:
    """What the launches are compiled for, and two images of a few tokens that try it.

    Among the tokens are twins, one without a direction, one that is NaN and padding; all of them are picked.
    """
    if not fits(job):
        return None
    x, like = job.x, way(job)
    dtype, whole = x.dtype if x.dtype in FLOATS else torch.float32, x.dtype in FLOATS and x.stride(-1) == 1
    aligned, even = _aligned(x) if whole else x.shape[-1] % 16 == 0, is_even(x) or not whole
    span = triton.next_power_of_2(x.shape[-1])
    gram = _gram_constants(like, x.device)
    by: tuple[tuple[str, Any], ...]
    if like.resident:
        room, by = 40, (("block", _constants("loop", tokens=_padded(like.tokens, 0)[0])["BLOCK"]),)
    else:
        step = _constants("step", tokens=like.tokens)
        room, by = min(40, step["ROWS"] * step["PARTS"]), (("rows", step["ROWS"]), ("blocks", step["PARTS"]))
    if like.resident or job.all_pairs:
        by += (("tile", f"{gram['ROWS']} x {gram['COLUMNS']} x {gram['DEPTH']}"),)
    given = (("start", job.start), ("importance", job.importance), ("weights", job.weights))
    terms = [name for name, there in given if there is not None] + ["sum"] * job.running_sum
    facts = (
        ("dtype", dtype), ("width", f"<= {span}"), ("aligned", aligned), ("even", even),
        ("by", "matrix" if like.resident else "rows"), ("with", "+".join(terms) or "nothing"), *by,
    )  # fmt: skip
    made = functools.partial(few_tokens, job, room, dtype, _width(span, aligned), aligned, even)
    return Case("greedy picks", facts, made, functools.partial(picks, like=like))


def _width(span: int, aligned: bool) -> int:
    """Of the widths up to a power of two and above half of it, one with a rest behind its last whole block."""
    widest = min(span, WIDEST)
    if not aligned:
        return widest - 1 if widest > 2 else widest
    return widest // 16 * 16 - 16 if widest > 32 else max(widest, 16)


def _constants(
    kernel: str, *, tokens: int = 0, width: int = 0, images: int = 1, hopper: bool = False
) -> dict[str, Any]:
    """Constants and options of a launch. None of them changes a bit of the result."""
    if kernel in ("begin", "isolated"):
        return {"BLOCK": 1024, "num_warps": 4} | _EXACT
    if kernel == "digits":
        return {"SPAN": triton.next_power_of_2(width), "ROWS": 4, "BLOCK": 512, "num_warps": 4} | _EXACT
    if kernel == "gram":
        # Small tiles until large ones would fill a big chip. Triton waits for each integer product of a warp group, so
        # Hopper wants few and deep ones; elsewhere deep tiles would have to be in registers all at once.
        rows, columns, warps = (64, 32, 4) if images * tokens * tokens <= 1024 * 1024 else (128, 64, 8)
        depth, stages = (128, 2) if hopper else (32, 4)
        tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "GROUP": 8}
        return tile | {"num_warps": warps, "num_stages": stages} | _EXACT
    if kernel == "loop":
        block = triton.next_power_of_2(tokens)
        return {"BLOCK": block, "num_warps": min(max(block // 512, 4), 16)} | _EXACT
    rows = 16 if tokens <= 8192 else 32
    blocks = triton.next_power_of_2(triton.cdiv(tokens, rows))
    return {"ROWS": rows, "BLOCK": 128, "PARTS": blocks, "num_warps": rows // 4} | _EXACT


def _variants(hopper: bool) -> tuple[Variant, ...]:
    """The launches for 577 and 2880 tokens of width 4096 and for 16384, in all modes and dtypes.

    Args:
        hopper: only those that are made on that chip alone.
    """
    types = {
        "mask": "*u8", "importance": "*fp32", "weights": "*fp32", "start": "*i64", "length": "*i32", "first": "*i32",
        "base": "*fp32", "nearest": "*fp32", "scale": "*fp64", "planes": "*i8", "matrix": "*fp32", "out": "*i64",
        "penalty": "*fp32", "best": "*fp32", "best_at": "*i32", "balance": "fp32", "weight": "fp32",
    }  # fmt: skip
    found = []

    def add(name: str, kernel: Any, constants: Any, **own: str | None) -> None:
        options: dict[str, Any] = {
            o: constants[o] for o in ("num_warps", "num_stages", "enable_fp_fusion") if o in constants
        }
        fixed = {c: value for c, value in constants.items() if c not in options}
        every = {a: (types | own).get(a, "i32") for a in kernel.arg_names if a not in fixed}
        fixed |= {a: None for a, t in every.items() if t is None}
        signature = {a: t for a, t in every.items() if t is not None}
        found.append(Variant(f"{kernel.__name__} {name}".strip(), kernel, signature, fixed, options))

    for tokens in (577, 2880, 16384):
        tile = _constants("gram", tokens=tokens, hopper=hopper)
        chip = " hopper" if hopper else ""
        if tokens > GRAM_TOKENS:
            add(f"nearest {tokens}{chip}", gram, tile, matrix=None)
        else:
            add(f"isolated {tokens}{chip}", gram, tile)
            add(f"start {tokens}{chip}", gram, tile, nearest=None)
    if hopper:
        return tuple(found)

    plain = dict.fromkeys(("WEIGHTED", "EACH", "SUM"), False)
    modes = {
        "isolated": ({"importance": None, "weights": None, "start": None}, plain),
        "weights": ({"importance": None, "start": None}, plain | {"EACH": True}),
        "start": ({"importance": None, "weights": None, "nearest": None}, plain),
        "sum": ({"importance": None, "weights": None, "nearest": None}, plain | {"SUM": True}),
        "mmr": ({"weights": None, "start": None, "nearest": None}, plain | {"WEIGHTED": True}),
    }
    floats = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "fp64": "*fp64"}
    for mode, (arguments, flags) in modes.items():
        if mode != "sum":
            add(mode, begin, _constants("begin"), **arguments)
        for tokens in (577, 2880, GRAM_TOKENS):
            add(f"{mode} {tokens}", loop, flags | _constants("loop", tokens=_padded(tokens, 0)[0]), **arguments)
    for dtype, x in floats.items():
        for aligned, odd in ((True, ""), (False, " odd")) if dtype == "bf16" else ((True, ""),):
            add(f"{dtype}{odd}", digits, {"ALIGNED": aligned} | _constants("digits", width=4096), x=x)
            for tokens in (2880, 16384):
                wide = {"ALIGNED": aligned} | _constants("step", tokens=tokens)
                add(f"start {dtype} {tokens}{odd}", step, wide | modes["start"][1], x=x)
    add("bf16 scale", digits, {"ALIGNED": True} | _constants("digits", width=4096), x="*bf16", planes=None)
    wide = {"ALIGNED": True} | _constants("step", tokens=16384)
    add("sum bf16 16384", step, wide | modes["sum"][1], x="*bf16", penalty="*fp64", best="*fp64")
    add("weights bf16 16384", step, wide | modes["weights"][1], x="*bf16")
    add("mmr bf16 16384", step, wide | modes["mmr"][1], x="*bf16")
    add("", isolated, _constants("isolated"))
    return tuple(found)


VARIANTS = _variants(hopper=False)
HOPPER_VARIANTS = _variants(hopper=True)
