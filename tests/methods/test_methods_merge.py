"""Merging around a selector, against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar

import pytest
import torch
from asking import reduce
from nosync import NoSync
from reference import decoder_call
from test_contract import batch_of, by_sample, check, continued, packed, run, tower_pass
from torch import Tensor
from zoo import get_model, models

import vtc
import vtc.ops.merging
from vtc.commands.shared import build_config
from vtc.config import CompressionConfig
from vtc.methods import Method, ModelFacts, Stage, register_method, registry
from vtc.methods.allocate import Allocate
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.merge import Merge
from vtc.methods.random import Random
from vtc.methods.stages import steps_of
from vtc.methods.visionzip import VisionZip
from vtc.places import Projector
from vtc.profiling.estimate import estimate
from vtc.tokens import Layout, Segment, VisualTokens
from vtc_vllm.selection import settle
from vtc_vllm.settings import read

ANYRES = Layout(19, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 15, (3, 4), newline=True)))
NEWLINES = {8, 13, 18}


def cosine(a: Tensor, b: Tensor) -> float:
    dot, lengths = float(a.double() @ b.double()), float(a.double().norm() * b.double().norm())
    return dot / lengths if lengths and math.isfinite(lengths) else 0.0


def by_hand(
    x: Tensor, keep: list[int], apart: set[int] = frozenset(), size: Tensor | None = None
) -> tuple[Tensor, list[float]]:
    """What stands at the kept places then, and for how many tokens; ``apart``: those that keep to themselves."""
    size = torch.ones(len(x)) if size is None else size
    groups: dict[int, list[int]] = {i: [i] for i in sorted(keep)}
    for i in range(len(x)):
        if i in keep or i in apart or not x[i].isfinite().all() or not x[i].any():
            continue
        best, value = None, -math.inf
        for j in groups:
            if j not in apart and x[j].isfinite().all() and x[j].any() and cosine(x[i], x[j]) > value + 1e-9:
                best, value = j, cosine(x[i], x[j])
        if best is not None:
            groups[best].append(i)
    sums = [sum(float(size[i]) for i in group) for group in groups.values()]
    rows = []
    for group, total in zip(groups.values(), sums, strict=True):
        rows.append(sum((x[i].double() * float(size[i]) for i in group), torch.zeros(x.shape[1]).double()) / total)
    return torch.stack(rows), sums


def drawn(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-6, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("selector", [vtc.DivPrune(keep=0.3), Random(keep=7, seed=1), vtc.Grid(keep=1)], ids=str)
def test_dropped_tokens_go_where_loops_send_them(selector: Method) -> None:
    x = drawn(40)
    found, plain = vtc.select(Merge(selector), x), vtc.select(selector, x)
    assert torch.equal(found.index, plain.index)
    assert (found.order is None) == (plain.order is None)
    assert found.order is None or torch.equal(found.order, plain.order)
    values, _ = by_hand(x, plain.index.tolist())
    assert_close(found.features, values)
    assert (values - x[plain.index]).abs().max() > 0.1


def test_the_lowest_index_takes_a_token_that_is_as_like_to_another() -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0], [0.0, 3.0]])
    cls = torch.tensor([0.0, 0.2, 0.3, 0.4])  # kept in the order 3, 2, 1
    found = vtc.select(Merge(FasterVLM(keep=3)), x, signals={"cls": cls})
    assert found.order.tolist() == [3, 2, 1]
    assert found.features.tolist() == [[0.5, 1.5], [2.0, 0.0], [0.0, 3.0]]


def test_rows_without_a_direction_keep_to_themselves() -> None:
    x = drawn(9)
    x[1], x[2], x[6, 0], x[7, 1] = 0.0, 0.0, math.nan, math.inf
    cls = torch.arange(9).flip(0).float()
    cls[6] = 9.5  # 6, 0, 1, 2 and 3 stay
    found = vtc.select(Merge(FasterVLM(keep=5)), x, signals={"cls": cls})
    assert found.index.tolist() == [0, 1, 2, 3, 6]
    values, sums = by_hand(x, [0, 1, 2, 3, 6])
    assert sums == [sums[0], 1, 1, 5 - sums[0], 1]  # 4, 5 and 8 went to 0 and 3; 7 to nobody
    assert_close(found.features, values)
    assert found.features[:4].isfinite().all()
    zeros = vtc.select(Merge(vtc.DivPrune(keep=2)), torch.zeros(6, 3))
    assert zeros.features.tolist() == [[0.0] * 3] * 2


def test_tokens_weigh_what_they_stand_for() -> None:
    x, size = drawn(30), torch.arange(1.0, 31.0)
    tokens = VisualTokens(x[None], (Layout.plain(30),), (0,), size=size[None])
    found = reduce(Merge(vtc.DivPrune()), tokens, (8,))
    assert found.size.dtype == torch.float32
    keep = found.index[0].argsort()
    values, sums = by_hand(x, found.index[0].tolist(), size=size)
    assert_close(found.features[0, keep], values)
    assert found.size[0, keep].tolist() == sums
    assert sum(sums) == size.sum()
    ones = reduce(Merge(vtc.DivPrune()), dataclasses.replace(tokens, size=None), (8,))
    assert ones.size.sum() == 30
    assert (ones.features - found.features).abs().max() > 0.1


@pytest.mark.parametrize("newlines", ["candidates", "keep"])
def test_newlines_take_nobody_and_join_nobody(newlines: Any) -> None:
    x = drawn(19)
    x[[*NEWLINES]] = drawn(1, seed=5)  # the same everywhere
    x[9:13] = x[8] + 0.1 * drawn(4, seed=6)  # patches that are most like a newline
    for seed in range(4):
        selector = Random(keep=6, seed=seed, newlines=newlines)
        plain = vtc.select(selector, x, layout=ANYRES).index.tolist()
        found = vtc.select(Merge(selector), x, layout=ANYRES)
        assert found.index.tolist() == plain
        assert_close(found.features, by_hand(x, plain, NEWLINES)[0])
        stay = [i for i, place in enumerate(plain) if place in NEWLINES]
        assert torch.equal(found.features[stay], x[plain][stay])


def test_an_image_of_which_newlines_alone_stay() -> None:
    x, layout = drawn(6), Layout(6, (Segment("image", 0, 6, (2, 2), True),))
    cls = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = vtc.select(Merge(FasterVLM(keep=2)), x, layout=layout, signals={"cls": cls})
    assert found.index.tolist() == [2, 5]
    assert torch.equal(found.features, x[[2, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ragged_batch_with_equal_tokens_in_parts_of_any_size(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, budget = (Layout.plain(30), ANYRES, Layout.plain(3)), (5, 7, 3)
    features = torch.full((3, 30, 6), math.nan, dtype=dtype)
    for g, layout in enumerate(layouts):
        features[g, : layout.length] = drawn(layout.length, seed=g)[torch.arange(layout.length) % 11].to(dtype)
    tokens = VisualTokens(features, layouts, (0, 1, 2))
    with NoSync():
        together = reduce(Merge(vtc.DivPrune()), tokens, budget)
    assert together.features.dtype == dtype
    monkeypatch.setattr(vtc.methods.folding, "ENTRIES", 1)
    monkeypatch.setattr(vtc.ops.merging, "ENTRIES", 40)
    parts = reduce(Merge(vtc.DivPrune()), tokens, budget)
    for g, (layout, k) in enumerate(zip(layouts, budget, strict=True)):
        alone = VisualTokens(features[g : g + 1, : layout.length], (layout,), (g,))
        own = reduce(Merge(vtc.DivPrune()), alone, (k,))
        for found in (together, parts):
            assert torch.equal(found.index[g, :k], own.index[0])
            assert torch.equal(found.features[g, :k], own.features[0])
            assert torch.equal(found.size[g, :k], own.size[0])


def test_parts_of_an_image_and_parts_around_it() -> None:
    """A selector that shares out budgets: tokens go anywhere; an allocator around the merging: within the part."""
    x = drawn(19)
    keep = vtc.select(Allocate(keep=0.4), x, layout=ANYRES).index.tolist()
    found = vtc.select(Merge(Allocate(keep=0.4)), x, layout=ANYRES)
    assert found.index.tolist() == keep
    assert_close(found.features, by_hand(x, keep, NEWLINES)[0])
    found = vtc.select(Allocate(keep=0.4, selector=Merge()), x, layout=ANYRES)
    assert found.index.tolist() == keep
    ends = [*range(4)], [i for i in range(4, 19) if i not in NEWLINES]
    for own in ends:
        kept = [i for i in keep if i in own]
        values, _ = by_hand(x[own], [own.index(i) for i in kept])
        assert_close(found.features[[keep.index(i) for i in kept]], values)


# ------------------------------------------------------------------------------------------------------------- options


def test_keep_and_newlines_are_those_of_the_selector_and_replace_them() -> None:
    method = Merge(vtc.DivPrune(keep=0.3, newlines="keep"))
    assert (method.keep, method.newlines) == (0.3, "keep")
    method = Merge(vtc.DivPrune(keep=0.3), keep=1, newlines="keep")
    assert method.selector == vtc.DivPrune(keep=1, newlines="keep")
    assert type(Merge(vtc.DivPrune(keep=1), keep=1.0).selector.keep) is float
    assert Merge(vtc.DivPrune(keep=0.5)).counts([Layout.plain(10)]) == (5,)
    assert len(vtc.select("merge", drawn(9), keep=4, selector=Random()).index) == 4
    assert vtc.select(Merge(), drawn(9), keep=1.0).features is None
    assert Merge().merges
    assert not Merge().query_aware
    assert Merge(FasterVLM()).signals() == FasterVLM().signals()


def test_it_survives_json() -> None:
    method = Merge(vtc.IDPruner(keep=64, balance=0.2, importance=vtc.FeatureNorm()), newlines="keep")
    config = CompressionConfig.of(method, "compact")
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == method
    short = {"version": 1, "method": "merge", "options": {"selector": {"method": "random"}, "keep": 3}}
    assert CompressionConfig.from_dict(short).build() == Merge(Random(keep=3))


def test_the_command_line_takes_a_selector() -> None:
    config = build_config("merge", "0.5", ['selector={"method": "random", "options": {"seed": 3}}'], "original")
    assert config.build() == Merge(Random(keep=0.5, seed=3))
    with pytest.raises(ValueError, match="no field 'selectr'"):
        build_config("merge", "0.5", ['selector={"selectr": "random"}'], "original")
    with pytest.raises(TypeError, match="selector='random'"):
        build_config("merge", "0.5", ["selector=random"], "original")


@pytest.mark.parametrize(
    ("selector", "error", "said"),
    [
        ("divprune", TypeError, "selector='divprune' is no vtc.Method"),
        (None, TypeError, "selector=None"),
        (VisionZip(), ValueError, r"selector=VisionZip.*merges by itself.*vtc.Merge\(vtc.DivPrune\(\)\)"),
        (Merge(), ValueError, "merges by itself"),
        (Allocate(selector=VisionZip(keep=0.5)), ValueError, "merges by itself"),
        (FastV(), ValueError, "does not choose before the language model"),
        (vtc.TransPrune(), ValueError, r"vtc.Chain\(vtc.Merge\(\), second\)"),
        (vtc.Chain(), ValueError, r"several methods; .*vtc.Chain\(vtc.Merge\(first\), second\)"),
    ],
    ids=str,
)
def test_selectors_that_do_not_fit_are_refused(selector: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Merge(selector)


def test_what_others_say_of_it() -> None:
    with pytest.raises(ValueError, match="merge writes new values"):
        settle(models.llava().config, read({"method": "merge", "keep": 0.5}))
    found, plain = (estimate(models.llava().config, method=m) for m in (Merge(vtc.DivPrune()), vtc.DivPrune()))
    assert found.pruned.visual == plain.pruned.visual
    with pytest.raises(ValueError, match="needs 'cls'"):
        vtc.patch(get_model("qwen2_5_vl"), Merge(FasterVLM(saliency="cls")))


# ----------------------------------------------------------------------------------------------------------- in models


def merged_by_hand(family: str, selector: Method) -> tuple[list[Any], list[Any], Any]:
    """Kept places of an unmerged run, what should stand there, and the unmerged run by hand."""
    model, batch = get_model(family), batch_of(family)
    _, _, handle = run(model, batch, selector)
    keep, values = handle.last_keep, []
    model.set_attn_implementation("eager")
    for sample, images, own, layouts in zip(batch.samples, batch.images, keep, handle.last_layouts, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        values.append(
            [
                by_hand(embeds[c], places.tolist(), set(layout.newlines()))[0].float()
                for c, places, layout in zip(images, own, layouts, strict=True)
            ]
        )
    return keep, values, continued(model, batch, keep)


@pytest.mark.parametrize(
    ("family", "newlines"),
    [("llava", "candidates"), ("llava_next", "candidates"), ("llava_next", "keep"), ("qwen2_5_vl", "candidates")],
)
def test_end_to_end(family: str, newlines: Any) -> None:
    model, batch = get_model(family), batch_of(family)
    selector = vtc.DivPrune(keep=0.4, newlines=newlines)
    keep, values, plain = merged_by_hand(family, selector)
    expected = continued(model, batch, keep, values)
    _, _, handle = run(model, batch, Merge(selector))
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, Merge(selector), expected)
    assert max(float((a.logits - b.logits).abs().max()) for a, b in zip(plain, expected, strict=True)) > 1e-3


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """A selector in front of the projector that merges nothing."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register_method
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Early(vtc.Scorer):
        name: ClassVar[str] = "early"

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(Projector()),)

        def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
            places = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask)
            return (places * 7 % 5).float()

    return Early


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_in_front_of_the_projector(family: str, early: type[Method]) -> None:
    """Merged there, the means go through the projector; newlines have no features there and stay what they are."""
    model, batch = get_model(family), batch_of(family)
    keep, _, _ = merged_by_hand(family, early(keep=0.4))
    layer = model.config.vision_feature_layer
    with torch.no_grad():
        features = by_sample(batch, packed(model, batch, tower_pass(model, batch).hidden_states[layer][:, 1:]))
        values = []
        for images, places in zip(features, keep, strict=True):
            values.append([])
            for x, kept in zip(images, places, strict=True):
                newlines = set((x == 0).all(-1).nonzero()[:, 0].tolist())
                now = model.model.multi_modal_projector(by_hand(x, kept.tolist(), newlines)[0].float())
                for i, place in enumerate(kept.tolist()):
                    if place in newlines:
                        now[i] = model.model.image_newline
                values[-1].append(now)
    check(model, batch, Merge(early(keep=0.4)), continued(model, batch, keep, values))


