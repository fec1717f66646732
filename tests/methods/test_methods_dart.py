"""DART against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

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
from vtc.methods.dart import DART
from vtc.methods.stages import steps_of
from vtc.places import Layer
from vtc.tokens import Layout, VisualTokens

FACTS = ModelFacts(model_type="toy", width=8, depth=32)


def by_hand(states: Tensor, keys: Tensor, visual: list[int], text: list[int], k: int, released: bool) -> list[int]:
    """Kept columns of one prompt, all of whose states and keys are given: one pivot, one token at a time."""
    norms = keys.double().abs().sum(1).tolist()

    def largest(columns: list[int], many: int) -> list[int]:
        return sorted(columns, key=lambda c: (-norms[c], c))[:many]

    own, words = largest(visual, min(4, k)), largest(text, 4)
    order = list(set(own + words)) if released else own + words
    rest, kept, left = k - len(own), list(own), [c for c in visual if c not in own]
    for at, pivot in enumerate(order):
        like = torch.cosine_similarity(states[left].double(), states[pivot].double()[None], dim=1, eps=1e-12)
        like = [round(float(v), 7) for v in like.nan_to_num()]
        many = rest // len(order) + (at < rest % len(order))
        taken = [left[i] for i in sorted(range(len(left)), key=lambda i: (like[i], i))[:many]]
        kept += taken
        left = [c for c in left if c not in taken]
    return sorted(kept)


def prompt(seed: int, start: int, n: int, text: int, kind: str = "gauss") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(start + n + text, 8, generator=generator)
    keys = torch.randn(start + n + text, 12, generator=generator)
    if kind == "doubles":
        states[start + n // 2 : start + n] = states[start : start + n - n // 2].clone()
        keys[start + 1 : start + n : 2] = keys[start : start + n - 1 : 2].clone()
    if kind == "zeros":
        states[start : start + n : 3] = 0
        keys[start] = 0
    return states, keys


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("kind", ["gauss", "doubles", "zeros"])
@pytest.mark.parametrize(("start", "n", "text", "k"), [(5, 40, 9, 17), (35, 64, 2, 20), (0, 30, 0, 11), (3, 9, 6, 3)])
def test_on_bare_tensors(start: int, n: int, text: int, k: int, kind: str, released: bool) -> None:
    states, keys = prompt(1, start, n, text, kind)
    visual = torch.zeros(len(states), dtype=torch.bool)
    visual[start : start + n] = True
    given = {"layer_keys": keys, "visual": visual}
    found = vtc.select(
        "dart", states[visual], keep=k, signals=given, text=states[~visual], released=released
    ).index.tolist()
    columns = list(range(start + n, start + n + text))
    expected = by_hand(states, keys, list(range(start, start + n)), columns, k, released)
    assert [start + i for i in found] == expected


def test_a_batch_keeps_what_each_image_keeps_alone() -> None:
    """Ragged in image and text, padded with what is no number."""
    shapes = [(5, 40, 9), (2, 12, 3), (0, 3, 0), (7, 25, 1)]
    n, t = max(s[1] for s in shapes), max(s[2] for s in shapes)
    features, words = torch.full((4, n, 8), torch.nan), torch.full((4, t, 8), torch.nan)
    keys, text_keys = torch.zeros(4, n, 12), torch.full((4, t, 12), torch.nan)
    mask = torch.zeros(4, t, dtype=torch.bool)
    alone = []
    for g, (start, count, text) in enumerate(shapes):
        states, own = prompt(g, start, count, text)
        features[g, :count], keys[g, :count] = states[start : start + count], own[start : start + count]
        words[g, t - text :], text_keys[g, t - text :] = states[start + count :], own[start + count :]
        mask[g, t - text :] = True
        visual = list(range(start, start + count)), list(range(start + count, start + count + text))
        alone.append([c - start for c in by_hand(states, own, *visual, max(1, round(count * 0.4)), False)])
    signals = {"layer_keys": keys, "text_layer_keys": text_keys, "text": words, "text_mask": mask}
    layouts = tuple(Layout.plain(s[1]) for s in shapes)
    (step,) = steps_of(DART(keep=0.4), FACTS)
    tokens = VisualTokens(features, layouts, (0,) * 4, signals, step.axes)
    kept = step.reduce(tokens)
    assert [row.nonzero()[:, 0].tolist() for row in kept.mask] == alone
    with NoSync():
        step.method.reduce(step.stage, tokens, kept.counts)


def test_counts_are_exact_or_as_released() -> None:
    (step,) = steps_of(DART(keep=0.222), FACTS)
    (code,) = steps_of(DART(keep=0.222, released=True), FACTS)
    layouts = [Layout.plain(n) for n in (576, 100, 3)]
    assert step.counts(layouts, (576, 100, 3), (576, 100, 3)) == (128, 22, 1)
    assert code.counts(layouts, (576, 100, 3), (576, 100, 3)) == (4 + 8 * 15, 4 + 8 * 2, 3)
    assert DART(keep=128, released=True).quota(576, code.stage) == 132
    assert DART(keep=1.0, released=True).quota(15, code.stage) == 15
    assert [stage.at for stage in DART().stages(FACTS)] == [Layer(2)]
    assert DART().query_aware


def test_bad_options_and_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="layer=0"):
        DART(layer=0)
    with pytest.raises(TypeError, match="released='no'"):
        DART(released="no")
    with pytest.raises(ValueError, match=r"after layer 2.*\[1, 1\]"):
        steps_of(DART(), ModelFacts(model_type="toy", width=8, depth=2))
    states, keys = prompt(1, 2, 8, 3)
    visual = torch.arange(13) < 9
    with pytest.raises(ValueError, match="True at the 8 features"):
        vtc.select("dart", states[2:10], signals={"layer_keys": keys, "visual": visual}, text=states[9:])
    visual = (torch.arange(13) >= 2) & (torch.arange(13) < 10)
    with pytest.raises(ValueError, match="text has 3 rows; visual is False at 5"):
        vtc.select("dart", states[2:10], signals={"layer_keys": keys, "visual": visual}, text=states[10:])
    with pytest.raises(ValueError, match="dart needs the signals text_layer_keys, text"):
        vtc.select("dart", states[2:10], signals={"layer_keys": keys[2:10]})


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(("family", "layer"), [("llava", 2), ("llava_next", 1), ("qwen2_5_vl", 2)])
def test_end_to_end(family: str, layer: int, released: bool) -> None:
    """Keys and states from an eager pass of the unpatched model; then it is made blind to what left."""
    model, batch = get_model(family), batch_of(family)
    method = DART(keep=0.6, layer=layer, released=released)
    expected: list[Continuation] = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        passed = seen(model, sample)
        states, keys = passed.hidden[layer], passed.keys[layer - 1]
        gone = torch.zeros(len(states), dtype=torch.bool)
        for columns in images:
            behind = list(range(int(images[-1][-1]) + 1, len(states)))
            k = method.quota(len(columns), method.stages(FACTS)[0])
            gone[columns] = True
            gone[by_hand(states, keys, columns.tolist(), behind, k, released)] = False
        expected.append(answered(model, sample, [(layer, gone)]))
    check(model, batch, method, expected)


def test_an_image_that_ends_the_prompt_has_pivots_of_its_own() -> None:
    model = get_model("llava")
    batch = batch_of("llava")
    row = next(i for i, images in enumerate(batch.images) if images)
    given: Any = batch.samples[row]
    end = int(batch.images[row][-1][-1]) + 1
    cut = {k: v[:, :end] if v.shape[1:] == given["input_ids"].shape[1:] else v for k, v in given.items()}
    with vtc.patch(model, DART(keep=0.5, layer=1)) as handle, torch.no_grad():
        model(**cut)
        assert all(len(kept) == round(0.5 * 16) for kept in handle.last_keep[0])
