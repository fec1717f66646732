"""Row attention and transition kernels: against float64, against the torch code, and what their docstrings promise.

Without a GPU they run in Triton's interpreter; with one they are compiled, and the same tests hold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before triton is imported
pytest.importorskip("triton", reason="Triton is made for Linux")

from vtc import ops
from vtc.ops.kernels import rows, transition
from vtc.ops.scores import row_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Products of two bf16 or fp16 numbers are exact in float32; sums are float32 whatever the inputs. Against float64.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity in the interpreter
SOME = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with torch.random.fork_rng():
        yield


def in_torch(call: Callable[[], Any]) -> Any:
    """The same call by the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTC_BACKEND", "torch")
        return call()


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def coin(seed: int, *shape: int, share: float = 0.7) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


def close(got: Tensor, expected: Tensor, tolerance: float, atol: float = 1e-8) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=atol)


def by_definition(
    q: Tensor, k: Tensor, scale: float, position: Tensor, counted: Tensor, seen: Tensor, cap: float | None
) -> Tensor:
    """Float64, row by row: ``seen`` is bool [B, T, L], what a row may look at besides causality."""
    b, heads, steps, _ = q.shape
    share, length = heads // k.shape[1], k.shape[2]
    out = torch.zeros(b, length, dtype=torch.float64)
    for i in range(b):
        wanted = [t for t in range(steps) if counted[i, t]]
        for t in wanted:
            keys = [n for n in range(length) if n <= position[i, t] and seen[i, t, n]]
            if not keys:
                continue
            for h in range(heads):
                logits = k[i, h // share, keys].double().cpu() @ q[i, h, t].double().cpu() * scale
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                out[i, keys] += torch.softmax(logits, 0) / (heads * len(wanted))
    return out.to(q.device)


def everything(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at the end, all counted, nothing hidden."""
    b, steps, length = q.shape[0], q.shape[2], k.shape[2]
    position = torch.arange(length - steps, length).expand(b, -1)
    return position, torch.ones(b, steps, dtype=torch.bool), torch.ones(b, steps, length, dtype=torch.bool)


# -------------------------------------------------------------------------------------------------------- row attention


SHAPES = [  # B, H, Hkv, T, L, dh
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 2, 2, 3),
    (1, 3, 3, 17, 17, 80),
    (2, 4, 2, 5, 17, 64),
    (1, 7, 1, 20, 65, 96),
    (1, 2, 2, 1, 577, 128),
    (1, 2, 1, 3, 130, 256),
    (1, 1, 1, 2, 40, 1024),
    (1, 1, 1, 1, 3, 3584),
    (1, 6, 2, 40, 90, 8),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, heads, groups, steps, length, dh = shape
    q, k = normal(0, b, heads, steps, dh, dtype=dtype), normal(1, b, groups, length, dh, dtype=dtype)
    scale = dh**-0.5
    got = ops.instruction_attention(q, k, scale, slice(None))
    assert got.dtype == torch.float32
    close(got, by_definition(q, k, scale, *everything(q, k), None), TOLERANCE[dtype])
    close(got, in_torch(lambda: ops.instruction_attention(q, k, scale, slice(None))), TOLERANCE[dtype])


@pytest.mark.parametrize(("chunk", "length"), [(512, 2928), (64, 1100)])
def test_rows_over_many_keys(chunk: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys than sixteen chunks hold are cut into longer ones."""
    monkeypatch.setattr(rows, "CHUNK", chunk)
    q, k = normal(0, 1, 1, 3, 8), normal(1, 1, 1, length, 8)
    got = ops.instruction_attention(q, k, 0.5, slice(None))
    close(got, by_definition(q, k, 0.5, *everything(q, k), None), 2e-5, atol=1e-9)


@SOME
@given(
    b=st.integers(1, 3),
    share=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2]),
    steps=st.integers(1, 9),
    length=st.sampled_from([1, 2, 17, 33, 70]),
    dh=st.sampled_from([1, 3, 16, 20]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masked=st.booleans(),
    allowing=st.booleans(),
    window=st.sampled_from([None, 1, 4, 100]),
    cap=st.sampled_from([None, 3.0, 50.0]),
    poison=st.sampled_from([0.0, math.nan, math.inf]),
    seed=st.integers(0, 10**6),
)
def test_rows_with_all_that_a_layer_may_do(
    b, share, groups, steps, length, dh, dtype, masked, allowing, window, cap, poison, seed
):
    q = normal(seed, b, share * groups, steps, dh, dtype=dtype)
    k = normal(seed + 1, b, groups, length, dh, dtype=dtype)
    position = torch.randint(0, length, (b, steps), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    counted, allowed, mask = coin(seed, b, steps), coin(seed + 2, b, steps, length), coin(seed + 3, b, length)
    back = position[..., None] - torch.arange(length, device=DEVICE)
    seen = torch.ones_like(allowed) if window is None else back < window
    if allowing:
        seen = seen & allowed
    if masked:
        seen = seen & mask[:, None]
        k = k.masked_fill(~mask[:, None, :, None], poison)
    q = q.masked_fill(~counted[:, None, :, None], poison)
    options = {
        "position": position,
        "counted": counted,
        "mask": mask if masked else None,
        "allowed": allowed if allowing else None,
        "window": window,
        "cap": cap,
    }
    got = row_attention(q, k, 0.7, **options)
    close(got, by_definition(q, k, 0.7, position, counted, seen, cap), 3e-5, atol=1e-7)
    close(got, in_torch(lambda: row_attention(q, k, 0.7, **options)), 3e-5, atol=1e-7)
    blind = ~((seen & (back >= 0)) & counted[..., None]).any(1)
    assert got[blind].eq(0).all()


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Three ragged samples, all that is padding NaN: q [3, 4, 5, 16], k [3, 2, 40, 16] and the mask [3, 40]."""
    q, k = normal(0, 3, 4, 5, 16), normal(1, 3, 2, 40, 16)
    order = torch.arange(40) if side == "right" else torch.arange(40).flip(0)
    mask = (order < torch.tensor([[40], [37], [23]])).to(DEVICE)
    q = q.masked_fill(~mask[:, None, 35:, None], math.nan)
    return q, k.masked_fill(~mask[:, None, :, None], math.nan), mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended_to(side: str) -> None:
    q, k, mask = padded(side)
    got = ops.instruction_attention(q, k, 0.25, slice(None), mask=mask)
    position, _, seen = everything(q, k)
    close(got, by_definition(q, k, 0.25, position, mask[:, 35:], seen & mask[:, None].cpu(), None), 2e-5)
    assert got[~mask].eq(0).all()
    if side == "right":  # none of the last sample's five rows is real
        assert got[2].eq(0).all()


def test_nothing_but_padding_gives_zeros() -> None:
    q, k = torch.full((1, 2, 3, 8), math.nan, device=DEVICE), torch.full((1, 1, 20, 8), math.nan, device=DEVICE)
    mask = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    assert ops.instruction_attention(q, k, 1.0, slice(None), mask=mask).eq(0).all()


def test_a_sample_has_the_same_bits_alone_and_in_a_batch() -> None:
    q, k, mask = padded("left")
    together = ops.instruction_attention(q, k, 0.25, slice(None), mask=mask)
    for i in range(3):
        alone = ops.instruction_attention(q[i : i + 1], k[i : i + 1], 0.25, slice(None), mask=mask[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_keys_that_pad_at_the_right_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK", 64)
    q, k = normal(0, 1, 4, 5, 16), normal(1, 1, 2, 150, 16)
    position = torch.arange(145, 150, device=DEVICE)[None]
    longer = torch.cat([k, torch.full((1, 2, 130, 16), math.nan, device=DEVICE)], 2)
    mask = torch.arange(280, device=DEVICE)[None] < 150
    got = row_attention(q, longer, 0.25, position=position, mask=mask)
    assert torch.equal(got[:, :150], row_attention(q, k, 0.25))
    assert got[:, 150:].eq(0).all()


@pytest.mark.parametrize(
    "part", [slice(2, 7), slice(-5, None), slice(None, None, 3), slice(-30, 900), slice(7, 2), slice(11, 12)], ids=str
)
def test_any_run_of_keys_may_be_asked_for(part: slice) -> None:
    q, k = normal(0, 2, 2, 3, 8), normal(1, 2, 2, 20, 8)
    got, expected = (f(lambda: ops.instruction_attention(q, k, 0.5, part)) for f in (lambda call: call(), in_torch))
    assert got.shape == expected.shape
    close(got, expected, 1e-6)


def test_sharp_and_huge_logits() -> None:
    q, k = normal(0, 1, 2, 4, 16), normal(1, 1, 2, 50, 16)
    got = ops.instruction_attention(q, k, 1e4, slice(None))  # one key takes all
    close(got, by_definition(q, k, 1e4, *everything(q, k), None), 1e-5)
    flat = ops.instruction_attention(q * 1e18, k * 1e18, 1e-38, slice(None))
    close(flat, in_torch(lambda: ops.instruction_attention(q * 1e18, k * 1e18, 1e-38, slice(None))), 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_among_real_keys_shows(bad: float) -> None:
    """As in the reference: nobody is told a number that means nothing."""
    q, k = normal(0, 1, 2, 3, 8).abs(), normal(1, 1, 2, 20, 8)
    k[0, 0, 4] = bad
    got = ops.instruction_attention(q, k, 0.5, slice(None))
    expected = in_torch(lambda: ops.instruction_attention(q, k, 0.5, slice(None)))
    assert expected.isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", ["heads inside", "every other channel", "expanded", "a part", "odd strides"])
def test_rows_of_tensors_that_are_not_contiguous(layout: str) -> None:
    q, k = normal(0, 2, 4, 3, 16), normal(1, 2, 4, 20, 16)
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    q, k = {
        "heads inside": inside,
        "every other channel": (normal(0, 2, 4, 3, 32)[..., ::2], normal(1, 2, 4, 20, 32)[..., 1::2]),
        "expanded": (q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 4, -1, -1)),
        "a part": (q[:, :, 1:], k[:, 1:3, 4:]),
        "odd strides": (normal(0, 2, 4, 3, 19)[..., :16], normal(1, 2, 4, 20, 17)[..., 1:]),
    }[layout]
    allowed = coin(3, 1, k.shape[2], q.shape[2]).mT.expand(2, -1, -1)
    for options in ({}, {"allowed": allowed}):
        got = row_attention(q, k, 0.5, **options)
        close(got, in_torch(lambda options=options: row_attention(q, k, 0.5, **options)), 1e-5)


@pytest.mark.parametrize("kinds", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_other_dtypes_are_computed_in_float32(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    q, k = normal(0, 1, 2, 3, 8, dtype=kinds[0]), normal(1, 1, 2, 20, 8, dtype=kinds[1])
    got = ops.instruction_attention(q.requires_grad_(), k, 0.5, slice(None))
    close(got, ops.instruction_attention(q.detach().float(), k.float(), 0.5, slice(None)), 0)
    assert not got.requires_grad


class Sizes(TorchDispatchMode):
    """How many values each new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "empty" in func.__name__:
            self.made.append(out.numel())
        return out


def test_no_matrix_of_rows_and_keys_is_made() -> None:
    q, k = normal(0, 1, 2, 64, 4), normal(1, 1, 2, 128, 4)
    with Sizes() as sizes:
        ops.instruction_attention(q, k, 0.5, slice(None))
    assert sizes.made
    assert max(sizes.made) < 64 * 128


# ----------------------------------------------------------------------------------------------------------- transition


def variation(a: Tensor, b: Tensor, mask: Tensor, absolute: bool) -> Tensor:
    """Float64, token by token."""
    out = torch.zeros(a.shape[:2], dtype=torch.float64)
    for i in range(len(a)):
        stretch, turn = [], []
        for j in range(a.shape[1]):
            u, v = a[i, j].double().cpu(), b[i, j].double().cpu()
            fine = bool(mask[i, j]) and math.isfinite(u.norm()) and math.isfinite(v.norm())
            cosine = float(u @ v / u.norm() / v.norm()) if fine and u.norm() > 0 and v.norm() > 0 else 0.0
            stretch.append(float(v.norm() / u.norm()) if fine and u.norm() > 0 else 0.0)
            turn.append(math.exp(1 - (abs(cosine) if absolute else cosine)) if mask[i, j] else 0.0)
        out[i] = torch.tensor(stretch, dtype=torch.float64) * torch.tensor(turn, dtype=torch.float64)
        out[i] /= max(sum(turn), 1e-300)
    return out.to(a.device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 2, 3), (1, 17, 64), (3, 5, 80), (1, 2, 1024), (2, 3, 3584), (1, 2, 5000)], ids=str
)
def test_transition_is_that_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = normal(0, *shape, dtype=dtype), normal(1, *shape, dtype=dtype) + 0.5
    mask = torch.ones(shape[:2], dtype=torch.bool)
    got = ops.transition_variation(a, b)
    assert got.dtype == torch.float32
    close(got, variation(a, b, mask, False), TOLERANCE[dtype])
    close(got, in_torch(lambda: ops.transition_variation(a, b)), TOLERANCE[dtype])


