"""The gather kernel: the bits that torch.gather takes, whatever the dtype, the layout and the number of tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # before triton is imported
pytest.importorskip("triton", reason="Triton is made for Linux")

from vtc.engine.compaction import Compaction
from vtc.ops.gather import gather_columns
from vtc.ops.kernels import gather

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
]
SOME = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tensors each launch of the kernel took."""
    monkeypatch.setenv("VTC_BACKEND", "triton")
    seen: list[int] = []
    real = gather._launch
    monkeypatch.setattr(gather, "_launch", lambda tensors, *rest: seen.append(len(tensors)) or real(tensors, *rest))
    return seen


def bits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Any bit pattern, NaNs with payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype)[..., 0]).to(DEVICE)


def raw(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.contiguous().view(torch.uint8)


def columns(seed: int, batch: int, width: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator)[:kept] for _ in range(batch)]).to(DEVICE)


def by_definition(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return torch.stack([sample[(slice(None),) * (dim - 1) + (at,)] for sample, at in zip(x, index, strict=True)])


def check(tensors: Sequence[Tensor], index: Tensor, dims: Sequence[int]) -> None:
    for got, x, dim in zip(gather_columns(tensors, index, dims), tensors, dims, strict=True):
        expected = by_definition(x, index, dim)
        assert got.dtype == x.dtype
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert torch.equal(raw(got), raw(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "inner"), [(1, 1), (2, 3), (17, 64), (577, 80), (6, 3584)])
def test_any_dtype_bit_for_bit(dtype: torch.dtype, width: int, inner: int, launches: list[int]) -> None:
    x = bits(0, 2, width, inner, dtype=dtype)
    check([x], columns(1, 2, width, (width + 1) // 2), [1])
    assert launches == [1]


def test_what_a_layer_holds(launches: list[int]) -> None:
    hidden, mask = bits(0, 2, 40, 96, dtype=torch.bfloat16), bits(1, 2, 40, dtype=torch.bool)
    key, value = bits(2, 2, 4, 40, 16, dtype=torch.bfloat16), bits(3, 2, 40, 4, 16).transpose(1, 2)
    cos, ids = bits(4, 1, 40, 16).expand(2, -1, -1), torch.arange(240, device=DEVICE).view(3, 2, 40).transpose(0, 1)
    pairs = bits(5, 2, 3, 40, 2, 5, dtype=torch.float16)
    check([hidden, mask, key, value, cos, ids, pairs], columns(6, 2, 40, 11), [1, 1, 2, 2, 1, 2, 2])
    assert launches == [4, 3]


def test_many_tensors_take_a_launch_for_every_four(launches: list[int]) -> None:
    tensors = [bits(i, 2, 3, 9, 4, dtype=DTYPES[i % len(DTYPES)]) for i in range(11)]
    check(tensors, columns(0, 2, 9, 5), [2] * 11)
    assert launches == [4, 4, 3]


def test_the_shapes_of_a_real_prompt(launches: list[int]) -> None:
    check(
        [bits(0, 1, 2928, 128, dtype=torch.bfloat16), bits(1, 1, 2928, dtype=torch.int64)],
        columns(2, 1, 2928, 320),
        [1, 1],
    )
    assert launches == [2]


@SOME
@given(
    batch=st.integers(1, 3),
    width=st.sampled_from([1, 2, 17, 33]),
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), max_size=2),
            st.lists(st.sampled_from([1, 2, 5, 16]), max_size=2),
            st.sampled_from(DTYPES),
            st.sampled_from(["plain", "strided", "reversed axes", "cut"]),
        ),
        min_size=1,
        max_size=4,
    ),
    part=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_any_layout(batch, width, tensors, part, seed):
    made, dims = [], []
    for i, (before, after, dtype, layout) in enumerate(tensors):
        shape = (batch, *before, width, *after)
        if layout == "strided":
            x = bits(seed + i, *shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
        elif layout == "reversed axes":
            x = bits(seed + i, *reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))
        elif layout == "cut":
            x = bits(seed + i, *(n + 1 for n in shape), dtype=dtype)[(slice(1, None),) * len(shape)]
        else:
            x = bits(seed + i, *shape, dtype=dtype)
        made.append(x)
        dims.append(1 + len(before))
    index = columns(seed, batch, width, max(1, round(part * width)))
    check(made, index.T.contiguous().T, dims)


