"""Adaptive budgets: as many picks as cover the image, against loops by hand; what is guaranteed and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, ClassVar

import pytest
import torch
from asking import entering
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync
from reference import decoder_call
from test_contract import batch_of, check, continued, run
from torch import Tensor
from zoo import get_model, models

import vtc
import vtc.ops.merging
from vtc import ops
from vtc.config import CompressionConfig
from vtc.methods import Method, Reduction, returns
from vtc.methods.adaptive import Adaptive
from vtc.methods.allocate import Allocate
from vtc.methods.base import keeps_all
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.merge import Merge
from vtc.methods.random import Random
from vtc.methods.scope import SCOPE
from vtc.methods.visionzip import VisionZip
from vtc.profiling.correctness import keeping_all
from vtc.profiling.estimate import estimate
from vtc.tokens import Layout, Segment, VisualTokens
from vtc_vllm.selection import settle
from vtc_vllm.settings import read

SELECTORS = [
    vtc.DivPrune(),
    vtc.ToDRE(),
    vtc.ToDRE(variant="k_center", pivot="random"),
    vtc.IDPruner(importance=vtc.FeatureNorm()),
    SCOPE(),
    FasterVLM(),
    Random(seed=3),
]


def distances(x: Tensor) -> Tensor:
    """Float64 [N, N]: 1 - cosine, where a row without a direction has distance 1 to all."""
    lengths = x.double().norm(dim=-1, keepdim=True)
    rows = torch.where(lengths > 0, x.double() / lengths, 0.0)
    return 1.0 - rows @ rows.T


def covered(away: Tensor, picks: list[int], radius: float) -> bool:
    """Whether every token is a pick or has one within the radius."""
    return all(i in picks or any(away[i, j] <= radius + 2e-6 for j in picks) for i in range(len(away)))


def by_hand(x: Tensor, order: list[int], radius: float) -> int:
    """How many of the picks are needed; all of them if they are too few."""
    away = distances(x)
    return next((k for k in range(1, len(order) + 1) if covered(away, order[:k], radius)), len(order))


def drawn(n: int, seed: int = 0, d: int = 6, clusters: int = 5, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Tokens around a few centres, and a CLS row."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, d, generator=generator)
    which = torch.randint(0, clusters, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, d, generator=generator), torch.rand(n, generator=generator)


# ----------------------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    radius=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    most=st.sampled_from([0.1, 0.5, 1.0, 3]),
)
def test_the_least_picks_that_cover_the_image(
    selector: Method, n: int, seed: int, spread: float, radius: float, most: float
) -> None:
    if isinstance(most, int):
        most = min(most, n)
    x, cls = drawn(n, seed, spread=spread)
    order = vtc.select(dataclasses.replace(selector, keep=n), x, keep=n, signals={"cls": cls}).order
    picks = order.tolist()[: vtc.budget.count(most, n)]
    found = vtc.select(Adaptive(selector, radius=radius, at_most=most), x, signals={"cls": cls})
    k = by_hand(x, picks, radius)
    assert found.order.tolist() == picks[:k]
    if k < len(picks):  # what is promised
        assert covered(distances(x), picks[:k], radius)
    assert k == 1 or not covered(distances(x), picks[: k - 1], radius)


@pytest.mark.parametrize("selector", [vtc.DivPrune(), vtc.ToDRE(variant="k_center", pivot="random"),
                                      vtc.IDPruner(importance=vtc.FeatureNorm(), balance=0.0)], ids=str)  # fmt: skip
@pytest.mark.parametrize("most", [1.0, 0.4])
def test_farthest_first_is_near_the_least_that_any_choice_needs(selector: Method, most: float) -> None:
    """By trying all choices of a small image."""
    stopped = cut = 0
    for seed in range(12):
        x, _ = drawn(8, seed, d=3, spread=0.6)
        away, radius = distances(x), 0.25
        found = vtc.select(Adaptive(selector, radius=radius, at_most=most), x).index.tolist()
        left = float(away[:, found].amin(1).max())
        k, within = (len(found), left / 4 - 1e-6) if left > radius + 2e-6 else (len(found) - 1, radius / 4)
        stopped, cut = stopped + (left <= radius), cut + (left > radius)
        for size in range(1, k + 1):
            for choice in itertools.combinations(range(8), size):
                assert not bool((away[:, list(choice)].amin(1) <= within).all()), (seed, found, choice)
    assert stopped if most == 1.0 else cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_radius_zero_keeps_one_of_each(dtype: Any) -> None:
    x = torch.randn(9, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    which = torch.arange(50) % 9
    x = x[which] * torch.tensor([1.0, 3.0, 0.1])[torch.arange(50) % 3, None].to(torch.float32)
    found = vtc.select(Adaptive(vtc.DivPrune(), radius=0.0, at_most=1.0), x)
    assert sorted(which[found.index].tolist()) == [*range(9)]
    assert len(vtc.select(Adaptive(radius=0.0), torch.ones(20, 3)).index) == 1


def test_tokens_without_a_direction_can_only_be_kept() -> None:
    x, _ = drawn(30, spread=0.0, clusters=3)
    x[4] = x[17] = 0.0
    for selector in (vtc.DivPrune(), Random()):
        found = vtc.select(Adaptive(selector, radius=0.99, at_most=1.0), x)
        assert {4, 17} <= set(found.index.tolist())
    found = vtc.select(Adaptive(vtc.DivPrune(), radius=0.0, at_most=1.0), x)
    assert len(found.index) == 3 + 2
    assert len(vtc.select(Adaptive(radius=0.99, at_most=0.3), torch.zeros(20, 3)).index) == 6


def test_a_plain_image_keeps_fewer_than_a_rich_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a ragged batch, worked off in parts of any size, each as it would be alone."""
    lengths, method = (40, 25, 40, 1), Adaptive(vtc.DivPrune(), radius=0.3, at_most=0.5)
    features = torch.full((4, 43, 6), math.nan)
    for g, (n, spread) in enumerate(zip(lengths, (0.05, 0.9, 5.0, 0.0), strict=True)):
        features[g, :n] = drawn(n, seed=g, spread=spread)[0]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2, 3))
    together = entering(method, tokens)
    assert together.counts[0] < together.counts[1] < together.counts[2] == 20
    monkeypatch.setattr(vtc.ops.merging, "ENTRIES", 150)
    assert torch.equal(entering(method, tokens).mask, together.mask)
    for g, n in enumerate(lengths):
        alone = VisualTokens(features[g : g + 1, :n], (Layout.plain(n),), (g,))
        assert torch.equal(entering(method, alone).mask[0], together.mask[g, :n])
        assert together.mask[g].sum() == together.counts[g]


