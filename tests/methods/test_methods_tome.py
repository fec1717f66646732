"""ToMe against loops by hand: one step on drawn tensors, and whole towers block by block.

That each family's answers are right is the methods' matrix (`tome` in tests/methods/every.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from typing import Any

import pytest
import torch
from asking import reduce
from every import refusal
from merging_tower import by_blocks, entering, last_norm, projected
from nosync import NoSync
from torch import Tensor
from zoo import FAMILIES, GREEDY, get_model, make_batch

import vtc
import vtc.engine.patches
import vtc.methods.tome
from vtc import ToMe
from vtc.config import CompressionConfig
from vtc.dialect import modules
from vtc.engine.calibration import Calibrator
from vtc.engine.passage import Passage
from vtc.methods.base import ANY_MODEL
from vtc.methods.stages import steps_of
from vtc.tokens import Layout, VisualTokens


def step_by_hand(x: Tensor, keys: Tensor, size: list[float], r: int) -> tuple[list[int], Tensor, Tensor, list[float]]:
    """Who stays, ascending; what stands there: values, keys; and how many each is."""
    x, keys, n = x.double(), keys.double(), len(x)
    edges = []
    for a in range(0, n, 2):
        best, to = -math.inf, 0
        for b in range(1, n, 2):
            lengths = float(keys[a].norm() * keys[b].norm())
            like = float(keys[a] @ keys[b]) / lengths if lengths else 0.0
            if like > best + 1e-9:
                best, to = like, b
        edges.append((best, a, to))
    edges.sort(key=lambda edge: (-round(edge[0], 9), edge[1]))
    groups = {i: [i] for i in range(n)}
    for _, a, b in edges[:r]:
        groups[b] += groups.pop(a)
    stays = sorted(groups)
    total = [sum(size[i] for i in groups[s]) for s in stays]
    means = [
        torch.stack([sum(values[i] * size[i] for i in groups[s]) / t for s, t in zip(stays, total, strict=True)])
        for values in (x, keys)
    ]
    return stays, means[0], means[1], total


def steps_by_hand(x: Tensor, keys: Tensor, size: list[float], keep: int) -> tuple[list[int], Tensor, list[float]]:
    """As many steps as it takes."""
    places = list(range(len(x)))
    x, keys = x.double(), keys.double()
    while len(places) > keep:
        stays, x, keys, size = step_by_hand(x, keys, size, min(len(places) - keep, len(places) // 2))
        places = [places[i] for i in stays]
    return places, x, size


def drawn(n: int, seed: int, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, 4, generator=generator)


def tokens_of(x: Tensor, keys: Tensor, **more: Any) -> VisualTokens:
    return VisualTokens(x[None], (Layout.plain(len(x)),), (0,), {"keys": keys[None]}, **more)


# ----------------------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("n", [2, 3, 16, 25])
@pytest.mark.parametrize("keep", [1, 2, 9, 13, 15, 24])
def test_steps_are_those_by_hand(n: int, keep: int) -> None:
    """Half of the patches leave at most in one step; where that is not enough, more follow."""
    for seed in range(3):
        x, keys = drawn(n, seed)
        keep = min(keep, n)
        places, values, size = steps_by_hand(x, keys, [1.0] * n, keep)
        found = reduce(ToMe(), tokens_of(x, keys), (keep,))
        assert found.index[0].tolist() == places
        torch.testing.assert_close(found.features[0].double(), values, rtol=0, atol=1e-6)
        assert found.size[0].tolist() == size
        assert sum(size) == n


def test_what_was_merged_before_weighs_more_and_what_left_is_not_asked() -> None:
    x, keys = drawn(20, 1)
    size = torch.arange(1.0, 21.0)
    there = [i for i in range(20) if i not in (0, 3, 4, 17)]
    alive = torch.zeros(1, 20, dtype=torch.bool)
    alive[0, there] = True
    x[~alive[0]] = math.nan
    given = tokens_of(x, keys, size=size[None], alive=alive, alive_counts=(16,))
    found = reduce(ToMe(), given, (10,))
    stays, values, _, total = step_by_hand(x[there], keys[there], size[there].tolist(), 6)
    assert found.index[0, :10].tolist() == [there[i] for i in stays]
    torch.testing.assert_close(found.features[0, :10].double(), values, rtol=0, atol=1e-6)
    assert found.size[0, :10].tolist() == total
    plain = reduce(ToMe(), dataclasses.replace(given, size=None), (10,))
    assert (plain.features[0, :10] - found.features[0, :10]).abs().max() > 0.05


def test_ties_go_to_the_lowest_index() -> None:
    x, keys = drawn(8, 0)[0], torch.ones(8, 4)
    found = reduce(ToMe(), tokens_of(x, keys), (6,))  # 0 and 2 go to 1
    assert found.index[0].tolist() == [1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(found.features[0, 0], x[:3].mean(0))
    assert torch.equal(found.features[0, 1:], x[3:])
    keys[[0, 2]] = 0.0  # without a direction: like nobody, after all that are like somebody
    assert reduce(ToMe(), tokens_of(x, keys), (6,)).index[0].tolist() == [0, 1, 2, 3, 5, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_as_in_a_ragged_batch_in_parts_of_any_size(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens are equal, so that a bit more or less in a cosine would show."""
    lengths, budget = (30, 19, 1, 8), (9, 12, 1, 8)
    features, keys = torch.full((4, 30, 6), math.nan, dtype=dtype), torch.zeros(4, 30, 4)
    for g, n in enumerate(lengths):
        x, k = drawn(n, g)
        features[g, :n], keys[g, :n] = x.to(dtype), k[torch.arange(n) % 7]
    layouts = tuple(Layout.plain(n) for n in lengths)
    tokens = VisualTokens(features, layouts, (0,) * 4, {"keys": keys})
    with NoSync():
        together = reduce(ToMe(), tokens, budget)
    assert together.features.dtype == dtype
    monkeypatch.setattr(vtc.methods.tome, "ENTRIES", 1)
    parts = reduce(ToMe(), tokens, budget)
    for g, (n, k) in enumerate(zip(lengths, budget, strict=True)):
        one = VisualTokens(features[g : g + 1, :n], layouts[g : g + 1], (0,), {"keys": keys[g : g + 1, :n]})
        own = reduce(ToMe(), one, (k,))
        for found in (together, parts):
            assert torch.equal(found.index[g, :k], own.index[0])
            assert torch.equal(found.features[g, :k], own.features[0])
            assert torch.equal(found.size[g, :k], own.size[0])


