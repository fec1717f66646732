"""The same columns of several tensors in one launch; torch takes one launch for each.

The tensors come as arguments of their own and not as a table of pointers: a table would have to travel to the device at
each call. Programs are numbered through all tensors; each finds its own by counting off the tiles of those before.
Values are copied and never computed with, so any dtype goes through bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.ops.backend import launching
from vtc.ops.kernels.layout import is_even, laid_out
from vtc.ops.kernels.variant import Variant
from vtc.ops.proof import Case

SLOTS = 4  # of a launch: what leaves at a layer stage. The host pays for each argument, used or not
TILE = tl.constexpr(2048)  # values of one program: 16 or more bytes for each of 128 threads
STRIDES = tuple(f"{axis}{slot}" for slot in range(SLOTS) for axis in "bon")
LOADABLE = frozenset(
    (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
)
TRIED = 24  # columns of the small job that tries a launch
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Layout = tuple[int, int, int, int]


@triton.jit
def _take(
    tile, index, index_b, index_m, kept, width,
    source, target, source_b, source_o, source_n,
    OUTER: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy one tile if ``tile`` is one of this tensor's; returns its number counted from the next tensor on.

    The tensor is [B, OUTER, N, INNER], its strides in units of UNIT values. A tile is some kept rows of one sample and
    outer index, COLUMNS values of each.
    """
    if source is not None:
        rows: tl.constexpr = TILE // COLUMNS
        across: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
        down = tl.cdiv(kept, rows)
        if (tile >= 0) & (tile < OUTER * down * across):
            sample = tl.program_id(1).to(tl.int64)
            outer, m = tile // (down * across), tile // across % down * rows + tl.arange(0, rows)
            inner = tile % across * COLUMNS + tl.arange(0, COLUMNS)
            n = tl.load(index + sample * index_b + m * index_m, m < kept, 0)
            there = (m < kept)[:, None] & (inner < INNER)[None, :]
            found = there & ((n >= 0) & (n < width))[:, None]  # never outside the tensor, whatever the index says
            row = sample * source_b + outer.to(tl.int64) * source_o + n * source_n
            to = ((sample * OUTER + outer) * kept + m)[:, None] * INNER + inner[None, :]
            tl.store(target + to, tl.load(source + row[:, None] * UNIT + inner[None, :], found, 0), there)
        tile -= OUTER * down * across
    return tile


@triton.jit(do_not_specialize=["index_b", "index_m", "kept", "width", *STRIDES])
def gather(
    index, index_b, index_m, kept, width,
    source0, target0, b0, o0, n0, source1, target1, b1, o1, n1,
    source2, target2, b2, o2, n2, source3, target3, b3, o3, n3,
    L0: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, L3: tl.constexpr,
):  # fmt: skip
    """Up to four tensors with their layouts; those not there are ``None``."""
    tile = tl.program_id(0)
    tile = _take(
        tile, index, index_b, index_m, kept, width, source0, target0, b0, o0, n0, L0[0], L0[1], L0[2], L0[3]
    )  # fmt: skip
    tile = _take(
        tile, index, index_b, index_m, kept, width, source1, target1, b1, o1, n1, L1[0], L1[1], L1[2], L1[3]
    )  # fmt: skip
    tile = _take(
        tile, index, index_b, index_m, kept, width, source2, target2, b2, o2, n2, L2[0], L2[1], L2[2], L2[3]
    )  # fmt: skip
    tile = _take(
        tile, index, index_b, index_m, kept, width, source3, target3, b3, o3, n3, L3[0], L3[1], L3[2], L3[3]
    )  # fmt: skip


def fits(tensor: Tensor, index: Tensor) -> bool:
    """Whether the kernel can copy this tensor: beside the index, in a dtype of plain words, and not to be trained."""
    words = tensor.dtype in LOADABLE or (tensor.element_size() in WORDS and not tensor.is_complex())
    return words and tensor.device == index.device and not (tensor.requires_grad and torch.is_grad_enabled())


class Slot(NamedTuple):
    """A tensor as the kernel takes it.

    Attributes:
        words: the tensor in a dtype that Triton knows: [B, N], [B, N, inner], [B, outer, N] or [B, outer, N, inner].
        columns: N.
        strides: of samples, outer indices and columns, in units.
        layout: its constants.
        dtype: of the result.
        before: the result's shape up to the columns that are taken.
        after: and behind them.
    """

    words: Tensor
    columns: int
    strides: tuple[int, int, int]
    layout: Layout
    dtype: torch.dtype
    before: torch.Size
    after: torch.Size


