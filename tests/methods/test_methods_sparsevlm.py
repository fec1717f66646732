"""SparseVLM against loops by hand: raters, schedules, recycling, and end to end against an unpatched model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nosync import NoSync
from reference import Continuation
from test_contract import batch_of, check
from torch import Tensor
from unpatched import answered, seen
from zoo import get_model

import vtc
from vtc.methods.base import ModelFacts
from vtc.methods.recycling import recycled, split
from vtc.methods.sparsevlm import SCHEDULES, SparseVLM
from vtc.methods.stages import steps_of
from vtc.places import Layer
from vtc.tokens import Layout, VisualTokens

FACTS = ModelFacts(model_type="toy", width=8, depth=32)
SHORT: dict[str, Any] = {"layers": (1, 2), "ratios": (0.7, 0.4)}


def raters_by_hand(visual: Tensor, text: Tensor) -> list[int]:
    got = [0.0] * len(text)
    for v in visual.double():
        dots = [float(v @ t) for t in text.double()]
        weights = [math.exp(d - max(dots)) for d in dots]
        for j, weight in enumerate(weights):
            got[j] += weight / sum(weights) / len(visual)
    mean = sum(got) / len(got)
    return [j for j, g in enumerate(got) if g > mean + 1e-9] or list(range(len(got)))


def clusters_by_hand(x: Tensor, c: int) -> dict[int, list[int]]:
    """Centre and members of each cluster: density peaks, one pair at a time."""
    n, d = x.shape
    apart = [[float((a - b).double().square().sum()) for b in x] for a in x]
    density = [math.exp(-sum(sorted(row)[:c]) / c / d) for row in apart]
    peak = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        reach = min((apart[i][j] for j in denser), default=max(map(max, apart)))
        peak.append(math.sqrt(reach) * density[i])
    centres = sorted(sorted(range(n), key=lambda i: (-peak[i], i))[:c])
    members: dict[int, list[int]] = {i: [i] for i in centres}
    for i in range(n):
        if i not in centres:
            members[min(centres, key=lambda j: (apart[i][j], j))].append(i)
    return members


def by_hand(x: Tensor, scores: list[float], k: int, recycle: bool) -> tuple[list[int], dict[int, list[int]]]:
    """Kept places, and for those that are merged who they are made of."""
    n = len(x)
    ranked = sorted(range(n), key=lambda i: (-scores[i], i))
    if not recycle:
        return sorted(ranked[:k]), {}
    tops = next((t for t in range(k, 1, -1) if t + recycled(n - t)[1] <= k), 1)
    among = sorted(ranked[tops : tops + int(0.3 * (n - tops)) + 1])
    if k == tops:
        return sorted(ranked[:k]), {}
    members = clusters_by_hand(x[among], k - tops)
    groups = {among[centre]: [among[i] for i in own] for centre, own in members.items()}
    return sorted([*ranked[:tops], *groups]), groups


def image(seed: int, n: int, t: int, kind: str = "gauss") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(n, 6, generator=generator), torch.randn(t, 6, generator=generator)
    rows = torch.rand(t, n, generator=generator).softmax(-1)
    if kind == "doubles":
        x[n // 2 :] = x[: n - n // 2].clone()
        rows[:, 1::2] = rows[:, : n - 1 : 2].clone() if n % 2 else rows[:, ::2].clone()
        text[1:] = text[:1]
    if kind == "zeros":
        x[::3], text[::2] = 0, 0
    return x, text, rows


# ------------------------------------------------------------------------------------------------------------- raters


@pytest.mark.parametrize("kind", ["gauss", "doubles", "zeros"])
@pytest.mark.parametrize(("n", "t"), [(30, 7), (9, 1), (50, 20)])
def test_raters_get_more_than_the_mean_and_their_mean_ranks(n: int, t: int, kind: str) -> None:
    x, text, rows = image(3, n, t, kind)
    found = raters_by_hand(x, text)
    scores = [round(float(rows[found, i].double().mean()), 12) for i in range(n)]
    kept = vtc.select("sparsevlm", x, keep=n // 3, signals={"raters": rows}, text=text, recycle=False)
    assert kept.index.tolist() == by_hand(x, scores, n // 3, False)[0]
    every = vtc.select("sparsevlm", x, keep=n // 3, signals={"raters": rows}, recycle=False)
    assert every.index.tolist() == by_hand(x, rows.double().mean(0).tolist(), n // 3, False)[0]


def test_raters_matter() -> None:
    """The zoo of these tests tells a choice among rows from all rows."""
    x, text, rows = image(3, 50, 20)
    kept = [vtc.select("sparsevlm", x, keep=9, signals={"raters": rows}, recycle=False, **g).index for g in
            ({}, {"text": text})]  # fmt: skip
    assert kept[0].tolist() != kept[1].tolist()
    assert 1 < len(raters_by_hand(x, text)) < 20


# ---------------------------------------------------------------------------------------------------------- schedules


def test_published_tables_are_met_at_576_tokens() -> None:
    """With recycling k of the table stay as they are, and (0.3 (n - k) + 1) // 10 + 1 more are merged."""
    for version, tables in SCHEDULES.items():
        for schedule, table in tables.items():
            plain = SparseVLM(schedule=schedule, version=version, recycle=False)
            both = SparseVLM(schedule=schedule, version=version, recycle=True)
            n = 576
            for number, kept in enumerate(table):
                stage = steps_of(plain, FACTS)[number].stage
                assert plain.quota(576, stage) == kept
                total = kept + int(0.1 * (int(0.3 * (n - kept)) + 1)) + 1
                assert both.quota(576, stage) == total
                assert version == "v2" or split(total, n) == kept
                n = total
    assert SparseVLM().merges
    assert not SparseVLM(version="v2").merges
    assert SparseVLM().keep == 113 / 576
    assert SparseVLM(version="v2", schedule=64).keep == 20 / 576
    assert [SparseVLM(version="v2", keep=0.5).ratio(i, 576) for i in (0, 1, 2)] == pytest.approx(
        [1 - (1 - k / 576) * 0.5 / (1 - 118 / 576) for k in (300, 200, 118)]
    )


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 57, 576])
def test_every_budget_is_met(n: int) -> None:
    for budget in range(1, n + 1):
        top = split(budget, n)
        assert min(1, budget) <= top <= budget
        assert budget - top <= recycled(n - top)[1] or n == top