@pytest.mark.parametrize("keep", [0.25, 0.9, 1, 7, 200])
@pytest.mark.parametrize("depth", [2, 3, 12, 23])
def test_equally_many_leave_in_front_of_every_block(keep: Any, depth: int) -> None:
    method = ToMe(keep=keep).settle(dataclasses.replace(ANY_MODEL, tower_depth=depth))
    steps = steps_of(method, ANY_MODEL)
    assert [step.stage.at.block for step in steps] == [*range(1, depth)]
    assert [step.stage.needs[0].layer for step in steps] == [*range(depth - 1)]
    counts = [256, *(method.counts([Layout.plain(256)], step.stage)[0] for step in steps)]
    gone = [a - b for a, b in itertools.pairwise(counts)]
    assert counts[-1] == vtc.budget.count(method.keep, 256) == method.counts([Layout.plain(256)])[0]
    assert max(gone) - min(gone) <= 1
    assert gone == sorted(gone, reverse=True)


def test_blocks_are_numbers_or_shares_of_the_depth() -> None:
    facts = dataclasses.replace(ANY_MODEL, tower_depth=23)
    assert ToMe(blocks=(0.5, 22)).settle(facts).blocks == (12, 22)
    assert ToMe(blocks=[0.0, 0.01, 0.99]).settle(facts).blocks == (1, 22)
    assert len(ToMe().settle(facts).blocks) == 22
    config = CompressionConfig.of(ToMe(blocks=(0.5, 22), proportional=False), "original")
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))).build() == config.build()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"blocks": 3}, TypeError, "blocks=3 must be a tuple"),
        ({"blocks": ()}, ValueError, r"blocks=\(\)"),
        ({"blocks": (0, 1)}, ValueError, "blocks=0: .*ints from 1"),
        ({"blocks": (2, 2)}, ValueError, r"blocks=\(2, 2\) must be .* rising"),
        ({"blocks": (1.5,)}, ValueError, r"blocks=1\.5"),
        ({"blocks": ("1",)}, TypeError, "blocks='1'"),
        ({"proportional": "no"}, TypeError, "proportional='no' is neither True nor False"),
        ({"keep": 0}, ValueError, "keep=0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ToMe(**options)


# ----------------------------------------------------------------------------------------------------------- in models


@functools.cache
def batch_of(family: str) -> Any:
    return make_batch(family)


def tower_by_hand(model: Any, inputs: Any, method: ToMe) -> tuple[list[list[int]], list[Tensor], list[list[float]]]:
    """Of every picture: places left, what the projector gets of them, how many patches each is."""
    model.set_attn_implementation("eager")
    found: tuple[list[Any], list[Any], list[Any]] = [], [], []
    states = entering(model, inputs)
    for state in states[:, None]:
        n, sizes = state.shape[1] - (1 if model.config.model_type == "llava" else 0), [[]]

        def merging(index: int, x: Tensor, keys: Tensor, size: list[float], n: int = n, sizes: Any = sizes) -> Any:
            each, more = divmod(n - vtc.budget.count(method.keep, n), len(method.blocks))
            left = len(x) - each - (index <= more)
            stays, values, sizes[0] = steps_by_hand(x, keys, size, left)
            return stays, values, sizes[0]

        places, rows = by_blocks(model, state, "keys", merging, method.proportional)
        for own, value in zip(found, (places, rows, sizes[0]), strict=True):
            own.append(value)
    return found


CASES = [("llava", -1, 9), ("llava", -2, 11), ("paligemma", None, 9), ("paligemma", None, 3)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("family", "layer", "keep"), CASES)
def test_towers_block_by_block(
    family: str, layer: Any, keep: int, proportional: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = get_model(family), batch_of(family)
    if layer is not None:
        monkeypatch.setattr(model.config, "vision_feature_layer", layer)
    before = model.config._attn_implementation
    method = ToMe(keep=keep, proportional=proportional).settle(vtc_facts(model))
    assert len(method.blocks) == (1 if layer == -2 else 2)
    places, rows, _ = tower_by_hand(model, batch, method)
    expected = torch.stack(rows)
    expected = expected if family == "llava" else last_norm(model, expected)
    model.set_attn_implementation(attention)
    with vtc.patch(model, method) as p:
        ours = projected(model, batch, places)
        assert [k.tolist() for kept in p.last_keep for k in kept] == places
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        for row, sample in enumerate(s for s, own in zip(batch.samples, batch.images, strict=True) if own):
            first = sum(len(own) for own in batch.images[:row])  # those without an image stand at the end
            of_sample = slice(first, first + len(batch.images[row]))
            alone = projected(model, sample, places[of_sample])
            torch.testing.assert_close(alone, expected[of_sample], rtol=0, atol=1e-5)
        with monkeypatch.context() as broken:
            broken.setattr(Passage, "weighed", lambda self, mask, dtype: mask)
            apart = (projected(model, batch, places) - expected).abs().max()
    assert apart > 1e-3 if proportional else apart < 1e-5  # the logarithms are far above the tolerance
    model.set_attn_implementation(before)


def vtc_facts(model: Any) -> Any:
    adapter, parts = vtc.models.resolve(model)
    return adapter.facts(parts)


def test_sizes_reach_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    entering_ = Calibrator.entering

    def heard(self: Any, *args: Any) -> Any:
        seen.append(entering_(self, *args))
        return seen[-1]

    monkeypatch.setattr(Calibrator, "entering", heard)
    model, batch = get_model("llava"), batch_of("llava")
    model.set_attn_implementation("eager")
    method = ToMe(keep=9).settle(vtc_facts(model))
    _, _, sizes = tower_by_hand(model, batch, method)
    with vtc.patch(model, method):
        plain = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with vtc.patch(model, method, calibration="size"):
        out = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    every = torch.tensor([size for own in sizes for size in own])
    torch.testing.assert_close(seen[0].log_size[seen[0].visual].exp(), every)
    assert not seen[0].log_size[~seen[0].visual].any()
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-3


def test_another_method_goes_on_inside_the_language_model() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    method = vtc.Chain(ToMe(keep=0.5), vtc.FastV(keep=0.5, layer=1))
    with vtc.patch(model, method) as p:
        model.generate(**batch, **GREEDY)
    assert [[len(k) for kepts in kept for k in kepts] for _, kept in p.last_stages] == [[8] * 3, [4] * 3]
    with pytest.raises(ValueError, match="tokens leave before it"):  # rows there would be made without the sizes
        vtc.patch(model, method, calibration="size")


def test_newlines_and_padding_of_mosaics_stand_for_themselves() -> None:
    model, batch = get_model("llava_next"), batch_of("llava_next")
    with vtc.patch(model, ToMe(keep=0.4), calibration="size") as p:
        model.generate(**batch, **GREEDY)
        for kepts, layouts in zip(p.last_keep, p.last_layouts, strict=True):
            for kept, layout in zip(kepts, layouts, strict=True):
                assert set(layout.newlines()) <= set(kept.tolist())


def test_the_tower_costs_less() -> None:
    found = vtc.estimate(get_model("llava"), image=(8, 8), method=ToMe(keep=8))
    assert found.vision_pruned.flops < found.vision.flops
    assert found.pruned.visual < found.full.visual


# ---------------------------------------------------------------------------------------------------- refused, and why


RESTORES = ("gemma3", "idefics3", "smolvlm", "llava_onevision", "internvl")


@pytest.mark.parametrize("family", [f for f in map(str, FAMILIES) if f in RESTORES])
def test_what_merged_cannot_be_brought_back(family: str) -> None:
    reason = refusal(get_model(family), ToMe(keep=0.5))
    assert reason is not None
    assert "what merged cannot be brought back" in reason
    assert "vtc.Merge" in reason


def test_videos_that_are_pooled_are_refused_when_they_come() -> None:
    model, batch = get_model("llava_next_video"), make_batch("llava_next_video")
    with vtc.patch(model, ToMe(keep=0.5)), pytest.raises(ValueError, match=r"one token of a video .*brought back"):
        model.generate(**batch, **GREEDY)


def test_attention_that_adds_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = get_model("llava"), batch_of("llava")
    config = vtc.models.resolve(model)[1].base.vision_tower.config
    before = modules.attention_of(config)
    try:
        modules.set_attention(config, "flash_attention_2")
        with pytest.raises(ValueError, match=r"'flash_attention_2' adds no mask.*'sdpa' or 'eager'; or proportional=F"):
            vtc.patch(model, ToMe())
        vtc.patch(model, ToMe(proportional=False)).unpatch()
        modules.set_attention(config, "sdpa")
        with vtc.patch(model, ToMe()):
            monkeypatch.setattr(vtc.engine.patches, "attention_of", lambda config: "flash_attention_2")
            with torch.no_grad(), pytest.raises(RuntimeError, match=r"was switched.*'flash_attention_2'"):
                model(**batch)
    finally:
        modules.set_attention(config, before)


def test_blocks_that_take_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL's, if nothing else were against it."""
    model = get_model("internvl")
    adapter, _ = vtc.models.resolve(model)
    monkeypatch.setattr(type(adapter), "reduces", lambda self, base, modality: "drop")
    with pytest.raises(ValueError, match=r"its InternVLVisionLayer takes no mask.*proportional=False"):
        vtc.patch(model, ToMe())
    vtc.patch(model, ToMe(proportional=False)).unpatch()


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"before block 7 .*Blocks 0 to 1 work"):
        vtc.patch(get_model("llava"), ToMe(blocks=(1, 7)))


def test_no_gradient_is_lost_in_silence() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    with vtc.patch(model, ToMe(keep=0.5)):
        with pytest.raises(NotImplementedError, match="tome merges tokens, and no gradient flows"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
