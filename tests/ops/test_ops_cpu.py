"""The lazy picks of `vtc.ops.cpu` are those of the recursion, whatever the data, and run only where they may."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtc import ops
from vtc.ops import cpu, recursion

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
    if kind == "one-hot":
        return torch.eye(n, d)
    if kind == "same":
        return torch.ones(n, d)
    if kind == "zeros":  # and rows without a direction
        x[::3] = 0.0
        x[1::7] = math.nan
    return x


@contextmanager
def lazy(on: bool, panel: int = 256, chunk: int = 256):
    tokens = mock.patch.object(recursion, "LAZY_TOKENS", 1 if on else 10**9)
    share = mock.patch.object(recursion, "LAZY_SHARE", 1.0)
    with tokens, share, mock.patch.object(cpu, "PANEL", panel), mock.patch.object(cpu, "CHUNK", chunk):
        yield


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
    assert recursion._lazy(x[None], k, running_sum=False)
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
    assert off <= cpu._error(d) < 1.1e-7 * (d + 8)


@pytest.mark.parametrize(("mode", "kind", "error"), [("k_center", "gauss", -0.1), ("isolated", "twins", 0.0)])
def test_a_bound_that_is_no_bound_is_noticed(mode, kind, error, monkeypatch):
    images = [data(kind, 150, 257, seed) for seed in range(20)]
    with lazy(False):
        expected = [run(mode, x, 40) for x in images]
    monkeypatch.setattr(cpu, "_error", lambda d: error)
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
        assert recursion._lazy(torch.zeros(1, 4000, 8), 9, running_sum=False) is expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_environment_may_shorten_float32_too(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert not cpu.exact_float32()


def test_lazy_where_it_may_and_pays():
    x = torch.zeros(1, 2880, 8)
    assert recursion._lazy(x, 320, running_sum=False)
    assert not recursion._lazy(x, 320, running_sum=True)
    assert not recursion._lazy(x, 2880, running_sum=False)
    assert not recursion._lazy(x[:, :577], 64, running_sum=False)
    assert not recursion._lazy(x[:0], 320, running_sum=False)
    assert not recursion._lazy(x.to("meta"), 320, running_sum=False)


def test_the_compiler_never_sees_it():
    x = data("gauss", 40, 8)
    with lazy(True), mock.patch.object(cpu, "lazy_picks", side_effect=AssertionError("branches on values")):
        compiled = torch.compile(lambda x: ops.farthest_first(x, 9), fullgraph=True, backend="eager")
        got = compiled(x)
        with pytest.raises(AssertionError):
            ops.farthest_first(x, 9)
    assert torch.equal(got, ops.farthest_first(x, 9))
