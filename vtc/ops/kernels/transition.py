"""How much a module turned and stretched each token: one read of what went in and of what came out.

Two launches: ``change`` takes both norms and the product of one token per program, ``share`` divides by the sample's
sum, which each of its programs adds up anew (a few KiB out of the cache, cheaper than a third launch). No atomics: the
result does not depend on the batch, nor on padding at the right.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtc.ops.backend import launching
from vtc.ops.kernels.layout import is_even, laid_out, noise
from vtc.ops.kernels.variant import Variant
from vtc.ops.proof import Case

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
TOKENS = 1024  # summed at once
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = (3e-5, 1e-7)  # sums of float32 in another order than torch's


@triton.jit(do_not_specialize=["length"])
def change(
    before, after, mask, stretch, turn, before_b, before_l, after_b, after_l, length,
    D: tl.constexpr, WIDTH: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Of one token: ``|b| / |a|`` and ``exp(1 - cos)``.

    ``a.b / |a| / |b|`` cannot overflow where the squares did not: a.b is at most |a||b|, so the first division leaves
    at most |b|. Sums of squares that overflow are not finite norms, as in the reference.
    """
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a_at, b_at = sample * before_b + token.to(tl.int64) * before_l, sample * after_b + token.to(tl.int64) * after_l
    aa = tl.zeros((WIDTH,), tl.float32)
    bb = tl.zeros((WIDTH,), tl.float32)
    ab = tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        a = tl.load(before + a_at + d, d < D, 0.0).to(tl.float32)
        b = tl.load(after + b_at + d, d < D, 0.0).to(tl.float32)
        aa, bb, ab = aa + a * a, bb + b * b, ab + a * b
    norm_a, norm_b = tl.sqrt_rn(tl.sum(aa, 0)), tl.sqrt_rn(tl.sum(bb, 0))
    there = True if mask is None else tl.load(mask + sample * length + token).to(tl.int1)
    sound = (norm_a < float("inf")) & (norm_b < float("inf")) & there  # false for NaN
    cosine = tl.where(sound & (norm_a > 0) & (norm_b > 0), tl.sum(ab, 0) / norm_a / norm_b, 0.0)
    if ABSOLUTE:
        cosine = tl.abs(cosine)
    at = sample * length + token
    tl.store(stretch + at, tl.where(sound & (norm_a > 0), norm_b / tl.maximum(norm_a, TINY), 0.0))
    tl.store(turn + at, tl.where(there, tl.exp(1.0 - cosine), 0.0))


@triton.jit(do_not_specialize=["length"])
def share(stretch, turn, length, TOKENS: tl.constexpr):
    """The stretch times the token's share of the sample's turns, in place."""
    sample = tl.program_id(1).to(tl.int64) * length
    token = tl.arange(0, TOKENS)
    whole = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, length, TOKENS):
        whole += tl.load(turn + sample + first + token, first + token < length, 0.0)
    token += tl.program_id(0) * TOKENS
    at, there = sample + token, token < length
    score = tl.load(stretch + at, there, 0.0) * (tl.load(turn + at, there, 0.0) / tl.maximum(tl.sum(whole, 0), TINY))
    tl.store(stretch + at, score, there)


def operands(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors as the kernels take them: of a float type that they know, rows in one piece."""
    before, after = (x.detach() if x.dtype in FLOATS else x.detach().float() for x in (before, after))
    before, after = (x if x.stride(-1) == 1 else x.contiguous() for x in (before, after))
    return before, after


def transition_variation(before: Tensor, after: Tensor, mask: Tensor | None, absolute: bool) -> Tensor:
    """:func:`vtc.ops.transition_variation`, whose arguments these are, checked; the tensors from :func:`operands`."""
    b, length, d = before.shape
    mask = None if mask is None else mask.contiguous()
    stretch, turn = before.new_empty(2, b, length, dtype=torch.float32)
    if not stretch.numel():
        return stretch
    constants, options = _row(d)
    with launching(before.device):
        change[length, b](
            before, after, mask, stretch, turn, *before.stride()[:2], *after.stride()[:2], length,
            ABSOLUTE=absolute, **constants, **options,
        )  # fmt: skip
        share[triton.cdiv(length, TOKENS), b](stretch, turn, length, TOKENS=TOKENS, num_warps=4)
    return stretch


def case(before: Tensor, after: Tensor, mask: Tensor | None, absolute: bool) -> Case | None:
    """What the launches are compiled for, and two samples that try it: a row of zeros, padding that is NaN."""
    if not before.numel():
        return None
    d, dtypes, even = before.shape[-1], (before.dtype, after.dtype), (is_even(before), is_even(after))
    aligned = all(stride % 16 == 0 for x in (before, after) for stride in x.stride()[:2])
    whole = before.shape[:2].numel() % 4 == 0  # where in 16 bytes the second of the two scores in memory begins
    length = 20 if whole else 19
    facts = (
        ("before", dtypes[0]), ("after", dtypes[1]), ("width", d), ("mask", mask is not None),
        ("absolute", absolute), ("aligned", aligned), ("even before", even[0]),
        ("even after", even[1]), ("even scores", whole),
    )  # fmt: skip

    def arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        real = torch.ones(2, length, dtype=torch.bool, device="cpu")
        real[1, 12:], real[0, 3] = False, False
        a, b = (noise(seed, 2, length, d, dtype=torch.float32, device=real.device) for seed in (0, 1))
        a[:, 5] = 0.0
        if mask is not None:
            a, b = (x.masked_fill(~real[..., None], float("nan")) for x in (a, b))
        kinds = zip((a, b), dtypes, even, strict=True)
        a, b = (laid_out(x.to(dtype), device, aligned, begins) for x, dtype, begins in kinds)
        return a, b, None if mask is None else real.to(device), absolute

    return Case("transition scores", facts, arguments, transition_variation, TOLERANCE)


def _row(d: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of the first kernel: 16 bytes of bf16 per thread and step, several steps in flight."""
    width = min(max(triton.next_power_of_2(d), 128), 4096)
    return {"D": d, "WIDTH": width}, {"num_warps": 8 if width == 4096 else 4}


VARIANTS = (
    *(
        Variant(
            f"change, {dtype}, d={d}",
            change,
            {
                "before": f"*{dtype}", "after": f"*{dtype}", "mask": "*u1", "stretch": "*fp32", "turn": "*fp32",
                "before_b": "i32", "before_l": "i32", "after_b": "i32", "after_l": "i32", "length": "i32",
            },
            {**_row(d)[0], "ABSOLUTE": False},
            _row(d)[1],
        )
        for dtype, d in itertools.product(("bf16", "fp16", "fp32"), (896, 3584, 4096))
    ),
    Variant(
        "share", share, {"stretch": "*fp32", "turn": "*fp32", "length": "i32"}, {"TOKENS": TOKENS}, {"num_warps": 4}
    ),
)  # fmt: skip
