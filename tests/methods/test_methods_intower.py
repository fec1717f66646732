"""InTower without a model: rules, stages, counts, refusals. With models: tests/engine/test_tower.py
and the methods' matrix.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import vtc
from vtc.methods.base import ModelFacts
from vtc.methods.stages import steps_of
from vtc.places import Entry, Layer, Tower
from vtc.tokens import Layout, Segment


def facts(depth: int = 24, restores: bool = False, *signals: str) -> ModelFacts:
    return ModelFacts(
        model_type="toy", width=8, depth=32, tower_depth=depth, restores=restores, signals=frozenset(signals)
    )


@pytest.mark.parametrize(("after", "block"), [(1 / 3, 8), (0.0, 2), (0.5, 12), (0, 0), (5, 5), (0.99, 24)])
def test_where(after: Any, block: int) -> None:
    method = vtc.InTower(after=after).settle(facts(24, False, "cls", "received"))
    assert method.stages(facts())[0].at == Tower(block)


def test_the_rule_reads_the_block_before() -> None:
    for rule, kinds in (
        ("cls", ["cls"]),
        ("received", ["received"]),
        ("diverse", []),
        (vtc.SCOPE(saliency="cls"), ["cls"]),
    ):
        (stage,) = vtc.InTower(rule=rule, after=5).stages(facts())
        assert [(s.kind, s.layer) for s in stage.needs] == [(kind, 4) for kind in kinds]  # type: ignore[attr-defined]


def test_settled() -> None:
    assert vtc.InTower().settle(facts(24, False, "cls", "received")).rule == "cls"  # type: ignore[attr-defined]
    assert vtc.InTower().settle(facts(24, False, "received")).rule == "received"  # type: ignore[attr-defined]
    assert vtc.InTower().settle(facts(24, True, "received")).restore is True  # type: ignore[attr-defined]
    assert vtc.InTower(restore=True).settle(facts(24, False, "cls")).restore is True  # type: ignore[attr-defined]
    then = vtc.InTower(then=vtc.FasterVLM()).settle(facts(24, False, "received")).then  # type: ignore[attr-defined]
    assert then.saliency == "received"


def test_then_has_its_own_stages_and_counts_all_tokens() -> None:
    method = vtc.InTower(keep=0.5, after=3, then=vtc.ToDRE(keep=0.25, pivot="random", stage2=True))
    steps = steps_of(method, facts())
    assert [type(step.stage.at) for step in steps] == [Tower, Entry, Layer]
    image = Layout.plain(100)
    given, present = (100,), (50,)
    assert steps[0].counts([image], (100,), (100,)) == (50,)
    assert steps[1].counts([image], given, present) == (25,)


def test_counts_from_layouts() -> None:
    plain = Layout.plain(100)
    mosaic = Layout(19, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 15, (3, 4), newline=True)))
    assert vtc.InTower(keep=0.3).counts([plain]) == (30,)
    assert vtc.InTower(keep=0.3).counts([plain, mosaic]) is None  # what was padding is known behind the tower
    assert vtc.InTower(keep=0.3, restore=True).counts([plain, mosaic]) == (100, 19)
    assert vtc.InTower(keep=0.3, then=vtc.DivPrune(keep=0.2)).counts([plain, mosaic]) == (20, 4)


def test_the_rule_chooses() -> None:
    row = torch.tensor([0.1, 0.9, 0.3, 0.8])
    found = vtc.select(vtc.InTower(rule="cls", keep=2, after=1), torch.randn(4, 6), signals={"cls": row})
    assert found.index.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rule": "clss"}, ValueError, "rule='clss' is none of None, 'cls', 'received', 'diverse', nor a vtc.Method"),
        ({"rule": 3}, TypeError, "rule=3 is no vtc.Method"),
        ({"rule": vtc.FastV()}, ValueError, "does not choose before the language model"),
        ({"rule": vtc.VisionZip()}, ValueError, "merges, counts by content, or reads the structure"),
        ({"rule": vtc.HiPrune()}, ValueError, "merges, counts by content, or reads the structure"),
        ({"rule": vtc.Adaptive(vtc.DivPrune())}, ValueError, "merges, counts by content"),
        ({"then": "divprune"}, TypeError, "then='divprune' is no vtc.Method"),
        ({"then": vtc.FastV()}, ValueError, "does not choose before the language model"),
        ({"then": vtc.InTower()}, ValueError, "does not choose before the language model"),
        ({"keep": 1.0, "then": vtc.DivPrune()}, ValueError, "keep=1.0 leaves all patches in the tower"),
        ({"after": 1.5}, ValueError, "after=1.5"),
        ({"restore": "yes"}, TypeError, "restore='yes'"),
        ({"newlines": "keep"}, ValueError, "newlines='keep' must be 'candidates': a tower has none"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        vtc.InTower(**options)


@pytest.mark.parametrize("wrapper", [vtc.Allocate, vtc.GlobalCom2, vtc.Merge, vtc.Adaptive])
def test_wrapped_by_others_it_is_refused(wrapper: Any) -> None:
    with pytest.raises(ValueError, match=rf"vtc.InTower\(then=vtc.{wrapper.__name__}\(\)\)"):
        wrapper(selector=vtc.InTower())


@pytest.mark.parametrize("selector", [vtc.Chain(vtc.DivPrune(), vtc.FastV()), vtc.GlobalCom2()])
def test_selectors_that_share_out_by_themselves_are_refused(selector: vtc.Method) -> None:
    for allocator in (vtc.Allocate, vtc.GlobalCom2):
        with pytest.raises(ValueError, match="shares out budgets itself"):
            allocator(selector=selector)
