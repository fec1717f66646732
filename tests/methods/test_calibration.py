"""Calibrated attention: a patched model against an unpatched eager one, whose masks of floats a test made by hand.

The reference runs the kept and merged embeddings without a cache, and adds to the logits of every layer what loops over
positions, frequencies and sizes come to.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from reference import Continuation, continue_by_hand, decoder_call
from release import CACHE
from test_contract import TOLERANCE, batch_of, continued, visionzip_by_hand
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from zoo import FAMILIES, GREEDY, NEW_TOKENS, SPECIAL_IDS, Batch, get_model

import vtc
from vtc.dialect import modules
from vtc.dialect.caches import new_cache
from vtc.methods import Method, ModelFacts, Reduction, Stage, register_method, registry
from vtc.methods.visionzip import VisionZip
from vtc.places import Entry, Layer
from vtc.tokens import VisualTokens

WHAT = ["size", "size+distance", "size+visual-distance"]
CACHES: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
AXES = {"qwen2_5_vl": [0] * 2 + [1] * 3 + [2] * 3, "qwen3_vl": [0, 1, 2, 0, 1, 2, 0, 0]}
"""Which axis turns each frequency: sections of 2, 3, 3 one after the other, and of 4, 2, 2 in turns."""


def far(model: Any, family: str, positions: Tensor, kind: str) -> Tensor:
    """log(2 - D) [M, M] of positions [M] or [3, M], frequency by frequency."""
    config = model.get_decoder().config
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    half = model.get_decoder().layers[0].self_attn.head_dim // 2
    at = positions.reshape(-1, positions.shape[-1]).double()
    mean = torch.zeros(at.shape[1], at.shape[1], dtype=torch.double)
    for j in range(half):
        own = at[AXES[family][j]] if family in AXES else at[0]
        mean += torch.cos((own[:, None] - own) * rope["rope_theta"] ** (-j / half)) / half
    return (2 - mean).log().float()


def by_hand(
    family: str,
    keep: Sequence[Any],
    values: Sequence[Any] | None,
    sizes: Sequence[Any] | None,
    what: str,
    positions: str = "original",
) -> list[Continuation]:
    """Every sample of the family's batch: kept tokens, what stands there, and how many tokens each stands for."""
    model, batch = get_model(family), batch_of(family)
    model.set_attn_implementation("eager")
    found = []
    for i, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        every = torch.zeros(10_000)
        visual = every.clone().bool()
        for g, columns in enumerate(images):
            visual[columns] = True
            if sizes is not None:
                every[columns[keep[i][g]]] = torch.tensor(sizes[i][g]).float().log()

        def bias(at: Tensor, columns: Tensor, kind: str, every: Tensor = every, seen: Tensor = visual) -> Tensor:
            added = every[columns].expand(len(columns), -1)
            if what != "size":
                added = added + far(model, family, at, kind) * (1 if what == "size+distance" else seen[columns])
            return added

        own = None if values is None else values[i]
        added = bias if images else None  # a sample that loses nothing attends as ever
        found.append(continue_by_hand(model, sample, images, keep[i], positions, NEW_TOKENS, SPECIAL_IDS, own, added))
    return found


