"""The greedy kernels pick what the torch reference picks: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be switched on before anything imports Triton. Where something did, the tests of this file run in
a process of their own, which the one test that is left starts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="Triton is made for Linux")
import triton.language as tl
from nosync import NoSync
from test_ops import MODES, PER_TOKEN, agree, data, naive, run
from triton.runtime.interpreter import InterpretedFunction

from vtc import ops
from vtc.ops import recursion
from vtc.ops.kernels import greedy as kernels
from vtc.ops.kernels import recursion as device_code

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN_PROCESS = DEVICE == "cpu" and not isinstance(tl.zeros, InterpretedFunction)
REGIMES = ["resident", "free"]
SOME = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

here = pytest.mark.skipif(OWN_PROCESS, reason="runs in a process of its own")
interpreted = pytest.mark.skipif(OWN_PROCESS or DEVICE != "cpu", reason="changes what is compiled")


@pytest.mark.skipif(not OWN_PROCESS, reason="this process interprets, or has a GPU")
def test_in_a_process_that_interprets():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=False, cwd=Path(__file__).parents[2], timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():  # numpy, about the rows that the kernels then set aside
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


def force(regime: str, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "GRAM_ROWS_PER_PICK", 10**9)
    monkeypatch.setattr(kernels, "GRAM_TOKENS", 10**9 if regime == "resident" else 0)


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter's time is the number of programs; the block sizes of the GPU are tested on small inputs."""
    usual = kernels._constants
    blocks = {
        "digits": {"ROWS": 128, "BLOCK": 1024},
        "gram": {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128},
        "step": {"ROWS": 128, "BLOCK": 1024, "PARTS": 32},
    }

    def constants(kernel: str, **sizes: int) -> dict:
        return usual(kernel, **sizes) | blocks.get(kernel, {})

    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_constants", constants)


def both(mode: str, x: Tensor, k: int, monkeypatch, **options) -> tuple[Tensor, Tensor]:
    """The picks of the kernels and of the reference."""
    x = x.to(DEVICE)
    options = {name: o.to(DEVICE) if isinstance(o, Tensor) else o for name, o in options.items()}
    monkeypatch.setenv("VTC_BACKEND", "torch")
    expected = run(mode, x, k, **dict(options))
    monkeypatch.setenv("VTC_BACKEND", "triton")
    return run(mode, x, k, **dict(options)), expected


def check(mode: str, x: Tensor, k: int, monkeypatch, **options) -> Tensor:
    got, expected = both(mode, x, k, monkeypatch, **options)
    assert got.dtype == torch.long
    assert torch.equal(got, expected)
    return got


def arguments(mode: str, n: int, seed: int = 0, balance: float = 0.3) -> dict:
    if mode == "weights":
        return {"weights": data(seed, n, 1)[:, 0].sigmoid().to(DEVICE)}
    if mode != "mmr":
        return {"start": n // 2} if mode != "isolated" else {}
    return {"importance": data(seed, n, 1)[:, 0].sigmoid().to(DEVICE), "balance": balance}


@here
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (1, 3584, 1), (2, 3, 2), (17, 64, 17)])
def test_small_sizes(mode, n, d, k, regime, monkeypatch):
    check(mode, data(n + d, n, d), k, monkeypatch, **arguments(mode, n))


@here
@pytest.mark.parametrize(
    ("mode", "n", "d", "k"),
    [
        ("isolated", 17, 3584, 17),
        ("k_center", 577, 3, 577),
        ("max_sum", 577, 64, 40),
        ("mmr", 577, 1024, 24),
        ("isolated", 2928, 1, 5),
        ("weights", 577, 64, 24),
    ],
)
def test_large_sizes(mode, n, d, k, monkeypatch, large_blocks):
    force("resident", monkeypatch)
    check(mode, data(n + d, n, d), k, monkeypatch, **arguments(mode, n))


