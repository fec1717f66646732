"""The contract of methods, by three published ones: a scorer at entry, one between layers, one that merges.

Each against a reference by hand that takes attention, keys and hidden states from an eager pass of the towers and
layers: alone, in a ragged batch, with ``compress_inputs``, and on bare tensors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from reference import Continuation, blind, continue_by_hand, decoder_call
from torch import Tensor
from tower_reference import eager_rows, pixels_of, scores_by_hand, sources
from zoo import GREEDY, NEW_TOKENS, SPECIAL_IDS, Batch, get_model, make_batch

import vtc
from vtc.dialect import modules
from vtc.methods import Method, ModelFacts, Reduction, Stage, register_method, registry
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.visionzip import VisionZip
from vtc.places import Entry, Layer, Projector, Tower
from vtc.signals import Cls, Received, Text, TowerFeatures, TowerKeys
from vtc.tokens import Layout, Segment, VisualTokens

TOLERANCE = 1e-4


@functools.cache
def batch_of(family: str) -> Batch:
    return make_batch(family, padding="left")


def run(model: Any, inputs: Any, method: Method) -> tuple[Tensor, Tensor, vtc.Patch]:
    """Logits [B, steps, V], tokens [B, steps], and the handle."""
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, method) as handle:
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), out.sequences[:, -NEW_TOKENS:], handle


def check(model: Any, batch: Batch, method: Method, expected: Sequence[Continuation]) -> None:
    """Every sample in the ragged batch, and alone, is what was computed by hand."""
    logits, tokens, _ = run(model, batch, method)
    for row, (sample, by_hand) in enumerate(zip(batch.samples, expected, strict=True)):
        alone, own, _ = run(model, sample, method)
        for ours, ids in ((logits[row], tokens[row]), (alone[0], own[0])):
            torch.testing.assert_close(ours, by_hand.logits, rtol=0, atol=TOLERANCE)
            assert torch.equal(ids, by_hand.tokens)


def by_sample(batch: Batch, images: Sequence[Any]) -> list[list[Any]]:
    """What belongs to images, one after the other, by sample."""
    rest = iter(images)
    return [[next(rest) for _ in own] for own in batch.images]


def continued(model: Any, batch: Batch, keep: Any, values: Any = None) -> list[Continuation]:
    model.set_attn_implementation("eager")
    return [
        continue_by_hand(model, sample, images, keep[i], "original", NEW_TOKENS, SPECIAL_IDS, values and values[i])
        for i, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True))
    ]


@torch.no_grad()
def tower_pass(model: Any, batch: Batch) -> Any:
    """The vision tower by itself, eagerly: attentions and hidden states of every layer."""
    pixels, tower = pixels_of(model, batch, "image"), model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        return tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(before)


def packed(model: Any, batch: Batch, patches: Tensor) -> list[Tensor]:
    """[pictures, patches, c] as the model packs its features: [n, c] for each image, newlines 0."""
    if not hasattr(model.model, "pack_image_features"):
        return list(patches)
    sizes = batch["image_sizes"]
    split = pictures_of(model, sizes)
    newline = patches.new_zeros(patches.shape[-1])
    return list(model.model.pack_image_features(list(patches.split(split)), sizes, image_newline=newline,
                                                vision_feature_select_strategy="default")[0])  # fmt: skip


def pictures_of(model: Any, sizes: Tensor) -> list[int]:
    source = modules.defining_module(model.model)
    config = model.config
    return [
        source.image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in sizes
    ]


@functools.cache
def reached(family: str) -> list[Tensor]:
    return sources(get_model(family), batch_of(family), "image")


# ------------------------------------------------------------------------------------------------------ at the entrance


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_fastervlm(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    rows = tower_pass(model, batch).attentions[-2].mean(1)[:, 0, 1:]
    assert not torch.allclose(rows, eager_rows(model, batch, "image"), atol=1e-3)  # another layer is something else
    keep = []
    for image in reached(family):
        scores = scores_by_hand(rows, image)
        keep.append(scores.topk(max(1, round(0.3 * len(scores)))).indices.sort().values)
    keep = by_sample(batch, keep)
    _, _, handle = run(model, batch, FasterVLM(keep=0.3))
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, FasterVLM(keep=0.3), continued(model, batch, keep))


# ------------------------------------------------------------------------------------------------------- between layers


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_fastv(family: str, layer: int) -> None:
    model, batch = get_model(family), batch_of(family)
    model.set_attn_implementation("eager")
    depth, expected = len(model.get_decoder().layers), []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        with torch.no_grad():
            row = model(**sample, output_attentions=True).attentions[layer - 1][0].mean(0)[-1]
        gone = torch.zeros(len(row), dtype=torch.bool)
        for columns in images:
            kept = row[columns].topk(max(1, round(0.5 * len(columns)))).indices
            gone[columns] = True
            gone[columns[kept]] = False
        hidden = [gone & (index >= layer) for index in range(depth)]
        with blind(model, hidden):
            out = model.generate(**sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(out.logits, 1)[0]
        expected.append(Continuation(out.sequences[0, -NEW_TOKENS:], logits, gone, logits))
    check(model, batch, FastV(keep=0.5, layer=layer), expected)


# -------------------------------------------------------------------------------------------------------------- merging


def zipped(features: Tensor, cls: Tensor, keys: Tensor, k: int, contextual: int) -> tuple[Tensor, Tensor]:
    """VisionZip on one image, as loops: kept places, ascending, and what stands there."""
    dominant = cls.topk(k - contextual).indices.tolist()
    rest = [i for i in range(len(cls)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    values = {i: features[i] for i in dominant}
    members: dict[int, list[Tensor]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            likeness = [float(torch.cosine_similarity(keys[i], keys[t], dim=0)) for t in targets]
            members[targets[likeness.index(max(likeness))]].append(features[i])
    for target, joined in members.items():
        values[target] = features[target] + (torch.stack(joined).mean(0) if joined else 0)
    places = sorted(values)
    return torch.tensor(places), torch.stack([values[i] for i in places])


@functools.cache
def visionzip_by_hand(family: str, k: int, contextual: int) -> tuple[list[Any], list[Any]]:
    """Kept places and embeddings of every image; newlines stay as they are."""
    model, batch = get_model(family), batch_of(family)
    output, tower = tower_pass(model, batch), model.model.vision_tower
    inner = getattr(tower, "vision_model", tower).encoder.layers[-2]
    with torch.no_grad():
        key = inner.self_attn.k_proj(inner.layer_norm1(output.hidden_states[-3]))
        key = key.unflatten(-1, (inner.self_attn.num_heads, -1)).mean(2)[:, 1:]
        rows = output.attentions[-2].mean(1)[:, 0, 1:, None]
        layer = model.config.vision_feature_layer
        features = [packed(model, batch, each) for each in (output.hidden_states[layer][:, 1:], rows, key)]
        keep, values = [], []
        for image, cls, keys in zip(*features, strict=True):
            patches = keys.abs().sum(-1).nonzero()[:, 0]
            places, now = zipped(image[patches], cls[patches, 0], keys[patches], k, contextual)
            newlines = torch.tensor([i for i in range(len(image)) if i not in patches.tolist()], dtype=torch.long)
            index = torch.cat([patches[places], newlines])
            projected = model.model.multi_modal_projector(now)
            line = torch.zeros(0, projected.shape[1])
            if len(newlines):
                line = model.model.image_newline.expand(len(newlines), -1)
            order = index.argsort()
            keep.append(index[order])
            values.append(torch.cat([projected, line])[order])
    return by_sample(batch, keep), by_sample(batch, values)


@pytest.mark.parametrize(("k", "contextual"), [(5, 2), (1, 3), (9, 0)])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_visionzip(family: str, k: int, contextual: int) -> None:
    model, batch = get_model(family), batch_of(family)
    method = VisionZip(keep=k, contextual=contextual)
    keep, values = visionzip_by_hand(family, k, min(contextual, k - 1))
    _, _, handle = run(model, batch, method)
    assert [[i.tolist() for i in own] for own in handle.last_keep] == [[i.tolist() for i in own] for own in keep]
    check(model, batch, method, continued(model, batch, keep, values))
    if contextual and k > 1:  # what merging adds is far above the tolerance
        plain = continued(model, batch, keep)
        merged = continued(model, batch, keep, values)
        assert (plain[0].logits - merged[0].logits).abs().max() > 10 * TOLERANCE


def test_visionzip_is_refused_where_patches_and_tokens_cannot_be_matched() -> None:
    with pytest.raises(ValueError, match=r"'visionzip' acts in front of the projector.*cannot give"):
        vtc.patch(get_model("qwen2_5_vl"), VisionZip(place="projector"))
    with vtc.patch(get_model("qwen2_5_vl"), VisionZip()) as p:
        assert p.method.place == "entry"


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_merged_values_with_every_cache(family: str, cache: dict[str, Any]) -> None:
    model, batch = get_model(family), batch_of(family)
    keep, values = visionzip_by_hand(family, 5, 2)
    expected = continued(model, batch, keep, values)
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, VisionZip(keep=5, contextual=2)):
        out = model.generate(**batch, **GREEDY, **cache, output_logits=True, return_dict_in_generate=True)
    for row, by_hand in zip(torch.stack(out.logits, 1), expected, strict=True):
        torch.testing.assert_close(row, by_hand.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_compress_inputs_hands_merged_features_over(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    if not modules.takes_encoded(model.model):
        pytest.skip("this release of transformers takes no features that were encoded ahead")
    keep, values = visionzip_by_hand(family, 5, 2)
    expected = continued(model, batch, keep, values)
    model.set_attn_implementation("sdpa")
    short = vtc.compress_inputs(model, dict(batch), VisionZip(keep=5, contextual=2))
    out = model.generate(**short, **GREEDY, output_logits=True, return_dict_in_generate=True)
    for row, by_hand in zip(torch.stack(out.logits, 1), expected, strict=True):
        torch.testing.assert_close(row, by_hand.logits, rtol=0, atol=TOLERANCE)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are forgotten behind it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def pairs(at: Any) -> type[Method]:
    """A method that keeps every other token and adds the one that left behind it, at any place."""

    @register_method
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pairs(Method):
        name: ClassVar[str] = "pairs"
        merges: ClassVar[bool] = True

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(at),)

        def counts(self, layouts: Any, stage: Any = None, given: Any = None) -> tuple[int, ...] | None:
            return None

        def reduce(self, stage: Stage, tokens: VisualTokens, budget: Any) -> Reduction:
            rank = tokens.mask.cumsum(1) - 1
            keeps = tokens.mask & (rank % 2 == 0)
            found = Reduction.of_mask(keeps, tuple((n + 1) // 2 for n in tokens.counts))
            x = tokens.features.masked_fill(~tokens.mask[..., None], 0)
            behind = torch.cat([x[:, 1:], x.new_zeros(len(x), 1, x.shape[2])], 1)
            rows = found.index[..., None].expand(-1, -1, x.shape[2])
            size = torch.full(found.index.shape, 2.0)
            return dataclasses.replace(found, features=(x + behind).gather(1, rows), size=size)

    return Pairs


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_merging_at_entry(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    keep, values = [], []
    model.set_attn_implementation("eager")
    for sample, images in zip(batch.samples, batch.images, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        keep.append([torch.arange(0, len(columns), 2) for columns in images])
        values.append(
            [torch.stack([embeds[columns[i : i + 2]].sum(0) for i in range(0, len(columns), 2)]) for columns in images]
        )
    check(model, batch, pairs(Entry())(keep=0.5), continued(model, batch, keep, values))


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_merging_between_layers(family: str) -> None:
    """Against hidden states that a hook of the test's own changes in an unpatched model, blind to what left."""
    model, batch = get_model(family), batch_of(family)
    model.set_attn_implementation("eager")
    depth, expected = len(model.get_decoder().layers), []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        gone = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
        for columns in images:
            gone[columns[1::2]] = True

        def merge(module: Any, args: Any, kwargs: Any, images: Any = images) -> Any:
            hidden = args[0].clone()
            for columns in images:
                even, odd = columns[::2], columns[1::2]
                hidden[:, even[: len(odd)]] += hidden[:, odd]
            return (hidden, *args[1:]), kwargs

        hidden = [gone & (index >= 1) for index in range(depth)]
        hook = model.get_decoder().layers[1].register_forward_pre_hook(merge, with_kwargs=True)
        try:
            with blind(model, hidden):
                out = model.generate(
                    **sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True
                )
        finally:
            hook.remove()
        logits = torch.stack(out.logits, 1)[0]
        expected.append(Continuation(out.sequences[0, -NEW_TOKENS:], logits, gone, logits))
    check(model, batch, pairs(Layer(1))(keep=0.5), expected)


