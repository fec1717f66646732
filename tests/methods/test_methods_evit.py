"""EViT against loops by hand: one stage on drawn tensors, and whole towers block by block.

That each family's answers are right is the methods' matrix (`evit` in tests/methods/every.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from asking import reduce
from every import refusal
from merging_tower import by_blocks, entering, projected
from nosync import NoSync
from torch import Tensor
from zoo import GREEDY, get_model, make_batch

import vtc
from vtc import EViT
from vtc.config import CompressionConfig
from vtc.methods.base import ANY_MODEL
from vtc.methods.stages import steps_of
from vtc.tokens import Layout, VisualTokens


def by_hand(x: Tensor, cls: Tensor, size: list[float], keep: int) -> tuple[list[int], Tensor, list[float]]:
    """Who stays, ascending; what stands there; and how many each is."""
    order = sorted(range(len(x)), key=lambda i: (-float(cls[i]), i))
    top, rest = order[: keep - 1], order[keep - 1 :]
    weights = [float(cls[i]) for i in rest]
    weights = weights if any(weights) else [1.0] * len(rest)
    fused = sum(w * x[i].double() for w, i in zip(weights, rest, strict=True)) / sum(weights)
    stays = sorted([*top, rest[0]])
    values = torch.stack([fused if i == rest[0] else x[i].double() for i in stays])
    return stays, values, [sum(size[j] for j in rest) if i == rest[0] else size[i] for i in stays]


def drawn(n: int, seed: int, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.rand(n, generator=generator)


def tokens_of(x: Tensor, cls: Tensor, **more: Any) -> VisualTokens:
    return VisualTokens(x[None], (Layout.plain(len(x)),), (0,), {"cls": cls[None]}, **more)


# ----------------------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("n", [2, 3, 16, 25])
@pytest.mark.parametrize("keep", [1, 2, 9, 24])
def test_the_highest_stay_and_the_rest_is_one(n: int, keep: int) -> None:
    for seed in range(3):
        x, cls = drawn(n, seed)
        k = min(keep, n)
        stays, values, size = by_hand(x, cls, [1.0] * n, k)
        found = reduce(EViT(), tokens_of(x, cls), (k,))
        order = found.index[0].argsort()
        assert found.index[0, order].tolist() == stays
        torch.testing.assert_close(found.features[0, order].double(), values, rtol=0, atol=1e-6)
        assert found.size[0, order].tolist() == size
        assert sum(size) == n
        assert torch.equal(found.features[0, : k - 1], x[found.index[0, : k - 1]])  # in every bit


def test_what_was_fused_may_be_fused_again_and_what_left_is_not_asked() -> None:
    x, cls = drawn(20, 1)
    size = torch.arange(1.0, 21.0)
    there = [i for i in range(20) if i not in (0, 3, 4, 17)]
    alive = torch.zeros(1, 20, dtype=torch.bool)
    alive[0, there] = True
    x[~alive[0]] = math.nan
    found = reduce(EViT(), tokens_of(x, cls, size=size[None], alive=alive, alive_counts=(16,)), (10,))
    stays, values, total = by_hand(x[there], cls[there], size[there].tolist(), 10)
    order = found.index[0].argsort()
    assert found.index[0, order].tolist() == [there[i] for i in stays]
    torch.testing.assert_close(found.features[0, order].double(), values, rtol=0, atol=1e-6)
    assert found.size[0, order].tolist() == total


def test_ties_go_to_the_lowest_index_and_zeros_weigh_the_same() -> None:
    x, cls = drawn(6, 0)[0], torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    found = reduce(EViT(), tokens_of(x, cls), (3,))
    assert found.index[0].tolist() == [1, 3, 5]
    assert torch.equal(found.features[0, 2], x[5])
    found = reduce(EViT(), tokens_of(x, cls), (4,))
    assert found.index[0].tolist() == [1, 3, 5, 0]
    torch.testing.assert_close(found.features[0, 3], x[[0, 2, 4]].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_as_in_a_ragged_batch(dtype: Any) -> None:
    lengths, budget = (30, 19, 1, 8), (9, 12, 1, 8)
    features, cls = torch.full((4, 30, 6), math.nan, dtype=dtype), torch.zeros(4, 30)
    for g, n in enumerate(lengths):
        x, row = drawn(n, g)
        features[g, :n], cls[g, :n] = x.to(dtype), row[torch.arange(n) % 7]
    layouts = tuple(Layout.plain(n) for n in lengths)
    with NoSync():
        together = reduce(EViT(), VisualTokens(features, layouts, (0,) * 4, {"cls": cls}), budget)
    assert together.features.dtype == dtype
    for g, (n, k) in enumerate(zip(lengths, budget, strict=True)):
        one = VisualTokens(features[g : g + 1, :n], layouts[g : g + 1], (0,), {"cls": cls[g : g + 1, :n]})
        own = reduce(EViT(), one, (k,))
        assert torch.equal(together.index[g, :k], own.index[0])
        assert torch.equal(together.features[g, :k], own.features[0])
        assert torch.equal(together.size[g, :k], own.size[0])


def test_the_published_schedule() -> None:
    method = EViT().settle(dataclasses.replace(ANY_MODEL, tower_depth=12))
    steps = steps_of(method, ANY_MODEL)
    assert [step.stage.at.block for step in steps] == [4, 7, 10]
    assert [step.stage.needs[0].layer for step in steps] == [3, 6, 9]
    layouts = [Layout.plain(196)]
    assert [method.counts(layouts, step.stage)[0] for step in steps] == [137, 96, 67]  # .7, .7 ** 2 and .7 ** 3 of it
    assert method.counts(layouts) == (67,)
    assert EViT().settle(dataclasses.replace(ANY_MODEL, tower_depth=23)).blocks == (8, 13, 19)
    assert EViT().settle(dataclasses.replace(ANY_MODEL, tower_depth=2)).blocks == (1,)


def test_an_exact_number_is_left_in_the_end() -> None:
    method = EViT(keep=20, blocks=(1, 0.5))
    method = method.settle(dataclasses.replace(ANY_MODEL, tower_depth=24))
    assert method.blocks == (1, 12)
    steps = steps_of(method, ANY_MODEL)
    assert [method.counts([Layout.plain(500)], step.stage) for step in steps] == [(100,), (20,)]
    config = CompressionConfig.of(method, "original")
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))).build() == method


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"blocks": 3}, TypeError, "blocks=3 must be a tuple"),
        ({"blocks": None}, TypeError, "blocks=None must be a tuple"),
        ({"blocks": ()}, ValueError, r"blocks=\(\)"),
        ({"blocks": (0,)}, ValueError, r"blocks=0: .*ints from 1"),
        ({"blocks": (0.5, 0.25)}, ValueError, r"blocks=\(0\.5, 0\.25\) must be .* rising"),
        ({"keep": 1.5}, ValueError, r"keep=1\.5"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        EViT(**options)


# ----------------------------------------------------------------------------------------------------------- in models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [1, 4, 9])
def test_towers_block_by_block(keep: int, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, so that the first one's fused patch is asked again."""
    model, batch = get_model("llava"), make_batch("llava")
    monkeypatch.setattr(model.config, "vision_feature_layer", -1)  # one block more to act in front of
    adapter, parts = vtc.models.resolve(model)
    method = EViT(keep=keep, blocks=(1, 2)).settle(adapter.facts(parts))
    model.set_attn_implementation("eager")
    places, rows = [], []
    for state in entering(model, batch):

        def merging(index: int, x: Tensor, cls: Tensor, size: list[float]) -> Any:
            return by_hand(x, cls, size, round((16 * keep) ** 0.5) if index == 1 else keep)

        own, values = by_blocks(model, state[None], "cls", merging, logs=False)
        places.append(own)
        rows.append(values)
    expected = torch.stack(rows)
    model.set_attn_implementation(attention)
    with vtc.patch(model, method) as p:
        ours = projected(model, batch, places)
        assert [k.tolist() for kept in p.last_keep for k in kept] == places
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        first = 0
        for sample, own in zip(batch.samples, batch.images, strict=True):
            if own:
                of_sample = slice(first, first + len(own))
                alone = projected(model, sample, places[of_sample])
                torch.testing.assert_close(alone, expected[of_sample], rtol=0, atol=1e-5)
            first += len(own)
    with vtc.patch(model, vtc.InTower(keep=keep, after=2)):  # dropping is something else
        assert (projected(model, batch, places) - expected).abs().max() > 1e-3


def test_sizes_reach_the_language_model() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    with vtc.patch(model, EViT(keep=4)):
        plain = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with vtc.patch(model, EViT(keep=4), calibration="size"):
        out = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- refused, and why


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("paligemma", "needs 'cls'"),
        ("internvl", "what merged cannot be brought back"),
        ("gemma3", "what merged cannot be brought back"),
        ("qwen2_vl", "a token is 4 rows there"),
    ],
)
def test_towers_that_do_not_fit(family: str, said: str) -> None:
    reason = refusal(get_model(family), EViT(keep=0.5))
    assert reason is not None
    assert said in reason
    assert "vtc.InTower(" in reason


def test_no_gradient_is_lost_in_silence() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    with vtc.patch(model, EViT(keep=0.5)):
        with pytest.raises(NotImplementedError, match="evit merges tokens, and no gradient flows"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
