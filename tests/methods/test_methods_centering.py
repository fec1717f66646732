"""Cen-Prune's centred geometry inside DivPrune and IDPruner: against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from asking import picks
from nosync import NoSync
from reference import decoder_call
from test_contract import batch_of, by_sample, check, continued, reached, run, tower_pass
from torch import Tensor
from tower_reference import scores_by_hand
from zoo import get_model

import vtc
from vtc.methods import centering
from vtc.methods.base import ANY_MODEL
from vtc.methods.divprune import DivPrune
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention, FeatureNorm
from vtc.tokens import Layout, VisualTokens

EPS = 1e-6


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(u * v for u, v in zip(a, b, strict=True)) / lengths if lengths else 0.0


def parts(features: Tensor, variant: str) -> tuple[list[list[float]], list[float]]:
    """Equations 3 to 12, one number at a time: cosines of centred rows, and distinctiveness."""
    y = [[float(v) for v in row] for row in features]
    n, d = len(y), len(y[0])
    if variant == "qwen":
        for c in range(d):
            middle = sum(row[c] for row in y) / n
            sigma = math.sqrt(sum((row[c] - middle) ** 2 for row in y) / n + EPS)
            for row in y:
                row[c] /= sigma
    middles = [sum(row[c] for row in y) / n for c in range(d)]
    centred = [[row[c] - middles[c] for c in range(d)] for row in y]
    like = [[cosine(a, b) for b in centred] for a in centred]
    g = [-sum(cosine(y[i], y[j]) for j in range(n) if j != i) / max(1, n - 1) for i in range(n)]
    if variant == "llava":
        return like, [(v - min(g)) / (max(g) - min(g) + EPS) for v in g]
    middle = sum(g) / n
    spread = math.sqrt(sum((v - middle) ** 2 for v in g) / n)
    return like, [1 / (1 + math.exp(-(v - middle) / (spread + EPS))) for v in g]


def by_hand(features: Tensor, k: int, variant: str) -> list[int]:
    like, weight = parts(features, variant)
    n = len(like)
    first = [sorted(1 - like[j][i] for j in range(n))[min(1, n - 1)] for i in range(n)]
    taken = [first.index(max(first))]
    while len(taken) < k:
        score = [-1.0 if i in taken else weight[i] * min(1 - like[i][s] for s in taken) for i in range(n)]
        taken.append(score.index(max(score)))
    return taken


def relevance_by_hand(features: Tensor, scores: Tensor, k: int, variant: str, balance: float = 0.5) -> list[int]:
    like, weight = parts(features, variant)
    low, high = float(scores.min()), float(scores.max())
    value = [(float(s) - low) / (high - low + 1e-6) * w for s, w in zip(scores, weight, strict=True)]
    taken = [value.index(max(value))]
    while len(taken) < k:
        score = [
            -9.0 if i in taken else balance * value[i] - (1 - balance) * max(like[i][s] for s in taken)
            for i in range(len(like))
        ]
        taken.append(score.index(max(score)))
    return taken


def drawn(n: int, d: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1.5


@pytest.mark.parametrize("variant", ["llava", "qwen"])
def test_it_picks_what_loops_pick(variant: Any) -> None:
    x = drawn(40)
    found = vtc.select("divprune", x, keep=30, centered=True, variant=variant)
    assert found.order.tolist() == by_hand(x, 30, variant)
    cls = drawn(40, 1, seed=3)[:, 0].sigmoid()
    found = vtc.select("idpruner", x, keep=30, centered=True, variant=variant, signals={"cls": cls})
    assert found.order.tolist() == relevance_by_hand(x, cls, 30, variant)


def test_both_variants_and_no_centring_are_three_different_things() -> None:
    x = drawn(40)
    options: list[dict[str, Any]] = [{}, {"centered": True}, {"centered": True, "variant": "qwen"}]
    orders = [vtc.select("divprune", x, keep=20, **own).order.tolist() for own in options]
    assert orders[1] == by_hand(x, 20, "llava")
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("variant", ["llava", "qwen"])
@pytest.mark.parametrize("method", ["divprune", "idpruner"])
def test_a_constant_image_equal_tokens_and_rows_of_zeros_are_no_nan(method: str, variant: Any) -> None:
    options = {"centered": True, "variant": variant}
    same = torch.full((9, 5), 0.1)
    assert vtc.select(method, same, keep=9, **options).order.tolist() == [*range(9)]
    middle, weight = centering.centred(same[None], torch.ones(1, 9, dtype=torch.bool), variant)
    assert middle.eq(0).all()
    assert weight.isfinite().all()
    x = drawn(6).repeat(2, 1)
    x[[2, 8]] = 0.0
    x[3, 1] = math.nan
    order = vtc.select(method, x, keep=12, **options).order.tolist()
    assert sorted(order) == [*range(12)]
    assert vtc.select(method, drawn(1), keep=1, **options).order.tolist() == [0]


def test_the_first_of_equal_tokens_is_taken() -> None:
    x = drawn(6).repeat(3, 1)
    order = vtc.select("divprune", x, keep=18, centered=True).order.tolist()
    assert order[0] < 6
    weight = centering.centred(x[None], torch.ones(1, 18, dtype=torch.bool), "llava")[1][0]
    assert weight.unflatten(0, (3, 6)).eq(weight[:6]).all()  # bit by bit


@pytest.mark.parametrize("variant", ["llava", "qwen"])
def test_a_ragged_batch_worked_off_in_parts(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, counts = (50, 9, 31), (20, 8, 12)
    features = torch.full((3, 57, 64), math.nan)
    for g, n in enumerate(lengths):
        features[g, :n] = drawn(n, 64, seed=g)[torch.arange(n) % 27]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2))
    middle, weight = centering.centred(features, tokens.mask, variant)
    monkeypatch.setattr(centering, "ENTRIES", 1)
    for method in (DivPrune(centered=True, variant=variant), IDPruner(centered=True, variant=variant)):
        together = picks(method, tokens, counts)
        for g, (n, k) in enumerate(zip(lengths, counts, strict=True)):
            alone = vtc.select(method, features[g, :n], keep=k)
            assert alone.order.tolist() == together[g, :k].tolist()
    for g, n in enumerate(lengths):
        turned = centering.centred(features[g, :n].flip(0)[None], torch.ones(1, n, dtype=torch.bool), variant)
        assert torch.equal(turned[0][0].flip(0), middle[g, :n])  # whatever the order of summation
        assert torch.equal(turned[1][0].flip(0), weight[g, :n])


def test_a_mean_is_the_same_bits_in_every_order() -> None:
    values, mask = drawn(501, 9)[None].double() ** 3, torch.ones(1, 501, dtype=torch.bool)
    found = centering.mean(values, mask)
    torch.testing.assert_close(found[:, 0], values.mean(1), rtol=0, atol=1e-9)
    for seed in range(5):
        turned = values[:, torch.randperm(501, generator=torch.Generator().manual_seed(seed))]
        assert torch.equal(centering.mean(turned, mask), found)


def test_nothing_waits_and_no_gradient_is_kept() -> None:
    x = drawn(9).requires_grad_()
    tokens = VisualTokens(x[None], (Layout.plain(9),), (0,))
    with NoSync():
        found = DivPrune(centered=True).reduce(DivPrune().stages(ANY_MODEL)[0], tokens, (4,))
    assert not found.index.requires_grad
    assert not centering.centred(x[None], tokens.mask, "qwen")[0].requires_grad


def test_what_a_model_decides() -> None:
    facts = dataclasses.replace(ANY_MODEL, model_type="qwen2_5_vl")
    own = dataclasses.replace(facts, signals=frozenset({"tower_features", "cls"}))
    open_ = DivPrune(centered=True)
    assert open_.settle(ANY_MODEL) == DivPrune(centered=True, variant="llava", source="entry")
    assert open_.settle(facts) == DivPrune(centered=True, variant="qwen", source="entry")
    settled = open_.settle(own)
    assert settled == DivPrune(centered=True, variant="qwen", source="tower") == settled.settle(own)
    assert [signal.key for signal in settled.stages(own)[0].needs] == ["tower_features"]
    assert DivPrune().settle(own) == DivPrune()
    assert not DivPrune(centered=True).signals()
    both = IDPruner(centered=True).settle(own)
    assert both == IDPruner(centered=True, variant="qwen", source="tower", importance=ClsAttention())
    assert [signal.key for signal in both.stages(own)[0].needs] == ["tower_features", "cls"]


def test_rows_of_the_tower() -> None:
    x, rows = drawn(20), drawn(20, seed=5)
    found = vtc.select("divprune", x, keep=9, centered=True, variant="qwen", signals={"tower_features": rows})
    assert found.order.tolist() == by_hand(rows, 9, "qwen") != by_hand(x, 9, "qwen")


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"centered": 1}, TypeError, "centered=1"),
        ({"centered": True, "variant": "llama"}, ValueError, "variant='llama'.*'llava', 'qwen'"),
        ({"centered": True, "source": "merger"}, ValueError, "source='merger'.*'entry', 'tower'"),
        ({"variant": "qwen"}, ValueError, "variant='qwen' goes with centered=True"),
        ({"source": "tower"}, ValueError, "source='tower' goes with centered=True"),
    ],
)
@pytest.mark.parametrize("method", [DivPrune, IDPruner])
def test_a_bad_option_is_named(method: Any, options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        method(**options)


def test_a_tower_that_gives_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tower_features'.*cannot give"):
        vtc.patch(get_model("gemma4"), DivPrune(centered=True, source="tower"))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_end_to_end(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    variant = "qwen" if family.startswith("qwen") else "llava"
    method = DivPrune(keep=0.3, centered=True, source="entry")
    keep = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        picked = [by_hand(embeds[c], max(1, round(0.3 * len(c))), variant) for c in images]
        keep.append([torch.tensor(sorted(places)) for places in picked])
    _, _, handle = run(model, batch, method)
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, method, continued(model, batch, keep))


def test_end_to_end_with_importance() -> None:
    model, batch = get_model("llava_next"), batch_of("llava_next")
    rows = tower_pass(model, batch).attentions[-1].mean(1)[:, 0, 1:]
    cls = by_sample(batch, [scores_by_hand(rows, image) for image in reached("llava_next")])
    keep = []
    for sample, images, own in zip(batch.samples, batch.images, cls, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        every = zip(images, own, strict=True)
        picked = [relevance_by_hand(embeds[c], row, max(1, round(0.3 * len(c))), "llava") for c, row in every]
        keep.append([sorted(places) for places in picked])
    _, _, handle = run(model, batch, IDPruner(keep=0.3, centered=True))
    assert [[k.tolist() for k in own] for own in handle.last_keep] == keep
    assert FeatureNorm() == IDPruner(centered=True).settle(ANY_MODEL).importance