@pytest.mark.usefixtures("shelf")
def test_newlines_and_parts_go_with_merging() -> None:
    """Spared newlines keep their values and cost no budget; within parts an allocator's selector merges by itself."""
    layout = Layout(
        10, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 6, (2, 2), True, (1, 1), (0, 0), (0, 0)))
    )
    x = torch.arange(10.0)[:, None] + torch.tensor([0.0, 100.0])
    own = pairs(Entry())
    found = vtc.select(own(keep=0.5, newlines="keep"), x, layout=layout)
    assert found.index.tolist() == [0, 2, 4, 6, 7, 9]
    assert found.features[:, 0].tolist() == [0 + 1, 2 + 3, 4 + 5, 6, 7 + 8, 9]  # 6 and 9 are newlines
    found = vtc.select(vtc.Allocate(keep=0.5, selector=own()), x, layout=layout)
    assert found.index.tolist() == [0, 2, 4, 6, 7, 9]
    assert found.features[:, 0].tolist() == [0 + 1, 2 + 3, 4 + 5, 6, 7 + 8, 9]


@pytest.mark.usefixtures("shelf")
def test_no_gradient_is_lost_in_silence() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    with vtc.patch(model, pairs(Entry())(keep=0.5)):
        with pytest.raises(NotImplementedError, match="no gradient flows"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
    with vtc.patch(model, pairs(Layer(1))(keep=0.5)), pytest.raises(NotImplementedError, match="no gradient flows"):
        model(**batch)


@pytest.mark.usefixtures("shelf")
def test_places_that_are_not_served_are_refused() -> None:
    for at, word in ((Tower(1), "vision tower"), (Projector(), "projector")):
        own = pairs(at)
        for family in ("llava_pixtral", "qwen2_vl") if isinstance(at, Tower) else ("qwen2_5_vl", "idefics3"):
            with pytest.raises(ValueError, match=word):
                vtc.patch(get_model(family), own(keep=0.5))


# ---------------------------------------------------------------------------------------------------- signals and facts


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("signal", [Received(layer=-2), TowerKeys(layer=0), TowerFeatures(layer=-2)], ids=str)
def test_tower_signals_are_those_of_an_eager_pass(family: str, signal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = get_model(family), batch_of(family)
    seen: list[VisualTokens] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(vtc.Scorer):
        name: ClassVar[str] = "look"

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(Entry(), needs=(signal,)),)

        def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
            seen.append(tokens)
            return torch.zeros(tokens.features.shape[:2])

    monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"look": Look})
    with torch.no_grad(), vtc.patch(model, Look(keep=0.5)):
        model(**batch)
    output, tower = tower_pass(model, batch), model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder
    layer = (layers.layers if hasattr(layers, "layers") else layers.layer)[signal.layer]
    if isinstance(signal, Received):
        patches = output.attentions[-2].mean(1).sum(1)[:, 1:, None]
    elif isinstance(signal, TowerFeatures):
        patches = output.hidden_states[-2][:, 1:]
    else:
        attention = getattr(layer, "self_attn", getattr(layer, "attention", None))
        norm = getattr(layer, "layer_norm1", getattr(layer, "layernorm_before", None))
        with torch.no_grad():
            keys = attention.k_proj(norm(output.hidden_states[0]))
        patches = keys.unflatten(-1, (attention.num_heads, -1)).mean(2)[:, 1:]
    (tokens,) = seen
    found = tokens.signals[signal.key]
    found = found if found.dim() == 3 else found[..., None]
    for ours, image in zip(found, reached(family), strict=True):
        theirs = torch.stack([scores_by_hand(patches[..., c], image) for c in range(patches.shape[-1])], -1)
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=2e-5)