def launches(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[list[Slot]]:
    """The arguments of :func:`vtc.ops.gather.gather_columns`, checked, as the launches take them."""
    taken = [_slot(tensor, dim) for tensor, dim in zip(tensors, dims, strict=True)]
    return [taken[first : first + SLOTS] for first in range(0, len(taken), SLOTS)]


def _slot(tensor: Tensor, dim: int) -> Slot:
    dtype, before, after = tensor.dtype, tensor.shape[:dim], tensor.shape[dim + 1 :]
    columns = tensor.shape[dim]
    if dtype not in LOADABLE:
        tensor = tensor.view(WORDS[tensor.element_size()])
    if dim > 2 or tensor.ndim - dim > 2 or (tensor.ndim - dim == 2 and tensor.stride(-1) != 1):
        tensor, dim = tensor.reshape(before[0], before[1:].numel(), columns, after.numel()), 2
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    shape, strides = tuple(tensor.shape), tensor.stride()
    outer, o = (shape[1], strides[1]) if dim == 2 else (1, 0)
    unit = 16 if strides[0] % 16 == o % 16 == strides[dim] % 16 == 0 else 1  # says how rows are aligned
    layout = _layout(outer, shape[-1] if dim + 1 < len(shape) else 1, unit)
    return Slot(tensor, columns, (strides[0] // unit, o // unit, strides[dim] // unit), layout, dtype, before, after)


def gather_columns(taken: Sequence[Sequence[Slot]], index: Tensor) -> tuple[Tensor, ...]:
    """The columns ``index`` [B, M] of all slots, launch by launch."""
    with launching(index.device):
        return tuple(result for some in taken for result in _launch(some, index))


def _launch(some: Sequence[Slot], index: Tensor) -> list[Tensor]:
    batch, kept = index.shape
    results: list[Tensor] = []
    arguments: list[Tensor | int] = []
    tiles = 0
    for slot in some:
        result = slot.words.new_empty(*slot.before, kept, *slot.after)
        results.append(result.view(slot.dtype))
        arguments += (slot.words, result, *slot.strides)
        outer, inner, columns, _ = slot.layout
        tiles += outer * triton.cdiv(kept, TILE.value // columns) * triton.cdiv(inner, columns)
    unused = SLOTS - len(some)
    if tiles and batch:
        gather[tiles, batch](
            index, *index.stride(), kept, some[0].columns,
            *arguments, *(None,) * 5 * unused, *(slot.layout for slot in some), *(NOTHING,) * unused, num_warps=4,
        )  # fmt: skip
    return results


def case(some: Sequence[Slot], index: Tensor) -> Case | None:
    """What one launch is compiled for, and two samples of a few columns that try it; columns repeat."""
    if not index.numel():
        return None
    looks = [(slot.words.dtype, *slot.layout, is_even(slot.words)) for slot in some]
    kept = min(TILE.value // columns for _, _, _, columns, _, _ in looks) + 3  # rows of a tile, and some of another

    def arguments(device: torch.device) -> tuple[list[Tensor], Tensor, list[int]]:
        generator = torch.Generator("cpu").manual_seed(0)
        tensors = []
        for dtype, outer, inner, _, unit, even in looks:
            size = (2, outer, TRIED, inner, dtype.itemsize)
            bits = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device="cpu")
            words = bits[..., 0] > 127 if dtype == torch.bool else bits.view(dtype)[..., 0]
            words = words.masked_fill(words != words, 1)  # torch's gather on the CPU rewrites what a NaN says
            tensors.append(laid_out(words, device, unit == 16, even))
        at = torch.randint(0, TRIED, (2, kept), generator=generator, device="cpu")
        return tensors, at.to(device), [2] * len(tensors)

    def run(tensors: list[Tensor], at: Tensor, dims: list[int]) -> tuple[Tensor, ...]:
        return gather_columns(launches(tensors, dims), at)

    facts = tuple(
        (f"tensor {i}", f"{dtype} {outer} x {inner}, {columns} at a time, unit {unit}, {'even' if even else 'odd'}")
        for i, (dtype, outer, inner, columns, unit, even) in enumerate(looks)
    )
    return Case("gathers", facts, arguments, run)


def _layout(outer: int, inner: int, unit: int) -> Layout:
    """The constants of one tensor: OUTER, INNER, COLUMNS and UNIT."""
    return outer, inner, min(1 << max(inner - 1, 0).bit_length(), TILE.value), unit


NOTHING = _layout(0, 1, 1)


def _variant(name: str, *tensors: tuple[str, int, int]) -> Variant:
    """Tensors as (type, outer, inner), contiguous; slots that are not used are ``None``."""
    signature = {"index": "*i64"} | dict.fromkeys(("index_b", "index_m", "kept", "width"), "i32")
    constants: dict[str, Layout | None] = {}
    for i, (word, outer, inner) in enumerate(tensors):
        signature |= {f"source{i}": word, f"target{i}": word} | dict.fromkeys((f"b{i}", f"o{i}", f"n{i}"), "i32")
        constants[f"L{i}"] = _layout(outer, inner, 1 if inner % 16 else 16)
    for i in range(len(tensors), SLOTS):
        constants |= dict.fromkeys((f"source{i}", f"target{i}", f"b{i}", f"o{i}", f"n{i}")) | {f"L{i}": NOTHING}
    return Variant(name, gather, signature, constants, {"num_warps": 4})


VARIANTS = (
    _variant("hidden, bf16, d=4096", ("*bf16", 1, 4096)),
    _variant("layer stage, bf16, d=3584", ("*bf16", 1, 3584), ("*i64", 1, 1), ("*i64", 1, 1)),
    _variant("rotary, bf16, dh=128", ("*bf16", 1, 128), ("*bf16", 1, 128)),
    _variant("keys and values of two layers, fp16", *[("*fp16", 32, 128)] * 4),
    _variant("fp32, bool and ids", ("*fp32", 1, 4096), ("*u1", 1, 1), ("*i64", 3, 1)),
)