def test_newlines_compete_or_are_no_part_of_it() -> None:
    layout = Layout(12, (Segment("image", 0, 12, (3, 3), True),))
    x = torch.eye(12)[[0, 0, 0, 9, 1, 1, 1, 9, 2, 2, 2, 9]]
    found = vtc.select(Adaptive(vtc.DivPrune(), at_most=1.0), x, layout=layout)
    assert sorted(x[found.index].argmax(-1).tolist()) == [0, 1, 2, 9]
    found = vtc.select(Adaptive(vtc.DivPrune(newlines="keep"), at_most=1.0), x, layout=layout)
    assert sorted(x[found.index].argmax(-1).tolist()) == [0, 1, 2, 9, 9, 9]
    found = vtc.select(Adaptive(vtc.DivPrune(newlines="keep"), at_most=0.2), x, layout=layout)
    assert len(found.index) == 2 + 3  # of the nine others


def test_it_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    tolist = Tensor.tolist
    monkeypatch.setattr(returns, "_looks", lambda *a: False)  # as on a GPU
    monkeypatch.setattr(Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    lengths = (20, 9)
    features = torch.stack([torch.nn.functional.pad(drawn(n)[0], (0, 0, 0, 20 - n)) for n in lengths])
    with NoSync():
        entering(Adaptive(), VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1)))
    assert len(waits) == 1


