"""The methods, and what the base class does for all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from typing import ClassVar

import asking
import numpy as np
import pytest
import torch
from asking import keep_mask, needs
from every import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync

import vtc
from vtc import ops
from vtc.methods import Method, list_methods, make_method, method_class, register_method
from vtc.methods.base import ANY_MODEL, Reduction, Stage, image_seed
from vtc.methods.divprune import DivPrune
from vtc.methods.grid import Grid
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention, FeatureNorm
from vtc.methods.random import Random
from vtc.methods.registry import _REGISTRY, blind_methods
from vtc.methods.scope import SCOPE
from vtc.methods.todre import ToDRE
from vtc.methods.visionzip import VisionZip
from vtc.places import Layer, Tower
from vtc.tokens import Layout, Segment, VisualTokens


def acts_first(method: Method) -> bool:
    """Whether all it does is between the vision tower and the language model."""
    return all(
        Tower.rank < stage.at.rank < Layer.rank for member in method.members for stage in member.stages(ANY_MODEL)
    )


def plainly_counted(method: Method) -> bool:
    """Whether ``keep`` alone says how many of a picture stay; not: budgets of parts, videos, what content decides."""
    ks = method.counts([Layout.plain(20)])
    return ks == (vtc.budget.count(method.keep, 20),) and not isinstance(method, (vtc.Allocate, vtc.GlobalCom2))


METHODS = [
    *(m for m in SAMPLES.values() if acts_first(m) and plainly_counted(m)),
    ToDRE(variant="k_center"),
    ToDRE(pivot="random", seed=3),
    ToDRE(pivot="received"),
    IDPruner(importance=ClsAttention()),
    IDPruner(importance=FeatureNorm(), balance=0.2),
    IDPruner(importance=ClsAttention(), centered=True),
    DivPrune(centered=True, variant="qwen"),
    vtc.CDPruner(relevance=ClsAttention()),
    vtc.CDPruner(centered=True),
    vtc.VisPruner(important=0.2, released=True),
    vtc.HiPrune(alpha=0.9, wraps=False),
    vtc.HoloV(crops=3, variant="paper"),
    vtc.Merge(vtc.FasterVLM()),
    SCOPE(alpha=2.0, combined="add"),
    VisionZip(contextual=4),
]
NESTED = [m for m in METHODS if m.nested]
ANYRES = Layout(19, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 15, (3, 4), newline=True)))
NEWLINES = {8, 13, 18}


def label(method: Method) -> str:
    """Its options, those of a selector too."""
    return "-".join([method.name, *(str(v) for f in dataclasses.fields(method)[2:] for v in [getattr(method, f.name)])])


def tokens_of(layouts, seed=0, d=6, pad=0, ordinals=None, poison=math.nan) -> VisualTokens:
    """Image g has the same content whatever stands beside it: it depends on seed and its ordinal."""
    ordinals = tuple(range(len(layouts))) if ordinals is None else ordinals
    n = max(layout.length for layout in layouts) + pad
    features = torch.full((len(layouts), n, d), poison)
    keys, heads = torch.zeros(len(layouts), n, 4), torch.zeros(len(layouts), n, 2, 2, 4)
    rows = {name: torch.zeros(len(layouts), n) for name in ("cls", "cls_shallow", "received", "received_shallow")}
    for g, (layout, ordinal) in enumerate(zip(layouts, ordinals, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + ordinal)
        features[g, : layout.length] = torch.randn(layout.length, d, generator=generator)
        for row in rows.values():
            row[g, : layout.length] = torch.rand(layout.length, generator=generator)
        keys[g, : layout.length] = torch.randn(layout.length, 4, generator=generator)
        heads[g, : layout.length] = torch.randn(layout.length, 2, 2, 4, generator=generator)
        heads[g, : layout.length, ..., -1] = torch.tensor([[1.0], [0.0]])  # of queries and keys
    return VisualTokens(features, tuple(layouts), ordinals, {**rows, "keys": keys, "heads": heads})


def picks_of(method: Method, tokens: VisualTokens) -> list[list[int]]:
    budget = method.counts(tokens.layouts, method.stages(ANY_MODEL)[0])
    if budget == tokens.lengths:  # then nobody is asked
        return [[*range(n)] for n in budget]
    picks = asking.picks(method, tokens, budget)
    assert picks.dtype == torch.long
    assert picks.shape == (len(budget), max(budget))
    return [row[:k].tolist() for row, k in zip(picks, budget, strict=True)]


@pytest.mark.parametrize("method", METHODS, ids=label)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 5, 17, 30]), min_size=1, max_size=4),
    keep=st.sampled_from([0.01, 0.3, 0.5, 1, 1.0]),
    pad=st.integers(0, 5),
    poison=st.sampled_from([math.nan, math.inf, 0.0]),
)
def test_counts_hold_and_an_image_alone_keeps_the_same(method, lengths, keep, pad, poison):
    method = dataclasses.replace(method, keep=keep)
    layouts = [Layout.plain(n) for n in lengths]
    batch = tokens_of(layouts, pad=pad, poison=poison)
    together = picks_of(method, batch)
    mask, counts = keep_mask(method, batch)
    assert mask.dtype == torch.bool
    assert mask.shape == batch.features.shape[:2]
    for g, (n, row) in enumerate(zip(lengths, together, strict=True)):
        assert len(row) == len(set(row)) == (keep if isinstance(keep, int) else max(1, round(keep * n))) == counts[g]
        assert all(0 <= i < n for i in row)
        alone = tokens_of([layouts[g]], ordinals=(g,))
        assert picks_of(method, alone) == [row]
        assert mask[g].nonzero()[:, 0].tolist() == sorted(row)
        assert torch.equal(keep_mask(method, alone)[0][0], mask[g, :n])


@pytest.mark.parametrize("method", NESTED, ids=label)
def test_a_smaller_budget_keeps_the_first_of_a_larger(method):
    tokens = tokens_of([Layout.plain(30), ANYRES], pad=3)
    most = picks_of(dataclasses.replace(method, keep=19), tokens)
    for k in (1, 2, 10, 18):
        assert picks_of(dataclasses.replace(method, keep=k), tokens) == [row[:k] for row in most]


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_keep_newlines_keeps_them_all_and_spends_the_budget_on_the_rest(method):
    method = dataclasses.replace(method, keep=0.5, newlines="keep")
    tokens = tokens_of([ANYRES, Layout.plain(25)], pad=2)
    mask, counts = keep_mask(method, tokens)
    assert counts == (8 + 3, 12)
    assert mask.sum(1).tolist() == [11, 12]
    kept = set(mask[0].nonzero()[:, 0].tolist())
    assert kept >= NEWLINES
    bare, index = tokens.without_newlines()
    row = picks_of(method, bare)[0]
    assert kept - NEWLINES == set(index[0][row].tolist())


def test_newlines_as_candidates_count_in_the_budget():
    mask, counts = keep_mask(DivPrune(keep=0.5), tokens_of([ANYRES]))
    assert counts == (10,)
    assert mask.sum() == 10


@pytest.mark.parametrize("newlines", ["candidates", "keep"])
def test_keep_everything_never_selects(newlines, monkeypatch):
    monkeypatch.setattr(DivPrune, "reduce", lambda *a: pytest.fail("reduce was called"))
    tokens = tokens_of([ANYRES, Layout.plain(3)], pad=2)
    mask, counts = keep_mask(DivPrune(keep=1.0, newlines=newlines), tokens)
    assert counts == (19, 3)
    assert torch.equal(mask, tokens.mask)


@pytest.mark.parametrize("method", NESTED, ids=label)
def test_select_knows_the_order_of_all(method):
    tokens = tokens_of([Layout.plain(9)])
    signals = {name: signal[0] for name, signal in tokens.signals.items()}
    found = vtc.select(method, tokens.features[0], keep=9, signals=signals)
    assert found.index.tolist() == [*range(9)]
    assert found.order.tolist()[:8] == vtc.select(method, tokens.features[0], keep=8, signals=signals).order.tolist()
    assert vtc.select(method, tokens.features[0], keep=1.0, signals=signals).order is None


def test_unread_entries_of_an_index_do_not_matter():
    @dataclass(frozen=True, kw_only=True)
    class Sloppy(Method):
        name: ClassVar[str] = "sloppy"

        def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
            picks = torch.full((len(budget), max(budget) + 2), 10**6)
            for g, k in enumerate(budget):
                picks[g, :k] = torch.arange(k)
            return Reduction(picks)

    mask, _ = keep_mask(Sloppy(keep=0.5), tokens_of([Layout.plain(20), Layout.plain(4)]))
    assert mask.sum(1).tolist() == [10, 2]


def test_an_index_of_the_wrong_shape_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Short(Method):
        name: ClassVar[str] = "short"

        def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
            return Reduction(torch.zeros(len(budget), 1, dtype=torch.long))

    with pytest.raises(ValueError, match=r"Short.reduce.*\(1, 1\).*\(1, 10\)"):
        keep_mask(Short(keep=0.5), tokens_of([Layout.plain(20)]))


@pytest.mark.parametrize("newlines", ["candidates", "keep"])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_no_method_waits_for_the_device(method, newlines):
    tokens = tokens_of([ANYRES, Layout.plain(9)])
    with NoSync():
        keep_mask(method if method.newlines == "keep" else dataclasses.replace(method, newlines=newlines), tokens)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_the_global_random_state_is_neither_read_nor_moved(method):
    tokens = tokens_of([Layout.plain(30)])
    random.seed(1), torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = picks_of(method, tokens)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2), torch.manual_seed(2)
    assert picks_of(method, tokens) == first


# --- DivPrune and ToDRE


def test_divprune_is_farthest_first():
    tokens = tokens_of([Layout.plain(30), Layout.plain(20)])
    for g, n in enumerate((30, 20)):
        expected = ops.farthest_first(tokens.features[g, :n], round(0.3 * n))
        assert picks_of(DivPrune(keep=0.3), tokens)[g] == expected.tolist()


def test_todre_starts_at_the_highest_cls_attention():
    tokens = tokens_of([Layout.plain(30), Layout.plain(20)])
    starts = [int(tokens.signals["cls"][g, :n].argmax()) for g, n in enumerate((30, 20))]
    for variant, pick in (("max_sum", ops.max_sum), ("k_center", ops.farthest_first)):
        for g, n in enumerate((30, 20)):
            expected = pick(tokens.features[g, :n], round(0.3 * n), start=starts[g])
            assert picks_of(ToDRE(keep=0.3, variant=variant), tokens)[g] == expected.tolist()


def test_todre_takes_its_pivot_from_the_thumbnail_where_there_is_one():
    tokens = tokens_of([ANYRES, Layout.plain(19), ANYRES])
    cls = torch.zeros(3, 19)
    cls[:, 10], cls[:, 2] = 5.0, 1.0  # 10 lies in the crops, 2 in the thumbnail
    cls[2] = math.nan
    tokens = dataclasses.replace(tokens, signals={"cls": cls})
    assert [row[0] for row in picks_of(ToDRE(), tokens)] == [2, 10, 0]


@pytest.mark.parametrize("pivot", ["cls", "random"])
def test_a_newline_is_never_the_pivot(pivot):
    layout = Layout(15, (Segment("crops", 0, 15, (5, 2), newline=True),))
    tokens = tokens_of([layout])
    cls = torch.zeros(1, 15)
    cls[0, layout.newlines()] = 9.0
    tokens = dataclasses.replace(tokens, signals={"cls": cls})
    for seed in range(20):
        assert picks_of(ToDRE(pivot=pivot, seed=seed), tokens)[0][0] not in layout.newlines()


def test_a_random_pivot_depends_on_seed_ordinal_and_length_alone():
    def pivot(seed: int, ordinal: int, n: int) -> int:
        return picks_of(ToDRE(pivot="random", seed=seed), tokens_of([Layout.plain(n)], ordinals=(ordinal,)))[0][0]

    assert len({pivot(s, 0, 500) for s in range(8)}) > 4
    assert len({pivot(0, o, 500) for o in range(8)}) > 4
    assert pivot(0, 0, 500) == pivot(0, 0, 500)


def test_only_the_cls_pivot_needs_the_signal():
    assert needs(ToDRE()) == {"cls"}
    assert needs(ToDRE(pivot="random")) == set()
    assert 'vtc.ToDRE(pivot="random")' in ToDRE().remedy
    tokens = dataclasses.replace(tokens_of([Layout.plain(9)]), signals={})
    assert len(picks_of(ToDRE(pivot="random"), tokens)[0]) == 2
    assert "divprune" in blind_methods()
    assert "todre" not in blind_methods()


@pytest.mark.parametrize(
    ("options", "word"), [({"variant": "max"}, "'max'"), ({"pivot": "center"}, "'center'"), ({"newlines": "x"}, "'x'")]
)
def test_todre_names_a_bad_option(options, word):
    with pytest.raises(ValueError, match=word):
        ToDRE(**options)


# --- baselines


def test_random_is_uniform_over_seeds():
    hits = torch.zeros(12)
    tokens = tokens_of([Layout.plain(12)])
    for seed in range(400):
        hits[picks_of(Random(keep=3, seed=seed), tokens)[0]] += 1
    assert hits.sum() == 1200
    assert hits.min() > 60  # expected 100, sigma about 9
    assert hits.max() < 140


def test_random_differs_between_images_of_a_sample_and_repeats_between_samples():
    tokens = tokens_of([Layout.plain(40)] * 3, ordinals=(0, 1, 0))
    first, second, again = picks_of(Random(keep=10), tokens)
    assert first == again
    assert first != second


def test_image_seed_is_the_same_everywhere():
    assert image_seed(0, 0, 576) == 4700551974576738503
    assert 0 <= image_seed(-1, 10**9, 10**9) < 2**63


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), part=st.floats(0, 1))
def test_grid_is_distinct_ascending_even_and_centred(n, part):
    k = 1 + int(part * (n - 1))
    row = picks_of(Grid(keep=k), tokens_of([Layout.plain(n)], d=1))[0]
    assert row == [((2 * i + 1) * n) // (2 * k) for i in range(k)]
    steps = {b - a for a, b in itertools.pairwise(row)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
    assert min(steps, default=1) >= 1
    assert abs(row[0] - (n - 1 - row[-1])) <= 1 + n % 2


# --- base class and registry


@pytest.mark.parametrize(
    "name", ["divprune", "todre", "idpruner", "transprune", "globalcom2", "allocate", "chain", "random", "grid"]
)
def test_registered_by_name(name):
    assert name in list_methods()
    assert make_method(name, keep=0.5).keep == 0.5
    assert method_class(name).name == name


def test_methods_are_frozen_hashable_values():
    assert DivPrune(keep=64) == DivPrune(keep=64) != DivPrune(keep=65)
    assert len({DivPrune(), DivPrune(), ToDRE()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        DivPrune().keep = 3
    with pytest.raises(TypeError):
        DivPrune(0.5)


def test_a_numpy_keep_counts_as_what_it_is():
    assert type(DivPrune(keep=np.int64(5)).keep) is int
    assert DivPrune(keep=np.int64(5)).counts([Layout.plain(9)]) == (5,)
    with pytest.raises(ValueError, match=r"1\.5"):
        DivPrune(keep=1.5)


def test_unknown_names_and_options_are_named():
    with pytest.raises(ValueError, match=r"'divprun'.*'divprune'"):
        method_class("divprun")
    with pytest.raises(TypeError, match=r"'kep'.*keep"):
        make_method("divprune", kep=0.5)


def test_a_method_of_the_earlier_contract_is_told_what_to_write():
    members = {"name": "earlier", "select": lambda self, tokens, budget: None}
    with pytest.raises(TypeError, match=r"Earlier has select, which became reduce.*docs/methods.md"):
        register_method(dataclasses.dataclass(frozen=True, kw_only=True)(type("Earlier", (Method,), members)))
    assert "earlier" not in list_methods()


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.setattr("vtc.methods.registry._REGISTRY", dict(_REGISTRY))
    with pytest.raises(ValueError, match="divprune"):
        register_method(type("Other", (Grid,), {"name": "divprune"}))
    with pytest.raises(ValueError, match="lower-case"):
        register_method(type("Other", (Grid,), {"name": "Upper"}))