@here
@pytest.mark.parametrize(
    ("mode", "n", "d", "k"),
    [
        ("k_center", 17, 3584, 17),
        ("isolated", 577, 64, 9),
        ("mmr", 577, 1024, 5),
        ("max_sum", 2928, 64, 6),
        ("mmr", 2928, 3, 6),
        ("weights", 577, 64, 9),
    ],
)
def test_large_sizes_pick_by_pick(mode, n, d, k, monkeypatch, large_blocks):
    force("free", monkeypatch)
    check(mode, data(n + d, n, d), k, monkeypatch, **arguments(mode, n))


@here
def test_the_block_sizes_of_the_gpu(regime, monkeypatch):
    check("isolated", data(1, 150, 160, kind="shift"), 4, monkeypatch)


@here
@pytest.mark.parametrize("mode", MODES)
def test_the_definition_in_float64(mode, regime, monkeypatch):
    x, importance = data(5, 40, 64), data(6, 40, 1)[:, 0].sigmoid()
    options = arguments(mode, 40) | ({PER_TOKEN[mode]: importance.to(DEVICE)} if mode in PER_TOKEN else {})
    expected, margins = naive(mode, x, 20, 20, importance, 0.3)
    assert sum(m > 1e-6 for m in margins) > 15  # else this test compares nothing
    monkeypatch.setenv("VTC_BACKEND", "triton")
    assert agree(run(mode, x.to(DEVICE), 20, **options).cpu(), expected, margins, 1e-6)


@here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_dtypes(dtype, regime, monkeypatch):
    check("isolated", data(3, 2, 20, 48, kind="shift").to(dtype), 8, monkeypatch)


@here
@pytest.mark.parametrize("balance", [0.0, 0.1, 1.0])
def test_balances(balance, regime, monkeypatch):
    check("mmr", data(4, 17, 16), 17, monkeypatch, **arguments("mmr", 17, balance=balance))