def test_first_near_by_loops() -> None:
    x = drawn(20)[0].repeat(2, 1, 1)
    x[1] = drawn(20, seed=1)[0]
    x[0, 9] = 0.0  # picked, and like nothing
    picks = torch.tensor([[3, 9, 1], [5, 20, 20]])
    found = ops.first_near(x, picks, 0.5)
    for g, chosen in enumerate(([3, 9, 1], [5])):
        like = ops.cosines(x[g])
        for i in range(20):
            near = [k for k, p in enumerate(chosen) if p == i or like[i, p] >= 0.5]
            assert found[g, i] == (near[0] if near else 3)


# ------------------------------------------------------------------------------------------------------------- options


def test_at_most_is_the_keep() -> None:
    method = Adaptive(vtc.DivPrune(newlines="keep"), radius=0.3, at_most=0.6)
    assert (method.keep, method.newlines, method.selector) == (0.6, "keep", vtc.DivPrune(keep=0.6, newlines="keep"))
    assert (
        method == Adaptive(vtc.DivPrune(keep=0.6, newlines="keep")) == Adaptive(vtc.DivPrune(newlines="keep"), keep=0.6)
    )
    assert dataclasses.replace(method, keep=9).selector.keep == 9
    assert Adaptive(keep=0.6, at_most=0.6).keep == 0.6
    assert type(Adaptive(at_most=1).keep) is int
    assert (Adaptive().keep, Adaptive().radius) == (0.5, 0.3)
    assert vtc.select("adaptive", drawn(20)[0], keep=0.2, selector=Random()).index.shape == (4,)
    for first, second in ((0.5, 0.6), (1, 1.0)):
        with pytest.raises(ValueError, match=rf"at_most={second} and keep={first} are two names"):
            Adaptive(keep=first, at_most=second)
    with pytest.raises(ValueError, match=r"1\.5"):
        Adaptive(at_most=1.5)


def test_a_whole_keep_is_the_most_too() -> None:
    x, _ = drawn(30, spread=0.01, clusters=4)
    method = Adaptive(vtc.DivPrune(), radius=0.1)
    assert len(vtc.select(method, x, keep=10).index) == 4
    assert len(vtc.select(method, x, keep=2).index) == 2


def test_it_survives_json() -> None:
    method = Adaptive(Random(seed=5), radius=0.125, at_most=64)
    config = CompressionConfig.of(method)
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == method
    short = {"version": 1, "method": "adaptive", "options": {"at_most": 0.75}}
    assert CompressionConfig.from_dict(short).build() == Adaptive(keep=0.75)


