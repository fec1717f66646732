"""Lazy greedy cover against the loop that looks at everybody."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtc
from vtc.methods import scope
from vtc.ops.cover import cover_lazily


def looking_at_all(likeness: Tensor, weight: Tensor, mask: Tensor, k: int, multiplied: bool) -> list[int]:
    cover, free, picks = torch.zeros_like(weight), mask.clone(), []
    for _ in range(min(k, int(mask.sum()))):
        gain = torch.maximum(likeness, cover).sum(-1) - cover.sum()
        worth = (gain * weight if multiplied else gain + weight).masked_fill(~free, -torch.inf)
        pick = int((worth == worth.max()).nonzero()[0])
        free[pick] = False
        cover = torch.maximum(cover, likeness[pick])
        picks.append(pick)
    return picks


def drawn(n: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 6, generator=generator)
    weight = torch.rand(n, generator=generator).double()
    mask = torch.rand(n, generator=generator) > 0.1
    if kind == "copies":
        x, weight = x[: n // 4].repeat(4, 1), weight[: n // 4].repeat(4)
    if kind == "zeros":
        x[::3], weight[::2] = 0.0, 0.0
    like = scope.rounded_cosines(x[None], mask[None, : len(x)])[0]
    return like, weight[: len(x)], mask[: len(x)]


@pytest.mark.parametrize("kind", ["drawn", "copies", "zeros"])
@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize(("n", "k"), [(8, 3), (40, 40), (200, 60), (200, 190)])
def test_picks_are_the_same(n: int, k: int, multiplied: bool, kind: str) -> None:
    like, weight, mask = drawn(n, kind)
    worth = torch.mul if multiplied else torch.add
    found = cover_lazily(like, weight, mask, k, worth)
    expected = looking_at_all(like, weight, mask, k, multiplied)
    assert found[: len(expected)].tolist() == expected
    assert len(found) == k


@pytest.mark.parametrize("combined", ["multi", "add"])
def test_scope_is_the_same_by_either_way(combined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    row = torch.rand(300, generator=torch.Generator().manual_seed(2))
    method = vtc.SCOPE(keep=120, combined=combined)
    whole = vtc.select(method, x, signals={"cls": row})
    monkeypatch.setattr(scope, "MANY", 0)
    asked = []
    real = scope.cover_lazily
    monkeypatch.setattr(scope, "cover_lazily", lambda *a: asked.append(1) or real(*a))
    lazy = vtc.select(method, x, signals={"cls": row})
    assert asked
    assert lazy.order is not None
    assert whole.order is not None
    assert lazy.order.equal(whole.order)
