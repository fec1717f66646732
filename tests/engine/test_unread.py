"""A block of the tower that nobody reads runs on one row, and no bit of an answer changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from release import OLD
from torch import Tensor
from zoo import GREEDY, get_model, make_batch

import vtc
from vtc.engine.unread import Unread

READ_BEFORE = ("llava", "vipllava", "llava_next", "llava_next_video", "video_llava")
READ_TO_THE_END = ("llava_onevision", "internvl", "gemma3", "paligemma", "idefics3")


@contextmanager
def rows(model: Any) -> Iterator[list[int]]:
    """How many rows each block of the image tower returns, call by call."""
    adapter, parts = vtc.models.resolve(model)
    found: list[int] = []

    def count(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).shape[1])

    hooks = [block.register_forward_hook(count) for block in adapter.tower(parts.base, "image").layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, batch: Any, **more: Any) -> Tensor:
    return torch.stack(
        model.generate(**batch, **GREEDY, **more, output_logits=True, return_dict_in_generate=True).logits
    )


@pytest.mark.parametrize("family", [*READ_BEFORE, *READ_TO_THE_END])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_no_bit_changes(family: str, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = get_model(family), make_batch(family)
    with vtc.patch(model, "divprune", keep=keep), rows(model) as ran:
        found = logits(model, batch)
    assert {n == 1 for n in ran[2::3]} == {family in READ_BEFORE}
    monkeypatch.setattr(Unread, "_nobody_looks", lambda self: False)
    with vtc.patch(model, "divprune", keep=keep), rows(model) as ran:
        assert torch.equal(found, logits(model, batch))
    assert 1 not in ran


def test_whole_where_a_signal_is_recorded_there() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    with vtc.patch(model, vtc.FasterVLM(keep=0.5, saliency="received")), rows(model) as ran:
        model.generate(**batch, **GREEDY)
    assert set(ran) == {17}


def test_whole_where_another_state_is_read_in_this_call() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    expected = model.model.get_image_features(batch["pixel_values"], vision_feature_layer=-1).pooler_output
    with vtc.patch(model, "grid", keep=1.0), rows(model) as ran:
        found = model.model.get_image_features(batch["pixel_values"], vision_feature_layer=-1).pooler_output
    assert set(ran) == {17}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(OLD, reason="before 5.23, no state of the tower is returned")
def test_whole_where_states_are_asked_for() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    expected = model.model.get_image_features(batch["pixel_values"], output_hidden_states=True)
    with vtc.patch(model, "grid", keep=1.0):
        found = model.model.get_image_features(batch["pixel_values"], output_hidden_states=True)
        short = model.model.get_image_features(batch["pixel_values"])
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert short.last_hidden_state is None  # one row must not be taken for all


def test_control_a_state_that_is_read_all_the_same_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If what is read were told wrong, nobody would get an answer."""
    monkeypatch.setattr(Unread, "_nobody_looks", lambda self: True)
    model, batch = get_model("llava"), make_batch("llava")
    with vtc.patch(model, "grid", keep=1.0), pytest.raises(TypeError):
        model.model.get_image_features(batch["pixel_values"], vision_feature_layer=-1)