class Unordered(vtc.DivPrune):
    """Says that it is nested."""

    name: ClassVar[str] = "unordered"

    def reduce(self, stage: Any, tokens: VisualTokens, budget: Any) -> Reduction:
        return dataclasses.replace(super().reduce(stage, tokens, budget), ordered=False)


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unordered says that it is nested"):
        vtc.select(Adaptive(Unordered()), drawn(9)[0])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"radius": -0.1}, ValueError, "radius=-0.1"),
        ({"radius": 1.0}, ValueError, r"radius=1.0: .*\[0, 1\)"),
        ({"radius": math.nan}, ValueError, "radius=nan"),
        ({"radius": "0.3"}, TypeError, "radius='0.3'"),
        ({"radius": True}, TypeError, "radius=True"),
        ({"selector": "divprune"}, TypeError, "selector='divprune'"),
        ({"selector": vtc.Grid()}, ValueError, "selector=Grid.*cannot be stopped early"),
        ({"selector": VisionZip()}, ValueError, "selector=VisionZip"),
        ({"selector": Merge()}, ValueError, r"selector=Merge.*vtc.Merge\(vtc.Adaptive"),
        ({"selector": Allocate()}, ValueError, "selector=Allocate"),
        ({"selector": Adaptive()}, ValueError, "selector=Adaptive"),
        ({"selector": FastV()}, ValueError, "does not choose before the language model"),
        ({"selector": vtc.Chain()}, ValueError, r"vtc.Chain\(vtc.Adaptive\(first\), second\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Adaptive(**options)


def test_where_a_count_has_to_be_known_it_is_refused() -> None:
    for inner in (Adaptive(), Merge(Adaptive())):
        assert inner.counts([Layout.plain(9)]) is None
        with pytest.raises(ValueError, match="decides by the content"):
            Allocate(selector=inner)
    with pytest.raises(ValueError, match="how many tokens adaptive keeps depends on what is in the image"):
        settle(models.llava().config, read({"method": "adaptive"}))


def test_an_estimate_counts_the_most_and_says_so() -> None:
    config = models.llava().config
    fixed = estimate(config, method=vtc.DivPrune(keep=0.5))
    for method in (Adaptive(at_most=0.5), Merge(Adaptive(at_most=0.5)), Adaptive(vtc.ToDRE(), at_most=0.5)):
        found = estimate(config, method=method)
        assert found.pruned.visual == fixed.pruned.visual
        assert any("depends on the picture: counted with the most, keep=0.5" in note for note in found.notes)
    assert not any("depends" in note for note in fixed.notes)
    assert keeping_all(CompressionConfig.of(Adaptive())) is None
    assert keeping_all(CompressionConfig.of(Merge())) == CompressionConfig.of(Merge(keep=1.0))


# ----------------------------------------------------------------------------------------------------------- in models


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_end_to_end(family: str) -> None:
    """At most all: the radius alone decides; then with merging, then with what works inside the model behind it."""
    model, batch = get_model(family), batch_of(family)
    model.set_attn_implementation("eager")
    embeds = [decoder_call(model, sample)["inputs_embeds"][0] for sample in batch.samples]
    every = torch.cat([distances(x[c]).flatten() for x, own in zip(embeds, batch.images, strict=True) for c in own])
    method, keep = Adaptive(vtc.DivPrune(), radius=float(every.quantile(0.2)), at_most=1.0), []
    for x, images in zip(embeds, batch.images, strict=True):
        orders = [vtc.select("divprune", x[columns], keep=len(columns)).order.tolist() for columns in images]
        needed = [by_hand(x[c], order, method.radius) for c, order in zip(images, orders, strict=True)]
        keep.append([torch.tensor(sorted(order[:k])) for order, k in zip(orders, needed, strict=True)])
    assert not keeps_all(method)
    assert method.prunes_at_entry
    _, _, handle = run(model, batch, method)
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    assert [[sorted(o.tolist()) for o in own] for own in handle.last_order] == [
        [k.tolist() for k in own] for own in keep
    ]
    assert len({len(k) / len(c) for own, images in zip(keep, batch.images, strict=True)
                for k, c in zip(own, images, strict=True)}) > 1  # fmt: skip
    check(model, batch, method, continued(model, batch, keep))
    for around in (Merge(method), vtc.Chain(method, vtc.TransPrune(layers=(1,), ratios=(0.5,)))):
        _, _, handle = run(model, batch, around)
        entered = handle.last_stages[0][1]
        assert [[k.tolist() for k in own] for own in entered] == [[k.tolist() for k in own] for own in keep]


def test_it_is_verified_as_others_are() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    result = vtc.verify(model, batch.samples[0], Adaptive(vtc.DivPrune(), radius=0.5, at_most=0.9))
    assert result.ok, str(result)


def test_stage_two_of_todre_is_left_alone() -> None:
    model, batch = get_model("qwen2_5_vl"), batch_of("qwen2_5_vl")
    fires = vtc.ToDRE(keep=0.5, pivot="random", stage2=True, tau=1.0, layer=1)
    _, _, handle = run(model, batch, Adaptive(fires, radius=0.0))
    assert [after for after, _ in handle.last_stages] == [0, 1]
    assert not any(len(k) for own in handle.last_stages[-1][1] for k in own)
    assert any(len(k) for own in handle.last_stages[0][1] for k in own)
