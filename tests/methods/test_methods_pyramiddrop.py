"""PyramidDrop: its schedule, bare tensors, and end to end against an unpatched model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import inside
from nosync import NoSync
from reference import Continuation
from test_contract import batch_of, check
from torch import Tensor
from unpatched import answered, seen
from zoo import get_model, make_batch

import vtc
from vtc.methods.base import ModelFacts
from vtc.methods.fastv import FastV
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.stages import steps_of
from vtc.places import Layer
from vtc.signals import Rows
from vtc.tokens import Layout, VisualTokens


def facts(depth: int) -> ModelFacts:
    return ModelFacts(model_type="toy", width=8, depth=depth)


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [8, 16, 24]), (28, [7, 14, 21]), (4, [1, 2, 3]), (40, [10, 20, 30])]
)
def test_it_asks_one_row_of_the_next_layer(depth: int, layers: list[int]) -> None:
    stages = PyramidDrop().stages(facts(depth))
    assert [stage.at for stage in stages] == [Layer(after) for after in layers]
    assert [stage.needs for stage in stages] == [(Rows(after, of="last"),) for after in layers]


def test_the_published_schedule_and_another_keep() -> None:
    assert PyramidDrop().keep == 0.125
    stages = [step.stage for step in steps_of(PyramidDrop(), facts(32))]
    assert [PyramidDrop().quota(577, stage) for stage in stages] == [288, 144, 72]  # cut, not rounded
    assert [PyramidDrop(keep=0.3).quota(1000, stage) for stage in stages] == [600, 400, 300]
    assert [PyramidDrop(keep=64).quota(576, stage) for stage in stages][-1] == 64
    assert sum([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8) / 32 / 576 == pytest.approx(0.469, abs=1e-3)


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pyramiddrop has 3 stages.*3 layers.*vtc\.PyramidDrop\(layers=\(1,\)"):
        steps_of(PyramidDrop(), facts(3))
    with pytest.raises(ValueError, match=r"layers=\(8, 16, 24\).*1 to 23"):
        steps_of(PyramidDrop(layers=(8, 16, 24)), facts(24))
    with pytest.raises(ValueError, match="grow"):
        PyramidDrop(ratios=(0.25, 0.5, 0.1))
    with pytest.raises(ValueError, match="3 published stages"):
        PyramidDrop(ratios=(0.5, 0.25))
    with pytest.raises(ValueError, match="one entry"):
        PyramidDrop(layers=(1, 2))
    steps_of(PyramidDrop(layers=(1,), ratios=(0.25,)), facts(3))


def test_on_bare_tensors_ties_go_to_the_first() -> None:
    row = torch.tensor([0.1, 0.3, 0.3, 0.0, 0.3, torch.nan])
    for k, kept in ((2, [1, 2]), (4, [0, 1, 2, 4])):
        found = vtc.select("pyramiddrop", torch.zeros(6, 4), keep=k, stage=1, signals={"last": row})
        assert found.index.tolist() == kept
        assert found.order.tolist()[:2] == [1, 2]


def test_a_batch_keeps_what_each_image_keeps_alone() -> None:
    lengths, method = [30, 7, 1], PyramidDrop()
    rows = torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    given = tuple(lengths)

    def tokens(g: slice) -> VisualTokens:
        own = lengths[g]
        n = max(own)
        layouts = tuple(Layout.plain(length) for length in own)
        return VisualTokens(torch.full((len(own), n, 4), torch.nan), layouts, (0,) * len(own), {"last": rows[g, :n]})

    for number in range(3):
        mask, counts = inside(method, number, dataclasses.replace(tokens(slice(3)), entered=given))
        for g, n in enumerate(lengths):
            alone, (count,) = inside(method, number, dataclasses.replace(tokens(slice(g, g + 1)), entered=(n,)))
            assert torch.equal(mask[g, :n], alone[0])
            assert count == counts[g] == max(1, int(n * (0.5, 0.25, 0.125)[number]))
    with NoSync():
        inside(method, 0, tokens(slice(3)))


def left_by_hand(model: object, sample: dict[str, Tensor], images: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Stages of ``layers=(1, 2)``: each looks at what the next layer does when blind to what is gone already."""
    stages: list[tuple[int, Tensor]] = []
    gone = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
    for after, ratio in ((1, 0.6), (2, 0.3)):
        row = seen(model, sample, stages).attention[after].mean(0)[-1]
        gone = gone.clone()
        for columns in images:
            left = columns[~gone[columns]]
            stay = left[row[left].topk(max(1, int(ratio * len(columns)))).indices]
            gone[columns] = True
            gone[stay] = False
        stages.append((after, gone))
    return stages


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_end_to_end(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    expected: list[Continuation] = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        expected.append(answered(model, sample, left_by_hand(model, sample, images)))
    check(model, batch, PyramidDrop(layers=(1, 2), ratios=(0.6, 0.3)), expected)


ONE = {"layers": (1,), "ratios": (0.4,)}
ENDS = [PyramidDrop(**ONE), SparseVLM(**ONE), FastV(keep=0.4, layer=1)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", ENDS, ids=lambda method: method.name)
def test_a_prompt_that_ends_in_its_image_is_judged_by_its_last_token(method: vtc.Method, padding: str) -> None:
    """Whatever its neighbours are, padding is never asked."""
    model, batch = get_model("llava"), make_batch("llava", (1, 1), padding=padding)
    width = batch["input_ids"].shape[1]
    row = min(range(2), key=lambda i: batch.samples[i]["input_ids"].shape[1])
    sample, columns = batch.samples[row], batch.images[row][-1]
    end = int(columns[-1]) + 1
    own = sample["input_ids"][0, :end]
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    place = slice(0, end) if padding == "right" else slice(width - end, width)
    ids[row], mask[row] = ids.min(), 0
    ids[row, place], mask[row, place] = own, 1
    alone = {"input_ids": own[None], "attention_mask": torch.ones_like(own[None])}
    with torch.no_grad(), vtc.patch(model, method) as handle:
        model(**alone, pixel_values=sample["pixel_values"])
        expected = handle.last_keep[0][0].tolist()
        model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"])
        assert handle.last_keep[row][0].tolist() == expected