@SOME
@given(
    b=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, 17]),
    d=st.sampled_from([1, 3, 64, 80]),
    dtype=st.sampled_from(list(TOLERANCE)),
    absolute=st.booleans(),
    masked=st.booleans(),
    odd=st.lists(
        st.tuples(st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, math.nan, -math.inf])), max_size=4
    ),
    poison=st.sampled_from([0.0, math.nan, math.inf]),
    seed=st.integers(0, 10**6),
)
def test_transition_of_ragged_and_odd_tokens(b, length, d, dtype, absolute, masked, odd, poison, seed):
    a, c = normal(seed, b, length, d, dtype=dtype), normal(seed + 1, b, length, d, dtype=dtype)
    for at, first, value in odd:  # whole tokens without a direction
        (a if first else c)[at % b, at % length] = value
    mask = coin(seed, b, length) if masked else torch.ones(b, length, dtype=torch.bool, device=DEVICE)
    a, c = (x.masked_fill(~mask[..., None], poison) for x in (a, c))
    got = ops.transition_variation(a, c, mask=mask if masked else None, absolute=absolute)
    close(got, variation(a, c, mask, absolute), 3e-5, atol=1e-7)
    close(got, in_torch(lambda: ops.transition_variation(a, c, mask=mask if masked else None, absolute=absolute)), 3e-5)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize(("first", "second"), [(1e17, 1e17), (1e17, 1.0), (1e25, 1.0), (1.0, 1e38), (1e-17, 1e-17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transition_of_huge_and_tiny_tokens(first: float, second: float, dtype: torch.dtype) -> None:
    """Products that leave float32 where the norms do not; and norms that do, which count as not finite."""
    a, b = normal(0, 1, 9, 40), normal(1, 1, 9, 40)
    a[0, 3:], b[0, 3:] = a[0, 3:] * first, b[0, 3:].clamp(-1, 1) * second
    a, b = a.to(dtype), b.to(dtype)
    got = ops.transition_variation(a, b)
    close(got, in_torch(lambda: ops.transition_variation(a, b)), 1e-5, atol=0)
    assert torch.isfinite(got).all()
    assert got[0, 3:].eq(0).all() == (max(first, second) > 1e19)


def test_transition_over_more_tokens_than_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(0, 1, 577, 8), normal(1, 1, 577, 8)
    monkeypatch.setattr(transition, "TOKENS", 128)
    got = ops.transition_variation(a, b)
    close(got, variation(a, b, torch.ones(1, 577, dtype=torch.bool), False), 2e-5)


def test_transition_has_the_same_bits_alone_in_a_batch_and_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transition, "TOKENS", 16)
    a, b, lengths = normal(0, 3, 40, 8), normal(1, 3, 40, 8), (40, 20, 35)
    mask = torch.arange(40, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    a, b = (x.masked_fill(~mask[..., None], math.nan) for x in (a, b))
    together = ops.transition_variation(a, b, mask=mask)
    for i, n in enumerate(lengths):
        assert torch.equal(ops.transition_variation(a[i : i + 1, :n], b[i : i + 1, :n])[0], together[i, :n])
        assert together[i, n:].eq(0).all()


def test_transition_of_tensors_that_are_not_contiguous() -> None:
    a, b = normal(0, 5, 2, 12).transpose(0, 1), normal(1, 2, 5, 24)[..., ::2]
    mask = coin(0, 5, 2).T
    got = ops.transition_variation(a, b, mask=mask)
    assert torch.equal(got, ops.transition_variation(a.contiguous(), b.contiguous(), mask=mask.contiguous()))
    close(got, in_torch(lambda: ops.transition_variation(a, b, mask=mask)), 1e-5)
    assert torch.equal(ops.transition_variation(a.double(), b.float()), ops.transition_variation(a, b))


def test_nothing_in_nothing_out() -> None:
    assert ops.transition_variation(torch.zeros(0, 4, 3), torch.zeros(0, 4, 3)).shape == (0, 4)
    assert ops.transition_variation(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)).shape == (2, 0)
    assert row_attention(torch.zeros(0, 2, 1, 4), torch.zeros(0, 2, 5, 4), 1.0).shape == (0, 5)


# ------------------------------------------------------------------------------------------------ dispatch and refusals


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for module, name in ((rows, "row_attention"), (transition, "transition_variation")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: ran.append(name) or real(*args))
    x = normal(0, 1, 3, 4)

    def both() -> None:
        ops.transition_variation(x, x)
        ops.instruction_attention(x[:, None], x[:, None], 1.0, slice(None))

    both()
    assert ran == ["transition_variation", "row_attention"]
    in_torch(both)
    assert len(ran) == 2


ZEROS = torch.zeros(2, 4, 9, 8, device=DEVICE)
MASK = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.instruction_attention(ZEROS[:, :3], ZEROS[:, :2], 1.0, slice(0, 2)),
        lambda: ops.instruction_attention(ZEROS, ZEROS[:, :, :8], 1.0, slice(0, 2)),
        lambda: ops.instruction_attention(ZEROS, ZEROS[..., :7], 1.0, slice(0, 2)),
        lambda: ops.instruction_attention(ZEROS, ZEROS, 1.0, slice(0, 2), mask=MASK[:1]),
        lambda: ops.instruction_attention(ZEROS, ZEROS, 1.0, slice(0, 2), mask=MASK.long()),
        lambda: ops.instruction_attention(ZEROS, ZEROS, 1.0, slice(5, 0, -1)),
        lambda: row_attention(ZEROS, ZEROS, 1.0, position=MASK.int()),
        lambda: row_attention(ZEROS, ZEROS, 1.0, position=MASK[:, :4].long()),
        lambda: row_attention(ZEROS, ZEROS, 1.0, counted=MASK[:, :4]),
        lambda: row_attention(ZEROS, ZEROS, 1.0, allowed=MASK),
        lambda: ops.transition_variation(ZEROS[0], ZEROS[0, :, :7]),
        lambda: ops.transition_variation(ZEROS, ZEROS),
        lambda: ops.transition_variation(ZEROS[0], ZEROS[0], mask=MASK),
        lambda: ops.transition_variation(ZEROS[:, 0], ZEROS[:, 0], mask=MASK.float()),
    ],
)
def test_bad_input_is_refused_in_the_same_words(call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as ours:
        call()
    with pytest.raises(type(ours.value)) as theirs:
        in_torch(call)
    assert str(ours.value) == str(theirs.value)


def test_the_torch_path_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTC_BACKEND", "torch")
    q, k = normal(0, 2, 4, 70, 8).cpu(), normal(1, 2, 2, 90, 8).cpu()

    def call() -> Tensor:
        return row_attention(q, k, 0.5, mask=torch.arange(90)[None].expand(2, -1) < 80, window=30, cap=5.0)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(), call())