@here
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("regime", REGIMES)
@SOME
@given(
    lengths=st.lists(st.sampled_from([1, 2, 5, 17, 33]), min_size=1, max_size=3),
    d=st.sampled_from([1, 3, 64]),
    kind=st.sampled_from(["gauss", "coarse", "duplicates", "shift"]),
    poison=st.sampled_from([math.nan, math.inf, 0.0, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scattered=st.booleans(),
    extra=st.integers(0, 7),
    part=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_ragged_batches(mode, regime, lengths, d, kind, poison, dtype, scattered, extra, part, seed):
    n, b = max(lengths) + extra, len(lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    if scattered:
        mask = torch.stack([row[torch.randperm(n, generator=generator)] for row in mask])
    x = data(seed, b, n, d, kind=kind).masked_fill(~mask[..., None], poison).to(dtype)
    options = {"mask": mask}
    if mode == "mmr":
        importance = data(seed + 1, b, n).sigmoid()
        options |= {"importance": importance.masked_fill(~mask, poison), "balance": 0.5}
    elif mode == "weights":
        options["weights"] = data(seed + 1, b, n).relu().masked_fill(~mask, poison)
    elif mode != "isolated":
        options["start"] = torch.randint(0, n, (b,), generator=generator)  # padding, too
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(regime, monkeypatch)
        check(mode, x, 1 + int(part * (n - 1)), monkeypatch, **options)


@here
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["ties", "nan", "zeros", "odd rows"])
def test_ties_and_rows_without_a_direction(mode, kind, regime, monkeypatch):
    x = {"ties": torch.ones(9, 4), "nan": torch.full((9, 4), math.nan), "zeros": torch.zeros(9, 4)}.get(kind)
    if x is None:
        x = data(2, 9, 4)
        x[1], x[3, 2], x[4, 0], x[6] = 0.0, math.nan, math.inf, -math.inf
    options = arguments(mode, 9)
    if mode == "mmr" and kind == "ties":
        options["importance"] = torch.full((9,), 0.5)
    got = check(mode, x, 9, monkeypatch, **options)
    if kind == "ties":
        start = 4 if mode in ("k_center", "max_sum") else 0
        assert got.tolist() == [start, *(i for i in range(9) if i != start)]


@here
@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e18, 3e38])
def test_length_does_not_matter(scale, monkeypatch):
    x = data(1, 20, 5).clamp(-1, 1)
    x[::2] *= scale
    check("isolated", x, 20, monkeypatch)


@here
@pytest.mark.parametrize("mode", MODES)
def test_batches_in_parts(mode, monkeypatch):
    force("resident", monkeypatch)
    x = data(3, 3, 20, 8)
    options = {PER_TOKEN[mode]: data(1, 3, 20).sigmoid()} if mode in PER_TOKEN else {}
    whole = check(mode, x, 7, monkeypatch, **options)
    monkeypatch.setattr(kernels, "RESIDENT", 2 * (4 * 128 * 128 + 3 * 128 * 128))
    assert torch.equal(check(mode, x, 7, monkeypatch, **options), whole)
    force("free", monkeypatch)
    monkeypatch.setattr(kernels, "GRID", 2)
    assert torch.equal(check(mode, x, 7, monkeypatch, **options), whole)


@here
def test_few_picks_need_no_matrix(monkeypatch):
    monkeypatch.setattr(kernels._Launches, "with_matrix", None)
    monkeypatch.setattr(kernels, "GRAM_ROWS_PER_PICK", 4)
    check("k_center", data(0, 30, 4), 7, monkeypatch)
    with pytest.raises(TypeError, match="NoneType"):
        check("k_center", data(0, 30, 4), 8, monkeypatch)


@here
@pytest.mark.parametrize("mode", ["isolated", "mmr"])
def test_views(mode, regime, monkeypatch):
    options = {"importance": data(1, 20, 2).sigmoid().mT} if mode == "mmr" else {}
    x = data(0, 40, 2, 24)
    views = {
        "transposed": x.transpose(0, 1)[:, ::2, 3:19],
        "columns": x[:20, :, ::2].transpose(0, 1),
        "expanded": x[:20, 0].expand(2, 20, 24),
    }
    for name, view in views.items():
        assert not view.is_contiguous(), name
        mask = (torch.arange(40) % 3 > 0).view(20, 2).mT
        check(mode, view, 6, monkeypatch, mask=mask, **options)


@here
def test_inputs_are_left_alone(regime, monkeypatch):
    x = data(0, 2, 9, 4).to(DEVICE).requires_grad_()
    importance, mask = torch.rand(2, 9, device=DEVICE), torch.rand(2, 9, device=DEVICE) > 0.3
    before = x.detach().clone(), importance.clone(), mask.clone()
    monkeypatch.setenv("VTC_BACKEND", "triton")
    assert not ops.max_marginal_relevance(x, importance, 5, mask=mask).requires_grad
    assert all(torch.equal(a, b) for a, b in zip((x.detach(), importance, mask), before, strict=True))


@here
def test_empty_batches_and_rows_too_wide(monkeypatch):
    check("isolated", torch.zeros(0, 5, 3), 2, monkeypatch)
    monkeypatch.setattr(kernels, "WIDEST", 7)
    monkeypatch.setattr(kernels, "_Launches", None)  # the reference makes these picks
    check("isolated", data(0, 9, 8), 4, monkeypatch)


@here
def test_nothing_waits_for_the_device(regime, monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "triton")
    x, mask = data(0, 2, 9, 4).to(DEVICE), (torch.arange(9) < torch.tensor([[9], [6]])).to(DEVICE)
    with NoSync():
        for mode in MODES:
            run(mode, x, 4, mask=mask)


BAD = {
    "k > N": lambda x: ops.farthest_first(x, 8),
    "k = 0": lambda x: ops.max_sum(x, 0, 0),
    "no token": lambda x: ops.farthest_first(x[:0], 1),
    "start": lambda x: ops.max_sum(x, 3, 7),
    "starts": lambda x: ops.max_sum(x, 3, torch.tensor([1, 2], device=x.device)),
    "integers": lambda x: ops.farthest_first(x.long(), 3),
    "one row": lambda x: ops.farthest_first(x[0], 3),
    "mask shape": lambda x: ops.farthest_first(x, 3, mask=torch.ones(6, dtype=torch.bool, device=x.device)),
    "mask dtype": lambda x: ops.farthest_first(x, 3, mask=torch.ones(7, device=x.device)),
    "mask device": lambda x: ops.farthest_first(x, 3, mask=torch.ones(7, dtype=torch.bool, device="meta")),
    "importance device": lambda x: ops.max_marginal_relevance(x, torch.ones(7, device="meta"), 3),
    "balance": lambda x: ops.max_marginal_relevance(x, torch.ones(7, device=x.device), 3, balance=1.5),
}


@here
@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_the_same_errors(call, monkeypatch):
    caught = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("VTC_BACKEND", backend)
        with pytest.raises((ValueError, TypeError)) as error:
            call(torch.randn(7, 3, device=DEVICE))
        caught.append((error.type, str(error.value)))
    assert caught[0] == caught[1]


def launches_of(x: Tensor) -> kernels._Launches:
    """For a first pick of token 0, out of all."""
    mask, start = torch.ones(x.shape[:2], dtype=torch.uint8), torch.zeros(len(x), dtype=torch.long)
    return kernels._Launches(recursion.Job(x, 1, mask.to(x.device), start.to(x.device), None, 0.0, False))


def similarities(x: Tensor) -> Tensor:
    """The matrix that the loop reads."""
    n, launches = x.shape[1], launches_of(x)
    matrix = torch.full((x.shape[0], launches.tiles * 128, launches.tiles * 128), math.nan, device=x.device)
    launches._gram(launches._planes(), matrix)
    return matrix[:, :n, :n]


def same_bits(kind: str) -> bool:
    x = data(7, 2, 150, 300, kind=kind).to(DEVICE)
    return torch.equal(similarities(x), recursion._by_gram(recursion._unit_integers(x))(slice(0, 150)))


@here
@pytest.mark.parametrize("kind", ["gauss", "shift", "duplicates"])
def test_similarities_are_the_bits_of_the_reference(kind, large_blocks):
    assert same_bits(kind)


@interpreted
@pytest.mark.parametrize(
    ("constant", "value"),
    [("_ROUND", 0.0), ("_UNIT", recursion.UNIT - 1), ("_UNIT_SQUARED", (recursion.UNIT + 1) ** -2)],
)
def test_wrong_bits_are_noticed(constant, value, monkeypatch, large_blocks):
    monkeypatch.setattr(device_code, constant, tl.constexpr(value))
    assert not same_bits("gauss")


@interpreted
@pytest.mark.parametrize(("constant", "value"), [("_LONE", 2.0), ("_PADDING", 0.5), ("_INFINITY", 0.5)])
def test_wrong_picks_are_noticed(constant, value, regime, monkeypatch):
    monkeypatch.setattr(device_code, constant, tl.constexpr(value))
    got, expected = both("isolated", data(0, 12, 8), 12, monkeypatch, mask=torch.arange(12) % 4 > 0)
    assert not torch.equal(got, expected)


@here
def test_length_is_the_same_in_every_order():
    x = data(0, 1, 40, 700, kind="shift").to(DEVICE)
    x[:, ::2] *= torch.logspace(-30, 30, 700, base=2.0, device=DEVICE)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def scales(rows: Tensor) -> Tensor:
        launches = launches_of(rows.contiguous())
        launches._digits(None)
        return launches.scale

    assert torch.equal(scales(x), scales(x[..., order]))
    assert torch.equal(scales(x), scales(x.flip(-1)))
    squares = x.double().square()
    assert not torch.equal(squares.cumsum(-1)[..., -1], squares[..., order].cumsum(-1)[..., -1])  # else this is no test
    assert ((recursion.UNIT / squares.sum(-1).sqrt() / scales(x)) - 1).abs().max() < 1e-15
