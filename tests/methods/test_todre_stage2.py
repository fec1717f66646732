"""ToDRE's second stage, end to end: when it fires, what is left to look at, and when there is nothing to judge by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import FAMILIES, get_model
from zoo.inputs import Fixed

import vtc
import vtc_tinyvlm as tiny
from vtc.profiling.correctness import faults
from vtc.profiling.measure import profile
from vtc.profiling.workload import Workload

FIRES = vtc.ToDRE(keep=0.25, stage2=True, tau=1.0)
"""A share of attention is below 1 wherever there is anything else to look at."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.load()[0]


def test_where_it_fires_profile_has_nothing_to_complain_of(model: Any) -> None:
    both = vtc.ToDRE(keep=0.25, stage2=True, tau=1.0), vtc.ToDRE(keep=1.0, stage2=True, tau=1.0)
    _, *measured = profile(model, Workload(text=6), both, batches=[2], repeats=1, warmup=0)
    assert [each.faults for each in measured] == [(), ()]
    assert all(each.speedup is not None for each in measured)
    assert [each.kept_tokens for each in measured] == [36 * 4 / 5, 144 * 4 / 5]  # none in the last of 5 layers


def test_where_it_fires_the_report_counts_and_last_keep_tells_what_was_there(model: Any) -> None:
    with vtc.patch(model, FIRES) as handle, torch.inference_mode():
        logits = model(**Workload(text=6).inputs(model, 2)).logits
        entered, left = (kept for _, kept in handle.last_stages)
        assert [[len(kept) for kept in images] for images in left] == [[0], [0]]
        assert [[kept.tolist() for kept in images] for images in handle.last_keep] == [
            [kept.tolist() for kept in images] for images in entered
        ]
        assert [len(images[0]) for images in handle.last_keep] == [36, 36]
        report = handle.report()
        assert report.tokens_per_layer == (36, 36, 36, 36, 0)
        assert "36 from layer 0, 0 from layer 4" in str(report)
        assert faults(handle, logits) == []


def test_later_stages_of_a_chain_find_nothing_and_hide_nothing(model: Any) -> None:
    """Each sample by itself: stage 2 fires where text looks away, and the next stage goes on in the others."""
    first = vtc.ToDRE(keep=0.5, stage2=True, layer=2, tau=1.0)
    chain = vtc.Chain(first, vtc.TransPrune(layers=(3,), ratios=(0.5,)))
    inputs = Workload(text=6).inputs(model, 2)
    with vtc.patch(model, chain) as handle, torch.inference_mode():
        model(**inputs)
        assert [len(images[0]) for images in handle.last_keep] == [72, 72]
        inputs = ending_in_its_image(inputs, 1)
        model(**inputs)
        assert [[len(images[0]) for images in kept] for _, kept in handle.last_stages] == [[72, 72], [0, 72], [0, 36]]
        assert [len(images[0]) for images in handle.last_keep] == [72, 36]


def test_the_warning_of_a_later_turn_counts_what_is_gone_from_the_last_layers(model: Any) -> None:
    with vtc.patch(model, vtc.ToDRE(keep=1.0, stage2=True, tau=1.0)) as handle, torch.inference_mode():
        model(**Workload(text=6).inputs(model, 1))
        with pytest.warns(UserWarning, match="144 of 144 visual tokens are gone"):
            handle.later_turn()


def ending_in_its_image(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The text behind the image of one sample moves before it."""
    inputs, visual = dict(inputs), inputs["input_ids"] == inputs["input_ids"].mode(1).values[:, None]
    ids, where = inputs["input_ids"].clone(), visual[row]
    ids[row] = torch.cat([ids[row][~where], ids[row][where]])
    return inputs | {"input_ids": ids}


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_without_text_behind_the_image_nothing_is_dropped(family: str, padding: str) -> None:
    """A caption of an image that ends the prompt: there is no question that could look away from it."""
    from zoo import make_batch

    net, batch = get_model(family), make_batch(family, (1, 1), padding=padding)
    alone = [cut_behind_the_image(sample, columns) for sample, columns in zip(batch.samples, batch.images, strict=True)]
    method = vtc.ToDRE(keep=1.0, pivot="random", stage2=True, layer=1, tau=1.0)
    for sample, whole in zip(alone, batch.samples, strict=True):
        with torch.inference_mode():
            expected = net(**sample).logits
            with vtc.patch(net, method) as handle:
                logits = net(**sample).logits
                entered, left = ([kept.tolist() for kept in samples[0]] for _, samples in handle.last_stages)
                assert left == entered, "it judged by the attention of no row at all"
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
                net(**whole)
                assert [len(kept) for kept in handle.last_stages[1][1][0]] == [0] * len(left)  # with text it fires


def cut_behind_the_image(sample: dict[str, Any], columns: list[torch.Tensor]) -> dict[str, Any]:
    end = int(columns[-1][-1]) + 1
    width = sample["input_ids"].shape[1]
    return {
        name: value[:, :end] if value.dim() == 2 and value.shape[1] == width else value
        for name, value in sample.items()
    }


def test_a_neighbour_without_a_question_stays_whole() -> None:
    """In a batch, padded: one sample has text behind its image, the other ends in it."""
    net, camera = get_model("llava"), FAMILIES["llava"].camera
    assert isinstance(camera, Fixed)
    from zoo import BOS, IMAGE, PAD, make_batch

    given = make_batch("llava", (1, 1))
    image = [IMAGE] * int((given.samples[0]["input_ids"] == IMAGE).sum())
    rows = [[BOS, 20, 21, *image, 22, 23], [PAD, PAD, PAD, BOS, 24, *image]]
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": given["pixel_values"]}
    with vtc.patch(net, vtc.ToDRE(keep=1.0, pivot="random", stage2=True, layer=1, tau=1.0)) as handle:
        net(**inputs)
        assert [len(images[0]) for images in handle.last_stages[1][1]] == [0, len(image)]
