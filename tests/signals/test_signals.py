"""Signals: the CLS row is what the tower's own attention says, lands on the right tokens, and costs nobody a backend.

Two things are checked apart. The row: equal to the attention weights that the same layer gives in eager mode. The map
from patches to tokens: found without vtc and without knowing any family, by asking autograd which patches of the
tower's output a visual token depends on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from tower_reference import eager_rows, encoder_calls, features, scores_by_hand, sources
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import FAMILIES, GREEDY, Batch, Family, get_model, make_batch
from zoo import models as zoo_models
from zoo.inputs import Fixed

import vtc
from vtc.engine import choosing, encode
from vtc.models import resolve
from vtc.signals import Cls, cls

SHORT = GREEDY | {"min_new_tokens": 2, "max_new_tokens": 2}


@functools.cache
def llava_full() -> Any:
    """LLaVA that keeps the CLS feature as a visual token."""
    text, vision = tf.LlamaConfig(**zoo_models._text()), zoo_models._clip()
    sizes = {"image_token_index": zoo_models.IMAGE, "image_seq_length": 17}
    config = tf.LlavaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy="full", **sizes)
    return zoo_models._finish(tf.LlavaForConditionalGeneration, config)


OWN = {"llava_full": Family("llava_full", llava_full, Fixed(8, 17))}
WITH_CLS = ["llava", "vipllava", "llava_next", "llava_next_video_image", "llava_next_video", "video_llava", "internvl"]
WITH_CLS += list(OWN)


def model_of(name: str) -> Any:
    return OWN[name].build() if name in OWN else get_model(name)


@functools.cache
def batch_of(name: str) -> Batch:
    return make_batch(OWN.get(name, name))


# ------------------------------------------------------------------------------------------------ what the encoders see


def modalities(batch: Batch) -> list[str]:
    return [modality for modality, arguments in encoder_calls(batch).items() if arguments]


CELLS = [(name, modality) for name in WITH_CLS for modality in modalities(batch_of(name))]


# ------------------------------------------------------------------------------------------ the row, by eager attention


@torch.no_grad()
def recorded_rows(model: Any, batch: Batch, modality: str) -> Tensor:
    """The rows that vtc hands to the adapter, in a forward pass of the whole model."""
    rows: list[Tensor] = []
    adapter = type(resolve(model)[0])
    scores = adapter.per_token

    def listen(self: Any, base: Any, kind: str, given: Tensor, *rest: Any) -> Any:
        if kind == modality:
            rows.append(given)
        return scores(self, base, kind, given, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch, vtc.patch(model, "todre", keep=0.5):
        monkeypatch.setattr(adapter, "per_token", listen)
        model(**batch)
    assert len(rows) == 1, "encoded more than once"
    return rows[0]


def check_rows_are_the_attention(model: Any, batch: Batch, modality: str) -> None:
    ours, theirs = recorded_rows(model, batch, modality), eager_rows(model, batch, modality)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "modality"), CELLS)
def test_the_row_is_the_towers_attention(name: str, modality: str) -> None:
    check_rows_are_the_attention(model_of(name), batch_of(name), modality)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_rows_tell_patches_apart(name: str) -> None:
    """The zoo's attention is not flat: a tolerance of 1e-6 means something."""
    rows = eager_rows(model_of(name), batch_of(name), "image")
    assert (rows.amax(1) / rows.amin(1)).min() > 1.2


def without_scale(attention: nn.Module, hidden: Tensor) -> Tensor:
    return REAL_ROW(ScaledBy(attention, 1.0), hidden)


def over_patches_only(attention: nn.Module, hidden: Tensor) -> Tensor:
    row = REAL_ROW(attention, hidden)
    return row / row.sum(1, keepdim=True)


def without_norm(attention: nn.Module, hidden: Tensor) -> Tensor:
    return REAL_ROW(ScaledBy(attention, attention.scale, hide=("q_norm", "k_norm")), hidden)


class ScaledBy:
    """A module seen with another scale, and without some of its parts."""

    def __init__(self, module: nn.Module, scale: float, hide: tuple[str, ...] = ()) -> None:
        self.module, self.scale, self.hide = module, scale, hide

    def __getattr__(self, name: str) -> Any:
        if name in self.hide:
            raise AttributeError(name)
        return getattr(self.module, name)


REAL_ROW = cls.cls_row