def test_inside_the_model_the_selector_does_what_it_does() -> None:
    fires = vtc.ToDRE(keep=0.5, pivot="random", stage2=True, tau=1.0, layer=1)
    model, batch = get_model("qwen2_5_vl"), batch_of("qwen2_5_vl")
    _, _, handle = run(model, batch, Merge(fires))
    _, _, plain = run(model, batch, fires)
    assert Merge(fires).query_aware
    assert [after for after, _ in handle.last_stages] == [0, 1]
    for ours, theirs in zip(handle.last_stages, plain.last_stages, strict=True):
        assert [[k.tolist() for k in own] for own in ours[1]] == [[k.tolist() for k in own] for own in theirs[1]]
    assert not any(len(k) for own in handle.last_stages[-1][1] for k in own)
    shares = torch.tensor([0.5, 1.0])  # the first image's tokens leave
    signals = {"text_to_visual": shares, "visual_to_text": shares}
    tokens = VisualTokens(drawn(8).repeat(2, 1, 1), (Layout.plain(8),) * 2, (0, 0), signals, samples=(0, 1))
    kept = steps_of(Merge(fires), vtc.methods.base.ANY_MODEL)[1].reduce(tokens)
    assert (kept.counts, kept.features) == ((0, 8), None)
    chain = vtc.Chain(Merge(vtc.DivPrune(keep=0.5)), vtc.TransPrune(layers=(1,), ratios=(0.5,)))
    assert chain.merges
    _, _, handle = run(model, batch, chain)
    assert all(len(b) <= len(a) / 2 for a, b in zip(*(s[0] for _, s in handle.last_stages), strict=True))
    assert len(steps_of(Merge(vtc.ToDRE(keep=1.0, pivot="random", stage2=True)), vtc.methods.base.ANY_MODEL)) == 1


def test_no_gradient_is_lost_in_silence() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    with vtc.patch(model, Merge(vtc.DivPrune(keep=0.5))):
        with pytest.raises(NotImplementedError, match="merge merges tokens, and no gradient flows"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