def test_stages_scale_with_depth_or_are_refused() -> None:
    assert [s.at for s in SparseVLM().stages(FACTS)] == [Layer(3), Layer(7), Layer(16)]
    assert [s.needs[0].layer for s in SparseVLM().stages(FACTS)] == [2, 6, 15]
    shallow = ModelFacts(model_type="toy", width=8, depth=28)
    assert [s.at.after for s in SparseVLM().stages(shallow)] == [3, 6, 14]
    with pytest.raises(ValueError, match=r"sparsevlm has 3 stages.*vtc\.SparseVLM\(layers=\(1,\), ratios=\(0\.25,\)\)"):
        steps_of(SparseVLM(), ModelFacts(model_type="toy", width=8, depth=3))
    with pytest.raises(ValueError, match=r"after layer 16.*1 to 11"):
        steps_of(SparseVLM(layers=(3, 7, 16)), ModelFacts(model_type="toy", width=8, depth=12))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"version": "v3"}, ValueError, "'v3'"),
        ({"schedule": 100}, ValueError, "schedule=100"),
        ({"schedule": "192"}, ValueError, "schedule='192'"),
        ({"recycle": "yes"}, TypeError, "recycle='yes'"),
        ({"ratios": (0.5, 0.6, 0.1)}, ValueError, "grow"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        SparseVLM(**options)


# ---------------------------------------------------------------------------------------------------------- recycling


@pytest.mark.parametrize("kind", ["gauss", "doubles", "zeros"])
@pytest.mark.parametrize(("n", "k"), [(60, 20), (150, 30), (40, 3), (30, 29), (12, 1)])
def test_recycled_tokens_are_means_of_clusters(n: int, k: int, kind: str) -> None:
    x, _, rows = image(5, n, 4, kind)
    index, groups = by_hand(x, [round(float(v), 12) for v in rows.double().mean(0)], k, True)
    found = vtc.select("sparsevlm", x, keep=k, signals={"raters": rows})
    assert found.index.tolist() == index
    expected = torch.stack([x[groups[i]].double().mean(0).float() if i in groups else x[i] for i in index])
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-6)
    if k > 1:
        assert groups


