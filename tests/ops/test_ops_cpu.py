"""The picks of `vtc.ops.cpu` and `vtc.ops.filtered` are those of the recursion, whatever the data, and are made so only
where that may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtc import ops
from vtc.ops import cpu, filtered, recursion

MODES = ["isolated", "k_center", "mmr", "weights"]
KINDS = ["gauss", "shift", "coarse", "duplicates", "twins", "clusters", "one-hot", "same", "zeros"]
SCALE = recursion.UNIT**-2


def data(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "shift":
        return x + 1
    if kind == "coarse":  # few distinct cosines
        return x.round()
    if kind == "duplicates":
        return x[torch.randint(0, max(1, n // 3), (n,), generator=generator)]
    if kind == "twins":  # nobody is more isolated than anybody else
        return x[torch.randperm(n, generator=generator) // 2]
    if kind == "clusters":
        return x[torch.randint(0, max(1, n // 20), (n,), generator=generator)] + 0.3 * x
    if kind == "near":  # pairs that float32 products can hardly tell apart
        return x[torch.arange(n) // 2] + 1e-6 * x
    if kind == "one-hot":
        return torch.eye(n, d)
    if kind == "same":
        return torch.ones(n, d)
    if kind == "zeros":  # and rows without a direction
        x[::3] = 0.0
        x[1::7] = math.nan
    return x


@contextmanager
def by(way: Any, panel: int = 256, chunk: int = 256) -> Iterator[None]:
    """Have picks made in one way: one of the functions of `recursion`, or `None`, the recursion itself."""
    chosen = recursion.unbranched() if way is None else mock.patch.object(recursion, "_branching", return_value=way)
    with chosen, mock.patch.object(cpu, "PANEL", panel), mock.patch.object(cpu, "CHUNK", chunk):
        yield


def lazy(on: bool, panel: int = 256, chunk: int = 256) -> Any:
    return by(recursion._lazy_picks if on else None, panel, chunk)


def way(
    n: int, k: int, d: int = 8, b: int = 1, device: str = "cpu", start: int | None = None, sums: bool = False
) -> Any:
    """Which way would be taken."""
    x = torch.zeros(b, n, d, device=device)
    given = None if start is None else torch.full((b,), start)
    return recursion._branching(recursion.Job(x, k, x[..., 0] == 0, given, None, 0.0, sums))


def run(mode: str, x: Tensor, k: int, balance: float = 0.4, mask: Tensor | None = None) -> Tensor:
    if mode == "isolated":
        return ops.farthest_first(x, k, mask=mask)
    if mode == "k_center":
        return ops.farthest_first(x, k, start=x.shape[-2] // 2, mask=mask)
    importance = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(1))
    if mode == "weights":
        return ops.farthest_first(x, k, mask=mask, weights=importance.mul(8).round() / 8 * balance)
    return ops.max_marginal_relevance(x, importance.mul(8).round() / 8, k, balance, mask=mask)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    n=st.sampled_from([1, 2, 3, 17, 64, 150]),
    d=st.sampled_from([1, 3, 64, 257]),
    part=st.floats(0, 1),
    panel=st.sampled_from([1, 4, 16, 256]),
    chunk=st.sampled_from([1, 8, 40, 256]),
    balance=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    real=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_lazy_picks_are_those_of_the_recursion(mode, kind, n, d, part, panel, chunk, balance, real, seed):
    x, k = torch.stack([data(kind, n, d, seed), data("gauss", n, d, seed)]), 1 + int(part * (n - 1))
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < real
    with lazy(False):
        expected = run(mode, x, k, balance, mask)
    with lazy(True, panel, chunk):
        assert torch.equal(run(mode, x, k, balance, mask), expected)
        assert torch.equal(run(mode, x[1], k, balance), run(mode, x[1:], k, balance)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "n", "k", "d"), [("gauss", 2880, 320, 256), ("twins", 2000, 200, 64)])
def test_a_real_size(mode, kind, n, k, d):
    x = data(kind, n, d)
    assert way(n, k, d) is recursion._lazy_picks
    with lazy(False):
        expected = run(mode, x, k)
    assert torch.equal(run(mode, x, k), expected)


def test_a_wide_real_size():
    x = data("clusters", 1600, 4096)
    with lazy(False):
        expected = ops.farthest_first(x, 160)
    assert torch.equal(ops.farthest_first(x, 160), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_autocast(dtype):
    x = data("shift", 300, 64).to(dtype)
    with lazy(False):
        expected = ops.farthest_first(x, 90)
    with lazy(True, 16, 16), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.farthest_first(x, 90), expected)


@pytest.mark.parametrize(("d", "kind"), [(1, "gauss"), (64, "gauss"), (4096, "shift"), (4096, "same"), (16384, "same")])
def test_float32_products_stay_within_the_bound(d, kind):
    z = recursion._unit_integers(data(kind, 40, d)).float()
    exact = cpu._exact(z.double(), z.double(), SCALE)
    off = ((z @ z.mT).mul_(SCALE) - exact).abs().max()
    forwards = torch.zeros(40, 40)
    for i in range(d if d <= 4096 else 0):  # the longest chain of roundings there is
        forwards += z[:, i, None] * z[None, :, i]
    if d <= 4096:
        off = torch.maximum(off, (forwards * SCALE - exact).abs().max())
    assert off <= cpu.cosine_error(d) < 1.1e-7 * (d + 8)


@pytest.mark.parametrize(("mode", "kind", "error"), [("k_center", "gauss", -0.1), ("isolated", "twins", 0.0)])
def test_a_bound_that_is_no_bound_is_noticed(mode, kind, error, monkeypatch):
    images = [data(kind, 150, 257, seed) for seed in range(20)]
    with lazy(False):
        expected = [run(mode, x, 40) for x in images]
    monkeypatch.setattr(cpu, "cosine_error", lambda d: error)
    with lazy(True, 16, 150):
        got = [run(mode, x, 40) for x in images]
    assert any(not torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_the_search_is_given_up_where_all_are_alike():
    mask = torch.ones(512, dtype=torch.bool)
    unlike = recursion._unit_integers(data("gauss", 512, 64)).float()
    alike = recursion._unit_integers(torch.eye(512)).float()
    with lazy(True, 16, 16):
        assert cpu.most_isolated(unlike, SCALE, mask) == int(ops.farthest_first(unlike, 1)[0])
        assert cpu.most_isolated(alike, SCALE, mask) is None
        assert ops.farthest_first(torch.eye(512), 4).tolist() == [0, 1, 2, 3]
    assert cpu.most_isolated(unlike, SCALE, ~mask) == 0


@pytest.mark.parametrize(
    ("precision", "expected"), [("highest", True), ("high", False), ("medium", False)], ids=lambda p: str(p)
)
def test_shortened_float32_is_not_relied_on(precision, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert cpu.exact_float32() is expected
        assert (way(4000, 9) is not None) is expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_environment_may_shorten_float32_too(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert not cpu.exact_float32()


def test_each_way_where_it_may_and_pays():
    lazily, filtering = recursion._lazy_picks, recursion._filtered_picks
    assert way(2880, 320) is lazily
    assert way(2880, 2880) is filtering
    assert way(577, 64) is filtering
    assert way(577, 64, sums=True) is filtering
    assert way(2880, 320, sums=True, start=0) is filtering
    assert way(577, 288, sums=True) is None  # too many sums would be exact
    assert way(577, 64, 4096, sums=True) is None
    assert way(577, 2, start=0) is None  # two rows of products are enough
    assert way(144, 36, 192, b=8) is None  # together they are faster
    assert way(577, 64, 4096, b=8) is filtering
    assert way(2880, 320, b=0) is None
    assert way(2880, 320, device="meta") is None


# ------------------------------------------------------------------------------------------------------------- filtered


def sums(x: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    return ops.max_sum(x, k, start=x.shape[-2] // 2, mask=mask)


@pytest.mark.parametrize("mode", [*MODES, "sums"])
@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([*KINDS, "near"]),
    n=st.sampled_from([1, 2, 3, 17, 64, 150]),
    d=st.sampled_from([1, 3, 64, 257]),
    part=st.floats(0, 1),
    block=st.sampled_from([1, 16, 256]),
    piece=st.sampled_from([5, 64, 512]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    balance=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    real=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    spent=st.sampled_from([1 / 16, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_filtered_picks_are_those_of_the_recursion(
    mode, kind, n, d, part, block, piece, dtype, balance, real, spent, seed
):
    x, k = torch.stack([data(kind, n, d, seed), data("gauss", n, d, seed)]).to(dtype), 1 + int(part * (n - 1))
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < real
    settings_ = {"BLOCK": block, "PIECE": piece, "SPENT": spent}
    patches = [mock.patch.object(filtered, name, value) for name, value in settings_.items()]

    def picks(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return sums(x, k, mask) if mode == "sums" else run(mode, x, k, balance, mask)

    with by(None):
        expected = picks(x, mask)
    with patches[0], patches[1], patches[2], by(recursion._filtered_picks):
        assert torch.equal(picks(x, mask), expected)
        assert torch.equal(picks(x[1]), picks(x[1:])[0])


@pytest.mark.parametrize("mode", [*MODES, "sums"])
@pytest.mark.parametrize(("n", "k", "d"), [(576, 64, 1024), (576, 288, 2048), (1600, 800, 64)])
def test_filtered_picks_of_real_sizes(mode, n, k, d):
    x = data("clusters", n, d)
    picks = (lambda: sums(x, k)) if mode == "sums" else (lambda: run(mode, x, k))
    with by(None):
        expected = picks()
    with by(recursion._filtered_picks):
        assert torch.equal(picks(), expected)


def test_it_is_given_up_where_all_are_alike():
    cosines = filtered.Cosines(recursion._rounded(data("same", 600, 8)), SCALE)
    with pytest.raises(filtered.TooMuchAlikeError):
        filtered.most_isolated(cosines, torch.ones(600, dtype=torch.bool))
    with by(recursion._filtered_picks):
        assert ops.farthest_first(data("same", 600, 8), 9).tolist() == list(range(9))


@pytest.mark.parametrize("d", [1, 64, 1500, 4096])
@pytest.mark.parametrize("kind", ["gauss", "shift", "same"])
def test_a_cosine_lies_where_it_is_said_to(d, kind):
    z = recursion._rounded(data(kind, 40, d))
    cosines, exact = filtered.Cosines(z, SCALE), cpu._exact(z.double(), z.double(), SCALE)
    low = torch.from_numpy(cosines.low)
    assert (low <= exact).all()
    assert (exact <= low + float(cosines.width)).all()
    assert float(cosines.width) < 3.3e-7 * (min(d, 512) + 16)


@pytest.mark.parametrize("mode", ["k_center", "isolated", "sums"])
def test_a_width_that_is_none_is_noticed(mode, monkeypatch):
    """Pairs that differ by less than float32 products tell."""
    images = [data("near", 150, 257, seed) for seed in range(20)]
    picks = (lambda x: sums(x, 40)) if mode == "sums" else (lambda x: run(mode, x, 40))
    with by(None):
        expected = [picks(x) for x in images]
    monkeypatch.setattr(filtered, "cosine_error", lambda d: 0.0)
    with by(recursion._filtered_picks):
        got = [picks(x) for x in images]
    assert any(not torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_the_compiler_never_sees_it():
    x = data("gauss", 40, 8)
    with mock.patch.object(filtered, "nearest_picks", side_effect=AssertionError("branches on values")):
        compiled = torch.compile(lambda x: ops.farthest_first(x, 9), fullgraph=True, backend="eager")
        got = compiled(x)
        with pytest.raises(AssertionError):
            ops.farthest_first(x, 9)
    assert torch.equal(got, ops.farthest_first(x, 9))