def run(model: Any, inputs: Any, method: Method, what: str | None, attention: str = "sdpa", **options: Any) -> Any:
    """Logits [B, steps, V] and tokens [B, steps]."""
    model.set_attn_implementation(attention)
    positions = options.pop("positions", None)
    try:
        with vtc.patch(model, method, positions=positions, calibration=what):
            out = model.generate(**inputs, **GREEDY, **options, output_logits=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation("sdpa")
    return torch.stack(out.logits, 1), out.sequences[:, -NEW_TOKENS:]


def agree(found: tuple[Tensor, Tensor], expected: Sequence[Continuation]) -> None:
    for logits, tokens, one in zip(*found, expected, strict=True):
        torch.testing.assert_close(logits, one.logits, rtol=0, atol=TOLERANCE)
        assert torch.equal(tokens, one.tokens)


def apart(one: Sequence[Continuation], other: Sequence[Continuation]) -> float:
    return max(float((a.logits[0] - b.logits[0]).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are forgotten behind it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def thirds(at: Any) -> type[Method]:
    """A method that keeps every third token; each becomes the mean of itself and those up to the next."""

    @register_method
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Thirds(Method):
        name: ClassVar[str] = "thirds"
        merges: ClassVar[bool] = True

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(at),)

        def counts(self, layouts: Any, stage: Any = None, given: Any = None) -> tuple[int, ...] | None:
            return None

        def reduce(self, stage: Stage, tokens: VisualTokens, budget: Any) -> Reduction:
            n = tokens.features.shape[1]
            rank = (tokens.mask.cumsum(1) - 1).masked_fill(~tokens.mask, -1)
            found = Reduction.of_mask((rank % 3 == 0) & tokens.mask, tuple(-(-k // 3) for k in tokens.counts))
            group = (rank // 3).masked_fill(~tokens.mask, n)
            member = torch.nn.functional.one_hot(group, n + 1)[..., :n].mT.float()
            size = member.sum(2).clamp(min=1)
            values = member @ tokens.features.masked_fill(~tokens.mask[..., None], 0) / size[..., None]
            k = found.index.shape[1]
            return dataclasses.replace(found, features=values[:, :k], size=size[:, :k])

    return Thirds


def thirds_by_hand(family: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Kept tokens, values and sizes of every image."""
    model, batch = get_model(family), batch_of(family)
    model.set_attn_implementation("eager")
    keep, values, sizes = [], [], []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        groups = [[columns[i : i + 3] for i in range(0, len(columns), 3)] for columns in images]
        keep.append([torch.arange(0, len(columns), 3) for columns in images])
        values.append([torch.stack([embeds[group].mean(0) for group in own]) for own in groups])
        sizes.append([[len(group) for group in own] for own in groups])
    return keep, values, sizes


# ---------------------------------------------------------------------------------------------------- before the model


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("family", "what"),
    [
        *(("llava", what) for what in WHAT),
        *(("qwen2_5_vl", what) for what in WHAT),
        *(
            (family, "size+distance")
            for family in ("llava_next", "qwen3_vl", "internvl", "gemma3_window8", "paligemma")
        ),
        ("gemma3", "size+visual-distance"),
    ],
)
def test_merging_at_entry(family: str, what: str) -> None:
    """In a ragged batch padded on the left, and alone; sdpa and eager."""
    model, batch, method = get_model(family), batch_of(family), thirds(Entry())()
    keep, values, sizes = thirds_by_hand(family)
    expected = by_hand(family, keep, values, sizes, what)
    agree(run(model, batch, method, what), expected)
    agree(run(model, batch, method, what, "eager"), expected)
    agree(run(model, batch.samples[1], method, what), expected[1:2])
    assert apart(expected, continued(model, batch, keep, values)) > 20 * TOLERANCE  # the bias is far above it


@pytest.mark.parametrize(
    ("family", "cache", "what"),
    [*(("llava", cache, "size+distance") for cache in CACHES), ("llava_next", {}, "size"), ("llava", {}, "size")],
    ids=str,
)
def test_visionzip(family: str, cache: dict[str, Any], what: str) -> None:
    """What stands for more than itself is told by the method's own sizes; with every kind of cache."""
    model, batch = get_model(family), batch_of(family)
    keep, values = visionzip_by_hand(family, 5, 2)
    sizes = [own[:] for own in visionzip_sizes(family)]
    expected = by_hand(family, keep, values, sizes, what)
    agree(run(model, batch, VisionZip(keep=5, contextual=2), what, **cache), expected)
    assert apart(expected, continued(model, batch, keep, values)) > 20 * TOLERANCE


def visionzip_sizes(family: str) -> list[list[list[float]]]:
    """As the method returned them, which tests/methods/test_contract.py holds against loops; newlines are one each."""
    model, seen = get_model(family), []

    class Look(VisionZip):
        def reduce(self, stage: Stage, tokens: VisualTokens, budget: Any) -> Reduction:
            found = super().reduce(stage, tokens, budget)
            assert found.size is not None
            for places, size, k in zip(found.index, found.size, found.counts or budget, strict=True):
                seen.append(dict(zip(places[:k].tolist(), size[:k].tolist(), strict=True)))
            return found

    own = Look(keep=5, contextual=2)
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"visionzip": Look})
        with vtc.patch(model, own) as handle:
            model(**batch_of(family))
    keep, rest = handle.last_keep, iter(seen)
    assert keep is not None
    sizes = []
    for images, layouts in zip(keep, handle.last_layouts or [], strict=True):
        own_sizes = []
        for kept, layout in zip(images, layouts, strict=True):
            bare = [i for i in range(layout.length) if i not in set(layout.newlines())]
            found = {bare[place]: size for place, size in next(rest).items()}
            assert max(found.values()) > 1
            own_sizes.append([found.get(i, 1.0) for i in kept.tolist()])
        sizes.append(own_sizes)
    return sizes


@pytest.mark.parametrize("what", ["size+distance", "size+visual-distance"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.filterwarnings("ignore:.*positions='compact':UserWarning")
def test_distance_without_merging(what: str, positions: str) -> None:
    model, batch = get_model("llava"), batch_of("llava")
    keep = [[torch.arange(0, len(columns), 2) for columns in images] for images in batch.images]
    expected = by_hand("llava", keep, None, None, what, positions)
    assert apart(expected, by_hand("llava", keep, None, None, "size", positions)) > 20 * TOLERANCE
    found = run(model, batch, EveryOther(), what, positions=positions)
    agree(found, expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOther(Method):
    """Every other token of each image stays."""

    at: int | None = None
    name: ClassVar[str] = "every_other_of_calibration"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(Entry() if self.at is None else Layer(self.at)),)

    def quota(self, n: int, stage: Stage) -> int:
        return (n + 1) // 2

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: Any) -> Reduction:
        rank = (tokens.mask.cumsum(1) - 1).masked_fill(~tokens.mask, 1)
        return Reduction.of_mask(rank % 2 == 0, budget)


register_method(EveryOther)


# ---------------------------------------------------------------------------------------------------- inside the model


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("family", "cache", "what"),
    [
        *(("llava", cache, "size+distance") for cache in CACHES),
        ("llava", {}, "size"),
        ("qwen2_5_vl", {}, "size+distance"),
        ("gemma3", {"cache_implementation": "static"}, "size+distance"),
    ],
    ids=str,
)
def test_merging_between_layers(family: str, cache: dict[str, Any], what: str) -> None:
    """Layers before the stage attend as ever; those behind get the bias of what each place stands for there.

    Against an unpatched eager model without a cache, whose layers a hook of the test's own lets merge, blinds to what
    left, and gives the bias.
    """
    model, batch = get_model(family), batch_of(family)
    expected = [inside_by_hand(model, family, batch, i, what) for i in range(len(batch.samples))]
    agree(run(model, batch, thirds(Layer(1))(), what, **cache), expected)
    without = [inside_by_hand(model, family, batch, i, None) for i in range(len(batch.samples))]
    assert apart(expected, without) > 20 * TOLERANCE


def inside_by_hand(model: Any, family: str, batch: Batch, i: int, what: str | None) -> Continuation:
    sample, images, layers = batch.samples[i], batch.images[i], model.get_decoder().layers
    model.set_attn_implementation("eager")
    size, gone = torch.ones(10_000), torch.zeros(10_000, dtype=torch.bool)
    for columns in images:
        gone[columns] = True
        gone[columns[::3]] = False
        size[columns[::3]] = torch.tensor([float(len(columns[i : i + 3])) for i in range(0, len(columns), 3)])
    positions = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        positions.append(kwargs.get("position_ids"))

    def behind(index: int, module: Any, args: Any, kwargs: Any) -> Any:
        hidden, mask = args[0].clone(), kwargs["attention_mask"].clone()
        if index == 1:
            for columns in images:
                for group in (columns[i : i + 3] for i in range(0, len(columns), 3)):
                    hidden[:, group[0]] = args[0][:, group].mean(1)
        length = hidden.shape[1]
        if what is not None and images:
            mask = mask + size[:length].log()
            if what == "size+distance":
                at = positions[-1]
                at = torch.arange(length) if at is None else at[..., 0, :]
                kind = getattr(layers[index].self_attn, "layer_type", "") or ""
                mask = mask + far(model, family, at[-3:] if at.dim() > 1 else at, kind)
        mask[..., gone[:length]] = torch.finfo(mask.dtype).min
        return (hidden, *args[1:]), kwargs | {"attention_mask": mask}

    hooks = [model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(lambda *call, index=index: behind(index, *call), with_kwargs=True)
        for index, layer in enumerate(layers)
        if index
    ]
    try:
        out = model.generate(**sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("sdpa")
    logits = torch.stack(out.logits, 1)[0]
    return Continuation(out.sequences[0, -NEW_TOKENS:], logits, gone, logits)


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("what", ["size", "size+distance"])
def test_layers_of_two_stages_know_their_own_keys(what: str) -> None:
    """Merging before the model and again in it: cached keys of layer 0 are not those of layer 2."""
    model, batch = get_model("llava"), batch_of("llava")
    method = vtc.Chain(thirds(Entry())(), EveryOther(at=2))
    expected, tokens = run(model, batch, method, what, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        found = run(model, batch, method, what, **cache)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(found[1], tokens)
    for row, sample in zip(expected, batch.samples, strict=True):
        torch.testing.assert_close(run(model, sample, method, what)[0][0], row, rtol=0, atol=TOLERANCE)
    only_before = run(model, batch, thirds(Entry())(), what)[0]
    assert float((only_before - expected).abs().max()) > 20 * TOLERANCE


# --------------------------------------------------------------------------------------------- the life of a generation


def chat(model: Any, batch: Batch, what: str, save: bool = False, crop: bool = False, whole: bool = False) -> Tensor:
    """Logits [T, V] of a prompt with an image and a text turn behind it, in pieces on one cache or all at once."""
    sample = batch.samples[0]
    later = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, contextual=2, calibration=what):
        if whole:
            longer = {**sample, "input_ids": torch.cat([sample["input_ids"], later], 1)}
            longer["attention_mask"] = torch.ones_like(longer["input_ids"])
            return model(**longer, use_cache=False).logits[0, -4:]
        cache = new_cache(model.get_decoder().config)
        model(**sample, **{CACHE: cache})
        if crop:
            length = sample["input_ids"].shape[1]
            model(input_ids=later[:, :3], **{CACHE: cache})
            cache.crop(-3 if cache.get_seq_length() == length + 3 else 0)
        if save:
            cache = pickle.loads(pickle.dumps(cache))
        first = model(input_ids=later[:, :1], **{CACHE: cache}).logits
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        rest = model(input_ids=later[:, 1:], **{CACHE: cache}).logits
        return torch.cat([first, rest], 1)[0]


@pytest.mark.parametrize("how", [{}, {"save": True}, {"crop": True}], ids=str)
@pytest.mark.parametrize("what", WHAT)
def test_sizes_and_positions_live_with_the_cache(what: str, how: dict[str, bool]) -> None:
    """Through later turns of several columns, beams, crops and pickles."""
    model, batch = get_model("llava"), batch_of("llava")
    torch.testing.assert_close(chat(model, batch, what, **how), chat(model, batch, what, whole=True), rtol=0, atol=1e-4)


def test_a_second_image_on_the_same_cache() -> None:
    """The later prompt's places are weighed too, beside those of the first."""
    model, sample = get_model("llava"), batch_of("llava").samples[0]
    joined = {**sample, "input_ids": torch.cat([sample["input_ids"]] * 2, 1)}
    joined["attention_mask"] = torch.ones_like(joined["input_ids"])
    joined["pixel_values"] = torch.cat([sample["pixel_values"], sample["pixel_values"].flip(-1)])
    later = {"input_ids": sample["input_ids"], "pixel_values": sample["pixel_values"].flip(-1)}
    for what in WHAT:
        with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, contextual=2, calibration=what):
            cache = new_cache(model.get_decoder().config)
            model(**sample, **{CACHE: cache})
            found = model(**later, **{CACHE: cache}).logits[0, -1]
            torch.testing.assert_close(found, model(**joined).logits[0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", WHAT)
def test_rows_move_with_the_cache(what: str) -> None:
    """Two samples that merged otherwise, with their images elsewhere, change places."""
    model, batch, sample = get_model("llava"), batch_of("llava"), batch_of("llava").samples[0]
    pixels = torch.cat([sample["pixel_values"], batch["pixel_values"][-1:]])
    ids = torch.cat([sample["input_ids"], sample["input_ids"].roll(1, 1)])
    both = {"input_ids": ids, "pixel_values": pixels}
    later, found = torch.tensor([[5, 6]]).repeat(2, 1), []
    for order in ([0, 1], [1, 0]):
        with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, contextual=2, calibration=what):
            cache = new_cache(model.get_decoder().config)
            model(**both, **{CACHE: cache})
            cache.reorder_cache(torch.tensor(order))
            found.append(model(input_ids=later, **{CACHE: cache}).logits)
    torch.testing.assert_close(found[1], found[0].flip(0), rtol=0, atol=1e-5)
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-3


def test_beams() -> None:
    model, sample = get_model("llava"), batch_of("llava").samples[0]
    found = []
    for use_cache in (True, False):
        with vtc.patch(model, "visionzip", keep=5, contextual=2, calibration="size+distance"):
            found.append(
                model.generate(**sample, **{**GREEDY, "num_beams": 3}, use_cache=use_cache, num_return_sequences=3)
            )
    assert torch.equal(*found)


def test_without_calibration_no_mask_is_touched() -> None:
    """The layers get what they always got: bools, or nothing where attention is plainly causal."""
    model, batch, seen = get_model("llava"), batch_of("llava"), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        seen.append(None if mask is None else mask.dtype)

    hook = model.get_decoder().layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    for what in (None, "size"):
        with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, contextual=2, calibration=what) as handle:
            assert (handle.stage.calibrator is None) == (what is None)
            model(**batch)
            model(**batch.samples[0])
    hook.remove()
    assert seen == [torch.bool, None, torch.float32, torch.float32]


def test_nothing_changes_where_nothing_is_lost() -> None:
    """A text alone, and images that keep all, attend as without a patch, bit for bit."""
    model, batch = get_model("llava"), batch_of("llava")
    model.set_attn_implementation("sdpa")
    for inputs, keep in ((batch.samples[2], 0.25), (batch, 1.0)):
        with torch.no_grad():
            plain = model(**inputs).logits
            with vtc.patch(model, "visionzip", keep=keep, calibration="size+distance"):
                assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_are_finite_under_autocast(dtype: torch.dtype) -> None:
    """A row that may see nothing, as padding, would be no number else, where kernels are not careful."""
    model, batch, seen = get_model("llava"), batch_of("llava"), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(bool(kwargs["attention_mask"].to(dtype).isfinite().all()))

    hook = model.get_decoder().layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    patched = vtc.patch(model, "visionzip", keep=5, calibration="size+distance")
    with torch.no_grad(), patched, torch.autocast("cpu", dtype=dtype):
        assert bool(model(**batch).logits.isfinite().all())
    hook.remove()
    assert seen == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, batch = FAMILIES["llava"].build(), batch_of("llava")
    with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, calibration="size+distance"):
        exact = model(**batch).logits
    half = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad(), vtc.patch(half, "visionzip", keep=5, calibration="size+distance"):
        found = half(**inputs).logits
    assert found.shape == exact.shape
    assert float((found - exact)[:, -1].abs().max()) < 0.1 * float(exact.abs().max())


def test_gradients_flow_through_calibrated_attention() -> None:
    model, batch = FAMILIES["llava"].build(), batch_of("llava")
    with vtc.patch(model, EveryOther(), calibration="size+distance"):
        model(**batch).logits.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.get_decoder().layers.parameters() if p.grad is not None)


# --------------------------------------------------------------------------------------------------- asked and refused


def test_configs_carry_it(tmp_path: Any) -> None:
    config = vtc.CompressionConfig("visionzip", {"keep": 5}, calibration="size+distance")
    again = vtc.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.to_dict()["calibration"] == "size+distance"
    config.save_pretrained(tmp_path)
    assert vtc.CompressionConfig.from_pretrained(tmp_path) == config
    assert "calibration" not in vtc.CompressionConfig("divprune").to_dict()  # older releases read that
    other = config.with_method(vtc.DivPrune(keep=3))
    assert (other.method, other.options["keep"], other.calibration) == ("divprune", 3, "size+distance")
    model = get_model("llava")
    with vtc.patch(model, config) as handle:
        assert handle.config.calibration == "size+distance"
        assert "calibration='size+distance'" in repr(handle)
    with vtc.patch(model, config, calibration="size") as handle:
        assert handle.config.calibration == "size"


@pytest.mark.parametrize("bad", ["sizes", True, 1, "", ["size"], "size+distance+more"])
def test_other_words_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"calibration=.* is neither None nor one of 'size', 'size\+distance'"):
        vtc.CompressionConfig("visionzip", calibration=bad)
    with pytest.raises(ValueError, match="calibration="):
        vtc.patch(get_model("llava"), "visionzip", calibration=bad)


def test_size_is_refused_where_nothing_merges() -> None:
    with pytest.raises(ValueError, match=r"'divprune' all stand for one.*'visionzip'.*size\+distance"):
        vtc.patch(get_model("llava"), "divprune", calibration="size")
    vtc.patch(get_model("llava"), "divprune", calibration="size+distance").unpatch()


def test_attention_that_takes_no_bias_is_refused() -> None:
    model = FAMILIES["llava"].build()
    for other in ("flash_attention_2", "flex_attention"):
        model.get_decoder().config._attn_implementation = other
        with pytest.raises(ValueError, match=rf"'{other}' does not take; load this .*='sdpa' or 'eager'"):
            vtc.patch(model, "visionzip", calibration="size")
    model.get_decoder().config._attn_implementation = "sdpa"
    AttentionInterface.register("own", sdpa_attention_forward)
    AttentionMaskInterface.register("own", sdpa_mask)
    with vtc.patch(model, "visionzip", calibration="size"), torch.no_grad():
        model.get_decoder().config._attn_implementation = "own"
        with pytest.raises(RuntimeError, match=r"switched to 'own'.*switch back to 'sdpa' or 'eager'"):
            model(**batch_of("llava").samples[0])


def test_layers_that_cannot_take_it_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0 has no attention whose logits could take it"):
        vtc.patch(get_model("qwen3_5"), "divprune", calibration="size+distance")
    with pytest.raises(ValueError, match=r"layer 0 rotates 8 of 16 features of a head.*calibration='size' works"):
        vtc.patch(get_model("glm46v"), "divprune", calibration="size+distance")

    model = FAMILIES["llava"].build()
    attention = model.get_decoder().layers[1].self_attn

    class Deaf(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, attention_mask=attention_mask.clamp(max=0), **kwargs)

    attention.__class__ = Deaf
    with pytest.raises(ValueError, match="layer 1 does not add its mask to them"):
        vtc.patch(model, "visionzip", calibration="size")


def test_rows_behind_the_bias_are_refused() -> None:
    """What is recomputed of attention knows no bias: fine before tokens left, not behind."""
    model = get_model("llava")
    vtc.patch(model, "fastv", keep=0.5, layer=1, calibration="size+distance").unpatch()
    both = vtc.Chain(VisionZip(keep=9), vtc.FastV(keep=0.5, layer=2))
    with pytest.raises(ValueError, match=r"what layer 1 attends to.*recomputes attention there"):
        vtc.patch(model, both, calibration="size")


def test_rows_before_the_bias_are_as_ever() -> None:
    model, batch = get_model("llava"), batch_of("llava")
    kept = []
    for what in (None, "size+distance"):
        with torch.no_grad(), vtc.patch(model, "fastv", keep=0.5, layer=2, calibration=what) as handle:
            kept.append((handle, model(**batch).logits))
    for one, other in zip(kept[0][0].last_keep, kept[1][0].last_keep, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert float((kept[0][1] - kept[1][1]).abs().max()) > 20 * TOLERANCE


def test_compact_positions_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="positions='compact': RESTORE"):
        vtc.patch(get_model("llava"), "visionzip", positions="compact", calibration="size").unpatch()


def test_a_cache_whose_first_keys_nobody_saw_is_refused() -> None:
    """Their positions are unknown; their sizes are not."""
    model, batch = get_model("llava"), batch_of("llava")
    text, sample = torch.tensor([[5, 6, 7]]), batch.samples[0]
    joined = {**sample, "input_ids": torch.cat([text, sample["input_ids"]], 1)}
    joined["attention_mask"] = torch.ones_like(joined["input_ids"])
    for what in ("size", "size+distance"):
        with torch.no_grad(), vtc.patch(model, "visionzip", keep=5, contextual=2, calibration=what):
            cache = new_cache(model.get_decoder().config)
            model(input_ids=text, **{CACHE: cache})
            rest = {k: v for k, v in sample.items() if k != "attention_mask"}
            if what == "size":
                found = model(**rest, **{CACHE: cache}).logits[0, -1]
                torch.testing.assert_close(found, model(**joined).logits[0, -1], rtol=0, atol=1e-4)
            else:
                with pytest.raises(NotImplementedError, match="this cache held 3 tokens before the first prompt"):
                    model(**rest, **{CACHE: cache})


def test_elsewhere_it_is_refused() -> None:
    """Where no bias can go with what is handed on, or compared."""
    model, sample = get_model("llava"), batch_of("llava").samples[0]
    config = vtc.CompressionConfig("visionzip", {"keep": 5}, calibration="size")
    takes = modules.takes_encoded(model.model)  # an older release has a reason of its own, and says it first
    first, later = (r"calibration='size' .* use vtc\.patch", "calibration='size'") if takes else (None, None)
    with pytest.raises(NotImplementedError, match=first):
        vtc.compress_inputs(model, sample, config)
    with pytest.raises(NotImplementedError, match=first):
        model.generate(**sample, **GREEDY, custom_generate=vtc.generate, method=config)
    with vtc.patch(model, config), pytest.raises(NotImplementedError, match=later):
        model.generate(**sample, **GREEDY, custom_generate=vtc.generate)
    distance = vtc.CompressionConfig("divprune", calibration="size+distance")
    with pytest.raises(ValueError, match=r"calibration='size\+distance' .* Verify the same method without it"):
        vtc.verify(model, sample, distance)


def test_vllm_refuses_it() -> None:
    settings = pytest.importorskip("vtc_vllm.settings")
    from vtc.models import resolve

    config = settings.read({"method": "divprune", "keep": 0.5, "calibration": "size+distance"})
    assert config.calibration == "size+distance"
    with pytest.raises(ValueError, match=r"calibration='size\+distance' .* transformers with vtc\.patch"):
        settings.settled(*resolve(get_model("llava")), config)


def test_lmms_eval_passes_it_on() -> None:
    arguments = pytest.importorskip("vtc_lmms_eval.arguments")
    asked = arguments.split({"base": "llava_hf", "method": "visionzip", "keep": 64, "calibration": "size"})
    assert asked.config.calibration == "size"
    assert asked.rest == {}