@pytest.mark.parametrize("broken", [without_scale, over_patches_only], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_control_another_row_is_found(
    name: str, broken: Callable[[nn.Module, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cls, "cls_row", broken)
    with pytest.raises(AssertionError):
        check_rows_are_the_attention(model_of(name), batch_of(name), "image")


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_control_another_layer_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cls, "module", lambda self, tower: tower.attention(-2))
    with pytest.raises(AssertionError):
        check_rows_are_the_attention(model_of(name), batch_of(name), "image")


def internvl_with_qk_norm() -> Any:
    vision = tf.InternVLVisionConfig(**zoo_models._tower(image_size=12), use_qk_norm=True)
    text = tf.Qwen2Config(**zoo_models._text())
    sizes = {"image_token_id": zoo_models.IMAGE, "image_seq_length": 9, "tie_word_embeddings": False}
    config = tf.InternVLConfig(vision_config=vision, text_config=text, **sizes)
    return zoo_models._finish(tf.InternVLForConditionalGeneration, config)


def test_towers_that_normalise_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = internvl_with_qk_norm(), batch_of("internvl")
    check_rows_are_the_attention(model, batch, "image")
    monkeypatch.setattr(cls, "cls_row", without_norm)
    with pytest.raises(AssertionError):
        check_rows_are_the_attention(model, batch, "image")


# --------------------------------------------------------------------------------------- the map from patches to tokens


@torch.no_grad()
def signals_of(model: Any, batch: Batch, modality: str) -> list[Tensor]:
    """The `cls` signal as methods get it, image by image."""
    seen: list[Any] = []
    reduce = vtc.ToDRE.reduce

    def look(self: vtc.ToDRE, stage: Any, tokens: Any, budget: Any) -> Any:
        seen.append(tokens)
        return reduce(self, stage, tokens, budget)

    located: list[Any] = []
    locate = choosing.locate

    def listen(*args: Any) -> list[Any]:
        located[:] = locate(*args)
        return located

    with pytest.MonkeyPatch.context() as monkeypatch, vtc.patch(model, "todre", keep=0.5):
        monkeypatch.setattr(vtc.ToDRE, "reduce", look)
        monkeypatch.setattr(choosing, "locate", listen)
        model(**batch)
    images = list(located)
    scores = zip(images, seen[0].signals["cls"], strict=True)
    for image, row in zip(images, seen[0].signals["cls"], strict=True):
        assert not row[image.layout.length :].any(), "padding scores 0"
    return [row[: image.layout.length] for image, row in scores if image.modality == modality]


def check_signals_are_mapped(model: Any, batch: Batch, modality: str) -> list[Tensor]:
    rows, reached = eager_rows(model, batch, modality), sources(model, batch, modality)
    expected = [scores_by_hand(rows, image) for image in reached]
    found = signals_of(model, batch, modality)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    return found


@pytest.mark.parametrize(("name", "modality"), CELLS)
def test_every_token_has_the_attention_of_its_patches(name: str, modality: str) -> None:
    check_signals_are_mapped(model_of(name), batch_of(name), modality)


def test_newlines_score_nothing_and_patches_something() -> None:
    """Any resolution: thumbnail first, then the mosaic in raster order over the crops, a zero after each row."""
    model, batch = get_model("llava_next"), batch_of("llava_next")
    wide = check_signals_are_mapped(model, batch, "image")[0]  # 8 x 16 pixels: a thumbnail and two crops
    zeros = (wide == 0).nonzero()[:, 0].tolist()
    assert zeros == [16 + 9 * row + 8 for row in range(4)]
    rows = eager_rows(model, batch, "image")
    torch.testing.assert_close(wide[:16], rows[0], rtol=0, atol=1e-6)
    left, right = rows[1].reshape(4, 4), rows[2].reshape(4, 4)
    by_hand = torch.cat([left, right, torch.zeros(4, 1)], dim=1).flatten()
    torch.testing.assert_close(wide[16:], by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "modality"), CELLS)
def test_synthetic_rows_arrive_where_they_belong(name: str, modality: str) -> None:
    """Rows that number the patches, through the adapter alone: a token's score is the mean number of its patches."""
    model, batch = model_of(name), batch_of(name)
    adapter, parts = resolve(model)
    reached = sources(model, batch, modality)
    pictures, patches = reached[0].shape[1], reached[0].shape[2] - 1
    rows = 1.0 + torch.arange(float(pictures * patches)).reshape(pictures, patches)
    entries = [entry.shape[:-1].numel() for entry in features(model, batch, modality)]
    arguments = encoder_calls(batch)[modality]
    layouts = adapter.layouts(parts.base, modality, entries, arguments)
    scores = torch.cat(list(adapter.per_token(parts.base, modality, rows, layouts, arguments)))
    expected = torch.cat([scores_by_hand(rows, image) for image in reached])
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def shifted(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: [scores.roll(1) for scores in real(*args)]


def crops_swapped(real: Callable[..., Any]) -> Callable[..., Any]:
    def scores(self: Any, base: Any, modality: str, rows: Tensor, *rest: Any) -> Any:
        return real(self, base, modality, rows[[0, 2, 1, *range(3, len(rows))]], *rest)

    return scores


@pytest.mark.parametrize("broken", [shifted, crops_swapped], ids=lambda f: f.__name__)
def test_control_a_wrong_map_is_found(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = type(resolve(get_model("llava_next"))[0])
    monkeypatch.setattr(adapter, "per_token", broken(adapter.per_token))
    with pytest.raises(AssertionError):
        check_signals_are_mapped(get_model("llava_next"), batch_of("llava_next"), "image")


# ----------------------------------------------------------------------------------------- 5: nobody asks for attention


@contextmanager
def watching_attention(model: Any) -> Iterator[list[nn.Module]]:
    """Fail as soon as anybody asks for attention weights, or attends with another implementation than configured."""
    calls: list[nn.Module] = []
    backends = implementations(model)

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("output_attentions"), f"{type(module).__name__} was asked for its weights"
        assert implementations(model) == backends, "the attention implementation was swapped"
        calls.append(module)
        return sdpa(module, *args, **kwargs)

    def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert not kwargs.get("output_attentions"), f"{type(module).__name__} was asked for attention weights"

    def attend_eagerly(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{type(module).__name__} attends eagerly")

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    hooks = [module.register_forward_pre_hook(refuse, with_kwargs=True) for module in model.modules()]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend  # a local entry, which hides the global one
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for source in {sys.modules[type(module).__module__] for module in model.modules()}:
                monkeypatch.setattr(source, "eager_attention_forward", attend_eagerly, raising=False)
            yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for hook in hooks:
            hook.remove()
    assert implementations(model) == backends
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa


def implementations(model: Any) -> list[tuple[str, str]]:
    """Of every module that has a configuration: towers, projectors, language model, attention layers."""
    return [
        (name, module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


@torch.no_grad()
def check_attention_is_left_alone(model: Any, batch: Batch) -> None:
    """Every layer attends as often as in the unpatched model, as configured, and keeps its weights to itself.

    Patching is not watched: it tries rows out on stand-ins (test_probe.py), which do attend eagerly.
    """
    model.set_attn_implementation("sdpa")
    model.generate(**batch, **SHORT)  # loads what is loaded lazily
    with watching_attention(model) as unpatched:
        model.generate(**batch, **SHORT)
    adapter, parts = resolve(model)
    method = vtc.ToDRE(keep=0.5, pivot="cls" if adapter.gives(parts, Cls()) else "random")
    configured = implementations(model)
    with vtc.patch(model, method) as patch:
        assert implementations(model) == configured
        with watching_attention(model) as patched:
            model.generate(**batch, **SHORT)
        assert patch.last_keep
    assert unpatched, "no layer attends through the registry: nothing was watched"
    assert patched == unpatched


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_attention_is_left_alone(name: str) -> None:
    check_attention_is_left_alone(model_of(name), batch_of(name))


def attends_eagerly(self: Cls, tower: Any, module: nn.Module, hidden: Tensor, heard: Any) -> Tensor:
    """The row by a second pass of the layer, switched to the implementation that returns weights, and back."""
    module.config._attn_implementation, before = "eager", module.config._attn_implementation
    weights = module.forward(hidden)[1]
    module.config._attn_implementation = before
    return weights.mean(1)[:, 0, 1:]


def attends_again(self: Cls, tower: Any, module: nn.Module, hidden: Tensor, heard: Any) -> Tensor:
    """A second pass in the configured implementation."""
    module.forward(hidden)
    return REAL_ROW(module, hidden)


def listens_with_attentions(*given: Any) -> Callable[..., Any]:
    call = REAL_LISTENING(*given)
    return functools.wraps(call)(lambda *args, **kwargs: call(*args, **kwargs, output_attentions=True))


REAL_LISTENING = encode.listening


def swaps_on_patch(parts_of: vtc.Patch) -> None:
    REAL_INSTALL(parts_of)
    parts_of.model.get_decoder().config._attn_implementation = "eager"


REAL_INSTALL = vtc.patching.install
BREAKAGES = {
    "an eager pass": (Cls, "read", attends_eagerly),
    "a second pass": (Cls, "read", attends_again),
    "output_attentions": (vtc.installing, "listening", listens_with_attentions),
    "another implementation": (vtc.patching, "install", swaps_on_patch),
}


@pytest.mark.parametrize(("where", "name", "broken"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_control_who_meddles_with_attention_is_found(
    where: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, broken)
    model = FAMILIES["llava"].build()  # a throw-away one: it may stay broken
    with pytest.raises(AssertionError):
        check_attention_is_left_alone(model, batch_of("llava"))