def test_text_is_what_is_neither_visual_nor_padding() -> None:
    embeds = torch.arange(12.0).reshape(2, 6, 1)
    text = torch.tensor([[True, False, True, False, False, True], [False, False, False, True, True, False]])
    found = Text().read(embeds, text, [1, 0, 0])
    assert found["text"][..., 0][found["text_mask"]].tolist() == [9, 10, 0, 2, 5, 0, 2, 5]
    assert found["text_mask"].sum(1).tolist() == [2, 3, 3]


def test_a_layer_that_the_tower_lacks_is_refused() -> None:
    model = get_model("llava")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Deep(FasterVLM):
        name: ClassVar[str] = "deep"

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(Entry(), needs=(Cls(layer=-40),)),)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"deep": Deep})
        with pytest.raises(ValueError, match="'deep' needs 'cls'"):
            vtc.patch(model, Deep())


def test_a_chain_may_have_two_methods_that_watch_transitions() -> None:
    """Each has its own sums: the same as alone, where both see the same tokens."""
    model, batch = get_model("llava"), batch_of("llava")
    first = vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(layers=(1,), ratios=(0.5,)))
    both = vtc.Chain(first, vtc.TransPrune(layers=(2,), ratios=(0.5,), variant="paper"))
    _, _, handle = run(model, batch, both)
    left = [[[len(kept) for kept in own] for own in samples] for _, samples in handle.last_stages]
    assert [after for after, _ in handle.last_stages] == [0, 1, 2]
    assert left[1] == [[max(1, n // 2) for n in own] for own in left[0]]
    assert left[2] == [[max(1, n // 2) for n in own] for own in left[1]]  # its share is of what it was given
