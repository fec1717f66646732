"""Methods that drop tokens inside the language model, and chains: no model, only what the engine would hand over."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import inside as inside_of
from asking import keep_mask, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync
from zoo import get_model, make_batch

import vtc
from vtc import ops
from vtc.config import CompressionConfig
from vtc.methods.allocate import Allocate
from vtc.methods.base import ModelFacts, Stage
from vtc.methods.chain import Chain
from vtc.methods.divprune import DivPrune
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention, FeatureNorm
from vtc.methods.random import Random
from vtc.methods.registry import list_methods, method_class
from vtc.methods.schedule import scaled
from vtc.methods.stages import steps_of
from vtc.methods.todre import ToDRE
from vtc.methods.transprune import RATIOS, TransPrune
from vtc.places import Entry, Layer, Tower
from vtc.signals import Rows, Share, Transitions
from vtc.tokens import Layout, Segment, VisualTokens

RECORDED = Path(__file__).parents[1] / "recorded" / "transprune_rank.npz"
STAGE2 = ToDRE(stage2=True)


def facts(depth: int = 32, *signals: str) -> ModelFacts:
    return ModelFacts(model_type="toy", width=8, depth=depth, signals=frozenset(signals))


def inside(
    lengths: list[int], *, alive: torch.Tensor | None = None, seed: int = 0, pad: int = 0, layouts=None, given=None
) -> VisualTokens:
    """Scores of image g depend on its length alone, wherever it stands."""
    layouts = [Layout.plain(n) for n in lengths] if layouts is None else layouts
    n = max(lengths) + pad
    real = torch.arange(n) < torch.tensor(lengths)[:, None]
    alive = real if alive is None else alive & real
    signals = {name: torch.zeros(len(lengths), n) for name in ("transition", "instruction")}
    for g, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + length)
        for scores in signals.values():
            scores[g, :length] = torch.rand(length, generator=generator)
    return VisualTokens(
        torch.zeros(len(lengths), n, 4),
        tuple(layouts),
        (0,) * len(lengths),
        {name: scores.masked_fill(~alive, 0.0) for name, scores in signals.items()},
        samples=tuple(range(len(lengths))),
        alive=alive,
        alive_counts=tuple(alive.sum(1).tolist()),
        entered=tuple(lengths) if given is None else given,
    )


# --- TransPrune


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (7, 9, 12)), (28, (6, 8, 11)), (40, (9, 11, 15)), (24, (5, 7, 9)), (4, (1, 2, 3))]
)
def test_published_layers_scale_with_depth(depth, layers):
    assert scaled(TransPrune.published, depth) == layers


@given(st.integers(4, 200))
def test_a_schedule_fits_every_depth(depth):
    stages = TransPrune().stages(facts(depth))
    after = [stage.at.after for stage in stages]
    assert sorted(set(after)) == after
    assert after[0] >= 1
    assert after[-1] < depth
    for stage in stages:
        transitions, rows = stage.needs
        assert rows == Rows(stage.at.after, of="text")  # the next layer's
        assert transitions == Transitions(after[0] - 1, until=stage.at.after)


def test_transitions_are_those_of_layers_7_to_12():
    def watched(method: TransPrune, depth: int) -> list[tuple[int, tuple[int, ...]]]:
        return [(stage.at.after, tuple(stage.needs[0].watched())) for stage in method.stages(facts(depth))]

    assert watched(TransPrune(), 32) == [(7, (6,)), (9, (6, 7, 8)), (12, (6, 7, 8, 9, 10, 11))]
    own = TransPrune(layers=(3, 5), ratios=(0.5, 0.25), since=2)
    assert watched(own, 6) == [(3, (1, 2)), (5, (1, 2, 3, 4))]


def test_it_repeats_a_recorded_run():
    """Three stages of the released code on 64 image tokens: scores, and who stays."""
    z = np.load(RECORDED)
    alive, total = torch.ones(1, 64, dtype=torch.bool), torch.zeros(64)
    for stage in range(3):
        ids = alive[0].nonzero()[:, 0]
        for j in range(stage + 1):
            total[ids] += torch.from_numpy(z[f"stage{stage}_newTTV{j}"])[6 : 6 + len(ids)]
        instruction = torch.zeros(1, 64)
        instruction[0, ids] = torch.from_numpy(z[f"stage{stage}_iga_norm"])
        tokens = dataclasses.replace(
            inside([64], alive=alive), signals={"transition": total[None] * alive, "instruction": instruction}
        )
        score = TransPrune(alpha=0.5).score(Stage(Layer(7)), tokens)[0, ids] * 2
        assert torch.allclose(score, torch.from_numpy(z[f"stage{stage}_score"]), atol=1e-6)
        kept, (count,) = inside_of(TransPrune(), stage, tokens)
        assert kept[0].nonzero()[:, 0].tolist() == sorted(z[f"stage{stage}_kept_orig_image_ids"].tolist())
        assert count == int(64 * RATIOS[stage])
        alive = kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 30, 64]), min_size=1, max_size=4, unique=True),
    keep=st.sampled_from([None, 0.01, 0.125, 0.3, 1.0, 1, 5, 100]),
    pad=st.integers(0, 3),
)
def test_stages_only_take_away_and_an_image_alone_keeps_the_same(lengths, keep, pad):
    method = TransPrune(keep=keep)
    together = inside(lengths, pad=pad)
    single = [inside([n]) for n in lengths]
    for index in range(3):
        mask, counts = inside_of(method, index, together)
        assert not (mask & ~together.mask).any()
        assert mask.sum(1).tolist() == list(counts)
        for g, n in enumerate(lengths):
            own, (count,) = inside_of(method, index, single[g])
            assert torch.equal(own[0], mask[g, :n])
            single[g] = inside([n], alive=own)
            if keep in (None, 0.125):
                assert count == max(1, int(n * RATIOS[index]))
            if index == 2:
                assert count == max(1, keep if isinstance(keep, int) and keep < n else int(method_share(keep, n)))
        together = inside(lengths, alive=mask, pad=pad)


def method_share(keep, n: int) -> float:
    return n * (0.125 if keep is None else min(keep, 1.0)) + 1e-9


def test_another_keep_bends_the_schedule():
    assert TransPrune().keep == 0.125
    ratios = [TransPrune(keep=0.5).ratio(i, 576) for i in range(3)]
    assert ratios == pytest.approx([1 - 0.125 * 4 / 7, 1 - 0.375 * 4 / 7, 0.5])
    assert TransPrune(ratios=(0.5, 0.4, 0.2)).keep == 0.2


def test_ties_go_to_the_first():
    tokens = inside([8])
    tokens = dataclasses.replace(tokens, signals={name: torch.ones(1, 8) for name in tokens.signals})
    assert inside_of(TransPrune(keep=3), 2, tokens)[0][0].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_both_scores_count_and_alpha_weighs_them():
    transition = torch.tensor([[4.0, 1.0, 1.0, 0.0]])
    instruction = torch.tensor([[0.0, 1.0, 0.0, 7.0]])
    tokens = dataclasses.replace(inside([4]), signals={"transition": transition, "instruction": instruction})

    def kept(**options) -> list[int]:
        return inside_of(TransPrune(keep=2, **options), 2, tokens)[0][0].nonzero()[:, 0].tolist()

    assert kept() == [0, 3]
    assert kept(alpha=1.0) == [0, 1]
    assert kept(alpha=0.0) == [1, 3]


def test_newlines_can_be_spared():
    layout = Layout(15, (Segment("crops", 0, 15, (5, 2), newline=True),))
    tokens = inside([15], layouts=[layout])
    mask, counts = inside_of(TransPrune(keep=0.5, newlines="keep"), 2, tokens)
    assert counts == (5 + 5,)
    assert mask[0, layout.newlines()].all()
    assert inside_of(TransPrune(keep=0.5), 2, tokens)[1] == (7,)


def test_an_image_that_lost_everything_stays_lost():
    alive = torch.tensor([[False] * 6, [True] * 6])
    mask, counts = inside_of(TransPrune(), 2, inside([6, 6], alive=alive))
    assert counts == (0, 1)
    assert mask.sum(1).tolist() == [0, 1]


def test_transitions_by_code_and_by_paper():
    a, b = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([9, 6])[:, None]
    visual = (torch.arange(9) % 2 == 0) & real
    code, by_paper = (TransPrune(variant=v).stages(facts())[0].needs[0] for v in ("code", "paper"))
    assert torch.equal(code.score(a, b, real, visual), ops.transition_variation(a, b, mask=real))
    paper = by_paper.score(a, b, real, visual)
    turned = by_paper.score(a, -b, real, visual)
    assert torch.allclose(paper, turned, atol=1e-7)  # |cos|
    assert not paper[~visual].any()
    assert not torch.allclose(code.score(a, -b, real, visual), code.score(a, b, real, visual))


def test_nothing_leaves_before_the_model():
    tokens = VisualTokens(torch.randn(2, 9, 4), (Layout.plain(9), Layout.plain(5)), (0, 1))
    mask, counts = keep_mask(TransPrune(), tokens)
    assert counts == (9, 5)
    assert torch.equal(mask, tokens.mask)
    assert not TransPrune().prunes_at_entry
    assert TransPrune().query_aware


def test_transprune_does_not_wait_for_the_device():
    tokens = inside([30, 9])
    with NoSync():
        inside_of(TransPrune(), 1, tokens)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ratios": (0.5, 0.6, 0.1)}, "grow"),
        ({"ratios": (0.5, 0.2)}, r"\(0.5, 0.2\)"),
        ({"ratios": (0.5, 0.2, 0.0)}, "0.0"),
        ({"ratios": (1.0, 1.0, 1.0)}, "below 1"),
        ({"ratios": ()}, "ratios"),
        ({"layers": (3, 3, 5)}, r"\(3, 3, 5\)"),
        ({"layers": (0, 3, 5)}, r"\(0, 3, 5\)"),
        ({"layers": (3, 5)}, "one entry"),
        ({"since": 3}, "since=3"),
        ({"layers": (3, 5, 6), "since": 4}, "since=4"),
        ({"variant": "both"}, "'both'"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_a_bad_schedule_is_named(options, word):
    with pytest.raises(ValueError, match=word):
        TransPrune(**options)


def test_layers_outside_the_model_are_refused():
    with pytest.raises(ValueError, match=r"after layer 12.*12 layers.*1 to 11"):
        steps_of(TransPrune(layers=(7, 9, 12)), facts(12))
    with pytest.raises(ValueError, match=r"3 layers.*layers=\(1,\)"):
        steps_of(TransPrune(), facts(3))
    steps_of(TransPrune(layers=(1,), ratios=(0.25,)), facts(3))
    with pytest.raises(ValueError, match=r"layer=28.*\[1, 23\]"):
        steps_of(ToDRE(stage2=True, layer=28), facts(24))
    with pytest.raises(ValueError, match="1 layers"):
        steps_of(STAGE2, facts(1))
    steps_of(ToDRE(), facts(1))


# --- ToDRE, stage 2


def test_stage_2_stands_after_seven_eighths():
    shares = (Share(27, of="text"), Share(27, of="visual"))
    assert STAGE2.stages(facts(32))[1] == Stage(Layer(28), shares, all_or_nothing=True)
    assert [STAGE2.stages(facts(depth))[1].at.after for depth in (28, 24, 4, 3, 2)] == [24, 21, 3, 2, 1]
    assert ToDRE(stage2=True, layer=5).stages(facts(8))[1].at == Layer(5)
    assert [stage.at for stage in ToDRE().stages(facts(32))] == [Entry()]
    assert STAGE2.query_aware
    assert not ToDRE().query_aware


def test_everything_leaves_where_both_shares_are_low():
    tokens = inside([5, 3, 4, 2, 2])
    shares = {
        "text_to_visual": torch.tensor([0.05, 0.05, 0.2, 0.1, torch.nan]),
        "visual_to_text": torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0]),
    }
    tokens = dataclasses.replace(tokens, signals=shares)
    mask, counts = inside_of(STAGE2, 0, tokens)
    assert counts == (0, 3, 4, 2, 2)  # 0.1 is not below 0.1, and no number is no reason
    assert mask.sum(1).tolist() == list(counts)
    assert inside_of(ToDRE(stage2=True, tau=0.5), 0, tokens)[1] == (0, 0, 0, 0, 2)


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"tau": 2.0}, {"layer": 0}])
def test_bad_options_of_stage_2_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ToDRE(**options)


# --- chains


def test_a_chain_chooses_with_the_first_and_drops_with_the_second():
    tokens = VisualTokens(torch.randn(1, 40, 4), (Layout.plain(40),), (0,))
    chain = Chain(DivPrune(keep=0.5), TransPrune()).settle(facts(32))
    assert torch.equal(keep_mask(chain, tokens)[0], keep_mask(DivPrune(keep=0.5), tokens)[0])
    assert chain.stages(facts(32))[1:] == TransPrune().stages(facts(32))
    left = inside([40], alive=keep_mask(chain, tokens)[0], given=(20,))
    assert inside_of(chain, 0, left)[1] == (17,)  # 20 * 0.875
    assert chain.query_aware
    assert not Chain(DivPrune(), ToDRE(keep=1.0, stage2=True)).first.query_aware
    assert chain.counts([Layout.plain(40)]) == (2,)  # int(20 * 0.125)


@pytest.mark.parametrize("order", [0, 1])
def test_stages_of_both_are_taken_in_order(order):
    late = order == 0
    first = ToDRE(keep=0.5, stage2=True, layer=20 if late else 2, pivot="random")
    chain = Chain(first, TransPrune(layers=(4, 8), ratios=(0.5, 0.25))).settle(facts(32))
    assert [stage.at.after for stage in chain.stages(facts(32))[1:]] == ([4, 8, 20] if late else [2, 4, 8])
    tokens = inside([16])
    shares = {"text_to_visual": torch.zeros(1), "visual_to_text": torch.zeros(1)}
    tokens = dataclasses.replace(tokens, signals=tokens.signals | shares)
    counts = [inside_of(chain, index, tokens)[1] for index in range(3)]
    assert counts == ([(8,), (4,), (0,)] if late else [(0,), (8,), (4,)])


def test_settling_reaches_the_members():
    chain = Chain(IDPruner(keep=0.5), TransPrune())
    assert chain.settle(facts(32, "cls")).first.importance == ClsAttention()
    assert chain.settle(facts(32)).first.importance == FeatureNorm()
    assert needs(Chain(ToDRE(), TransPrune())) == {"cls", "transition", "instruction"}
    nested = Allocate(selector=IDPruner()).settle(facts(32, "cls"))
    assert nested.selector.importance == ClsAttention()


def test_keep_and_newlines_of_a_chain_are_those_of_the_first():
    assert Chain(DivPrune(keep=64), TransPrune()).keep == 64
    again = Chain(DivPrune(keep=64), TransPrune(), keep=0.25, newlines="keep")
    assert again.first == DivPrune(keep=0.25, newlines="keep")
    assert type(Chain(DivPrune(keep=2), TransPrune(), keep=0.5).first.keep) is float


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (TransPrune(), DivPrune(), "other way round"),
        (DivPrune(keep=1.0), TransPrune(), "drops nothing before"),
        (DivPrune(), Random(), "has chosen already"),
        (DivPrune(), STAGE2, "keep=1.0"),
        (DivPrune(keep=32), TransPrune(keep=64), r"64.*more than the 32"),
        (DivPrune(), TransPrune(newlines="keep"), "newlines='keep'"),
        (vtc.InTower(then=DivPrune()), DivPrune(), "has chosen already"),
        (vtc.ToMe(), vtc.InTower(), "has chosen already"),
        (DivPrune(), vtc.ToMe(), "has chosen already"),
    ],
)
def test_chains_that_make_no_sense_are_refused(first, second, word):
    with pytest.raises(ValueError, match=word):
        Chain(first, second)


def test_behind_the_tower_the_second_may_choose_before_the_model():
    shallow = dataclasses.replace(facts(), tower_depth=4)
    chain = Chain(vtc.ToMe(keep=0.5), DivPrune(keep=0.25)).settle(shallow)
    assert [type(step.stage.at) for step in steps_of(chain, shallow)] == [Tower, Tower, Tower, Entry]
    assert chain.counts([Layout.plain(100)]) == (12,)
    assert Chain(vtc.InTower(keep=0.5, restore=True), DivPrune(keep=0.25)).counts([Layout.plain(100)]) == (25,)
    assert Chain(vtc.PixelPrune(), DivPrune()).counts([Layout.plain(100)]) is None
    assert Chain(vtc.ToMe(keep=2), DivPrune(keep=9)).second.keep == 9  # an image may be several pictures


def test_a_chain_is_what_its_parts_are():
    for part in (Chain(vtc.ToMe(), vtc.Adaptive()), Chain(vtc.Adaptive(), TransPrune())):
        assert part.content_decides
    for part in (Chain(GlobalCom2(), TransPrune()), Chain(vtc.ToMe(), DivPrune(newlines="keep"))):
        assert part.reads_layout
    assert not Chain(vtc.ToMe(), DivPrune()).reads_layout


INSIDE = {
    "fastv": {"keep": 0.5, "layer": 1},
    "pyramiddrop": {"layers": (1, 2), "ratios": (0.6, 0.3)},
    "sparsevlm": {"layers": (1, 2), "ratios": (0.6, 0.3)},
    "transprune": {"layers": (1, 2), "ratios": (0.6, 0.3)},
    "dart": {"keep": 0.5, "layer": 1},
}


def test_whoever_chooses_before_the_model_is_told_all_that_work_inside():
    with pytest.raises(ValueError, match="has chosen already") as refused:
        Chain(DivPrune(), Random())
    named = set(re.findall(r"vtc\.(\w+)\(", str(refused.value).split("inside it:")[1]))
    own = {name for name in list_methods() if method_class(name).__name__ in named}
    assert own == {*INSIDE, "todre"}  # whoever adds one adds it here


@pytest.mark.parametrize("name", INSIDE)
def test_every_method_inside_works_as_the_second_of_a_chain(name):
    """Alone and in a ragged batch, what it leaves is a part of what the first left, as many as it says."""
    second = method_class(name)(**INSIDE[name])
    chain = Chain(DivPrune(keep=0.5), second)
    assert chain.merges == second.merges
    model, batch = get_model("llava"), make_batch("llava", padding="right")  # no positions are given: equal ones
    with torch.no_grad(), vtc.patch(model, chain) as handle:
        model(**batch)
        entered, *stages = [kept for _, kept in handle.last_stages]
        layouts = [Layout.plain(16)]
        assert {len(kept) for row in stages[-1] for kept in row} == set(chain.counts(layouts))
        for row, sample in enumerate(batch.samples):
            if batch.images[row]:
                model(**sample)
                for (_, alone), together in zip(handle.last_stages, [entered, *stages], strict=True):
                    assert [kept.tolist() for kept in alone[0]] == [kept.tolist() for kept in together[row]]
    for before, after in pairwise([entered, *stages]):
        for row, left in zip(before, after, strict=True):
            assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(row, left, strict=True))


def test_chains_that_do_not_fit_a_model_are_refused():
    with pytest.raises(ValueError, match="drops nothing inside"):
        Chain(DivPrune(), ToDRE(keep=1.0)).check(facts(32))
    with pytest.raises(ValueError, match="after layer 7"):
        Chain(ToDRE(stage2=True, layer=7), TransPrune()).check(facts(32))
    with pytest.raises(ValueError, match="12 layers"):
        Chain(DivPrune(), TransPrune(layers=(7, 9, 12))).check(facts(12))
    with pytest.raises(TypeError, match="'divprune'"):
        Chain("divprune", TransPrune())


@pytest.mark.parametrize(
    "method",
    [
        Chain(),
        Chain(ToDRE(keep=0.5, stage2=True), TransPrune(layers=(1, 2), ratios=(0.5, 0.25))),
        Chain(GlobalCom2(selector=DivPrune()), TransPrune(keep=7)),
        Allocate(selector=IDPruner(importance=ClsAttention()), by="frame"),
        GlobalCom2(keep=64, selector=IDPruner(balance=0.3)),
    ],
)
def test_compositions_survive_json(method):
    config = CompressionConfig.of(method)
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == method