def test_repeated_and_no_columns() -> None:
    x = bits(0, 2, 9, 4)
    check([x], torch.tensor([[3, 3, 0], [8, 8, 8]], device=DEVICE), [1])
    check([x], torch.zeros(2, 0, dtype=torch.long, device=DEVICE), [1])
    check([x[..., :0]], torch.zeros(2, 3, dtype=torch.long, device=DEVICE), [1])
    assert gather_columns([x[:0]], torch.zeros(0, 3, dtype=torch.long, device=DEVICE))[0].shape == (0, 3, 4)
    assert gather_columns([], torch.zeros(2, 3, dtype=torch.long, device=DEVICE)) == ()


def test_nothing_outside_the_tensor_is_read() -> None:
    x = bits(0, 2, 9, 4, dtype=torch.int32)
    index = torch.tensor([[0, -1, 9], [2**40, 4, -(2**40)]], device=DEVICE)
    (got,) = gather_columns([x], index)
    assert torch.equal(got[0, 0], x[0, 0])
    assert torch.equal(got[1, 1], x[1, 4])
    assert got[0, 1:].eq(0).all()
    assert got[1, ::2].eq(0).all()


def test_gradients_and_complex_numbers_are_left_to_torch(launches: list[int]) -> None:
    index = columns(0, 2, 9, 4)
    x = torch.randn(2, 9, 3, device=DEVICE, requires_grad=True)
    (got,) = gather_columns([x], index)
    got.sum().backward()
    assert x.grad.sum() == 2 * 4 * 3
    check([torch.randn(2, 9, 3, dtype=torch.complex64, device=DEVICE)], index, [1])
    assert launches == []
    with torch.no_grad():
        check([x], index, [1])
    assert launches == [1]


def test_the_engine_gathers_a_stage_at_once(launches: list[int]) -> None:
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool, device=DEVICE)
    compact = Compaction.of(keep, [3, 2], [1, 2], pad_right=False)
    hidden, ids = bits(0, 2, 4, 8), torch.arange(8, device=DEVICE).view(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    states, left, real = compact.sequences(hidden, ids, mask)
    assert launches == [3]
    assert left[0].tolist() == [0, 2, 3]
    assert left[1, 1:].tolist() == [6, 7]
    assert real.tolist() == [[True] * 3, [False, True, True]]  # False at the hole
    assert torch.equal(raw(states[1, 1:]), raw(hidden[1, 2:]))


X = torch.zeros(2, 9, 4, device=DEVICE)
INDEX = torch.zeros(2, 3, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gather_columns([X], INDEX.int()), TypeError, ["int32"]),
        (lambda: gather_columns([X], INDEX[0]), ValueError, ["(3,)"]),
        (lambda: gather_columns([X], INDEX[:1]), ValueError, ["(2, 9, 4)", "(1, 3)"]),
        (lambda: gather_columns([X], INDEX, 0), ValueError, ["dim 0"]),
        (lambda: gather_columns([X], INDEX, 3), ValueError, ["dim 3"]),
        (lambda: gather_columns([X], INDEX, [1, 1]), ValueError, ["2 dims", "1 tensors"]),
        (lambda: gather_columns([X, X[:, 1:]], INDEX), ValueError, ["(2, 8, 4)"]),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_is_named(
    call: Callable[[], Any], error: type[Exception], words: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTC_BACKEND", backend)
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_it_is_one_graph(backend: str, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTC_BACKEND", backend)
    x, key, index = bits(0, 2, 9, 4, dtype=torch.int32), bits(1, 2, 3, 9, 4, dtype=torch.int64), columns(2, 2, 9, 5)
    compiled = torch.compile(lambda: gather_columns([x, key], index, [1, 2]), fullgraph=True, backend="eager")()
    assert launches == []
    for got, expected in zip(compiled, gather_columns([x, key], index, [1, 2]), strict=True):
        assert torch.equal(got, expected)