def test_a_batch_keeps_what_each_image_keeps_alone() -> None:
    """Ragged, padded with what is no number; the same bits, and sizes that add up."""
    shapes = [(60, 5), (9, 2), (1, 5), (33, 1)]
    features, rows = torch.full((4, 60, 6), torch.nan), torch.zeros(4, 5, 60)
    rating = torch.zeros(4, 5, dtype=torch.bool)
    method = SparseVLM(**SHORT)
    step = steps_of(method, FACTS)[1]
    alone = []
    for g, (n, t) in enumerate(shapes):
        x, _, own = image(g, n, t)
        features[g, :n], rows[g, 5 - t :, :n], rating[g, 5 - t :] = x, own, True
        signals = {"raters": own[None], "rating": torch.ones(1, t, dtype=torch.bool)}
        alone.append(step.reduce(VisualTokens(x[None], (Layout.plain(n),), (0,), signals, step.axes)))
    layouts = tuple(Layout.plain(n) for n, _ in shapes)
    tokens = VisualTokens(features, layouts, (0,) * 4, {"raters": rows, "rating": rating}, step.axes)
    together = step.reduce(tokens)
    for g, (n, _) in enumerate(shapes):
        assert torch.equal(together.mask[g, :n], alone[g].mask[0])
        if alone[g].features is not None:
            assert torch.equal(together.features[g, :n][alone[g].mask[0]], alone[g].features[0][alone[g].mask[0]])
            top = split(int(0.4 * n), n)
            assert int(together.size[g].sum()) == top + recycled(n - top)[0]
    with NoSync():
        method.reduce(step.stage, tokens, together.counts)


# --------------------------------------------------------------------------------------------------------- end to end


def expected_of(
    model: Any, sample: dict[str, Tensor], images: list[Tensor], method: SparseVLM, first_keep: float = 1.0
) -> Continuation:
    """Rows, raters and hidden states from eager passes of the unpatched model, blind to what is gone already."""
    gone = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
    if first_keep < 1:
        embeds = seen(model, sample).hidden[0]
        for columns in images:
            gone[columns] = True
            gone[columns[vtc.select("divprune", embeds[columns], keep=first_keep).index]] = False
    entered = [int((~gone[columns]).sum()) for columns in images]
    stages = [(0, gone)]
    merge: dict[int, Callable[[Tensor], Tensor]] = {}
    for step in steps_of(method, ModelFacts(model_type="toy", width=8, depth=len(model.get_decoder().layers))):
        if not images:
            break
        after = step.stage.at.after
        passed = seen(model, sample, stages, merge)
        behind = range(int(images[-1][-1]) + 1, len(gone))
        first, groups, next_gone = passed.hidden[0], {}, gone.clone()
        for columns, given in zip(images, entered, strict=True):
            left = columns[~gone[columns]]
            if after == 1:
                raters[tuple(columns.tolist())] = raters_by_hand(first[left], first[list(behind)])
            rows = passed.attention[after - 1].mean(0)[list(behind)][:, left].double()
            scores = rows[raters[tuple(columns.tolist())]].mean(0).tolist()
            places, own = by_hand(passed.hidden[after][left], scores, method.quota(given, step.stage), method.merges)
            next_gone[columns] = True
            next_gone[left[places]] = False
            groups |= {int(left[centre]): left[own[centre]] for centre in own}

        def melt(hidden: Tensor, groups: dict[int, Tensor] = groups) -> Tensor:
            now = hidden.clone()
            for centre, members in groups.items():
                now[centre] = hidden[members].mean(0)
            return now

        gone = next_gone
        stages.append((after, gone))
        merge[after] = melt
    return answered(model, sample, stages, merge)


raters: dict[tuple[int, ...], list[int]] = {}


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_end_to_end(family: str, recycle: bool) -> None:
    model, batch = get_model(family), batch_of(family)
    method = SparseVLM(**SHORT, recycle=recycle)
    expected = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        raters.clear()
        expected.append(expected_of(model, sample, images, method))
    check(model, batch, method, expected)


def test_behind_another_method_it_sees_what_that_left() -> None:
    """Raters are those of the tokens that entered, shares those of their number."""
    model, batch = get_model("llava"), batch_of("llava")
    method = SparseVLM(**SHORT, recycle=True)
    expected = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        raters.clear()
        expected.append(expected_of(model, sample, images, method, 0.6))
    check(model, batch, vtc.Chain(vtc.DivPrune(keep=0.6), method), expected)
