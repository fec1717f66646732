"""Attention rows inside text models of every kind: what the layer attends to, or refused when the model is patched.

The reference for a row is the attention that the unpatched model returns in eager mode; for what then stays, a run
over the whole prompt that is blind to what left (test_layers.py).
"""

from __future__ import annotations

import copy
import functools
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from reference import blind
from test_layers import EveryOther, gone_by_layer
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention
from zoo import GREEDY, NEW_TOKENS, get_model, make_batch
from zoo import models as zoo_models

import vtc
from vtc.dialect import attention, standins
from vtc.engine.probe import recipes
from vtc.methods import ModelFacts, Reduction, Stage, register_method
from vtc.models import resolve
from vtc.places import Layer
from vtc.signals import Rows
from vtc.signals.cls import cls_row
from vtc.tokens import VisualTokens

NOPE = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 512}
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
MUSE = {"head_dim": 8, "layer_rope_theta": [10000.0, 0.0, 10000.0], "mlp_layer_types": ["dense"] * 3, **NOPE}
PLAIN: dict[str, dict[str, Any]] = {
    **{
        kind: {}
        for kind in ("llama", "qwen2", "mistral", "cohere", "olmo", "granite", "arcee", "nemotron", "diffllama")
    },
    **{kind: {"head_dim": 8} for kind in ("qwen3", "gemma", "gemma3_text", "glm", "glm4", "ernie4_5", "helium")},
    **{kind: {} for kind in ("diffllama", "seed_oss", "bitnet", "starcoder2")},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "granitemoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 2},
}
ODD: dict[str, dict[str, Any]] = {
    "cohere2": NOPE,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "exaone4": {"sliding_window_pattern": 2, **NOPE},
    "hunyuan_v1_dense": {"head_dim": 8},
    "olmo2": {},
    "olmo3": {},
    "apertus": {},
    "olmoe": {"num_experts": 2, **MOE},
    "phi": {},
    "stablelm": {},
    "muse_glimmer_text": MUSE,
    "muse_spark_text": MUSE,
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere, normed": ("cohere", {"use_qk_norm": True}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "phi, normed": ("phi", {"qk_layernorm": True}),
    "stablelm, normed": ("stablelm", {"qk_layernorm": True}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # sinks take a part of the attention; values decide which keys are seen
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "GptOssAttention"),
    "doge": ({}, "DogeAttention"),
}
ALL = {kind: (kind, options) for kind, options in (PLAIN | ODD).items()} | OPTIONS
ALL = {name: entry for name, entry in ALL.items() if entry[0] in CONFIG_MAPPING}


@functools.cache
def model_of(name: str) -> Any:
    """A LLaVA with a text model of some kind."""
    kind, options = ALL[name] if name in ALL else (name, REFUSED[name][0])
    text = CONFIG_MAPPING[kind](**zoo_models._text(**options))
    sizes = {"image_token_index": zoo_models.IMAGE, "image_seq_length": 16}
    config = tf.LlavaConfig(vision_config=zoo_models._clip(), text_config=text, **sizes)
    return zoo_models._finish(tf.LlavaForConditionalGeneration, config)


@register_method
@dataclass(frozen=True, kw_only=True)
class Listens(vtc.Method):
    """Drops nothing, and hears what the layers attend to."""

    name: ClassVar[str] = "listens"
    after: tuple[int, ...] = (1, 2)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return tuple(Stage(Layer(a), needs=(Rows(a, of="text"), Rows(a, of="last"))) for a in self.after)

    def counts(self, layouts: Any, stage: Any = None, given: Any = None) -> None:
        return None

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: Any) -> Reduction:
        HEARD.append(tokens.signals)
        return Reduction.of_mask(tokens.mask, tokens.counts)


HEARD: list[dict[str, Tensor]] = []


# ------------------------------------------------------------------------------------------ rows are the layer's own


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_rows_are_what_the_layer_attends_to(name: str) -> None:
    """In a padded batch, for layers of both kinds where there are two: layer 1 of the odd ones has no positions."""
    model, batch = copy.deepcopy(model_of(name)), make_batch("llava")
    model.set_attn_implementation("eager")  # sdpa leaves caps of logits out in some releases
    HEARD.clear()
    with vtc.patch(model, Listens()):
        model(**batch)
    maps = model(**batch, output_attentions=True).attentions
    assert len(HEARD) == 2
    for heard, layer in zip(HEARD, (1, 2), strict=True):
        image = 0
        for row, (images, offset) in enumerate(zip(batch.images, batch.offsets, strict=True)):
            for columns in images:
                behind = slice(offset + int(images[-1][-1]) + 1, None)
                rows = maps[layer].float()[row].mean(0)[behind][:, offset + columns]
                for signal, expected in {"instruction": rows.mean(0), "last": rows[-1]}.items():
                    torch.testing.assert_close(heard[signal][image], expected, rtol=1e-4, atol=1e-6)
                image += 1
        assert image == len(heard["last"])


@torch.no_grad()
@pytest.mark.parametrize("name", [kind for kind in ODD if kind in ALL])
def test_what_stays_is_generated_from(name: str) -> None:
    """Dropping between layers, and before them, as by hand: rotary embeddings and masks follow in odd layers too."""
    model, batch, method = model_of(name), make_batch("llava"), EveryOther(after=(1, 2), entry=True)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    with vtc.patch(model, method):
        ours = model.generate(**batch, **GREEDY, **wanted)
    for row, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        with blind(eager, gone_by_layer(images, method, sample["input_ids"].shape[1], 3)):
            theirs = eager.generate(**sample, **GREEDY, **wanted, use_cache=False)
        assert ours.sequences[row, -NEW_TOKENS:].tolist() == theirs.sequences[0, -NEW_TOKENS:].tolist()
        torch.testing.assert_close(
            torch.stack(ours.logits)[:, row], torch.stack(theirs.logits)[:, 0], rtol=1e-3, atol=1e-3
        )


# ------------------------------------------------------------------------------------------------------------- refused


def state(model: Any) -> list[Any]:
    """Everything that a model is made of, by identity; and what is in its modules' dictionaries."""
    parts = []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            entries = [(key, id(entry)) for key, entry in value.items()] if isinstance(value, dict) else None
            parts.append((name, attribute, id(value), entries))
    return parts


def refusal(model: Any, method: Any = "transprune", **options: Any) -> str:
    """Why a model is refused; nothing of it was touched, nor the random state."""
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(vtc.UnsupportedModelError) as caught:
        vtc.patch(model, method, **options)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    return str(caught.value)


INSIDE = {"layers": (1, 2), "ratios": (0.5, 0.25)}


@torch.no_grad()
@pytest.mark.parametrize("name", [kind for kind in REFUSED if kind in CONFIG_MAPPING])
def test_attention_that_cannot_be_recomputed_is_refused(name: str) -> None:
    model = model_of(name)
    text = refusal(model, **INSIDE)
    for word in ("'transprune'", "layer 1", REFUSED[name][1], "rows differ by up to 0.", tf.__version__, "'divprune'"):
        assert word in text
    with vtc.patch(model, "divprune", keep=0.5) as patch:
        model(**make_batch("llava"))
        assert patch.last_keep


class Louder(LlamaAttention):
    """A family nobody has seen: all of vtc's names are there, and what it does is another thing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(2 * hidden_states, *args, **kwargs)


class Mute(LlamaAttention):
    """Tells nobody what it attends to."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0], None


class Broken(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("needs a GPU\nand more")


STRANGE = {Louder: "rows differ by up to", Mute: "returns no attention weights", Broken: "needs a GPU)"}


@pytest.mark.parametrize(("kind", "word"), STRANGE.items())
def test_what_differs_or_cannot_be_tried_out_is_refused(kind: type, word: str) -> None:
    model = copy.deepcopy(get_model("llava"))
    model.model.language_model.layers[2].self_attn.__class__ = kind
    assert word in refusal(model, **INSIDE)
    assert f"layer 2 (LlamaDecoderLayer, {kind.__name__})" in refusal(model, **INSIDE)
    vtc.patch(model, "transprune", layers=(1,), ratios=(0.5,)).unpatch()  # layer 1 is as ever


LEFT_OUT: dict[str, tuple[str, str, Any]] = {
    "caps": ("gemma2", "softcap", lambda attention: None),
    "positions": ("ministral3", "scale_by_position", lambda attention, query, positions: query),
    "scales": ("granite", "scaling", lambda attention: attention.head_dim**-0.5),
    "rotation": ("llama", "_rotate", lambda attention, x, *rotary, whole: x),
    "norms": ("qwen3", "_norm", lambda attention, side: None),
}


@pytest.mark.parametrize(("name", "part", "instead"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_control_what_vtc_leaves_out_is_noticed(
    name: str, part: str, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model(name) if name == "ministral3" else model_of(name)
    vtc.patch(model, "transprune", **INSIDE).unpatch()
    monkeypatch.setattr(attention, part, instead)
    assert "rows differ by up to" in refusal(model, **INSIDE)


def test_only_methods_that_read_rows_are_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("tried out")

    monkeypatch.setattr(standins, "stand_in", fails)
    for method in ("divprune", "grid", vtc.ToDRE(keep=0.5, pivot="random")):
        vtc.patch(get_model("llava"), method).unpatch()
    assert "tried out)" in refusal(get_model("llava"), **INSIDE)
    assert "tried out)" in refusal(get_model("llava"), "todre", keep=0.5)


# ---------------------------------------------------------------------------------------- cheap, and without a trace


USUAL = recipes(resolve(get_model("llava"))[1], [0])[0]


@pytest.mark.parametrize("name", ["llava", "gemma3", "gemma4", "qwen3_vl", "ministral3"])
def test_a_trial_leaves_no_trace(name: str) -> None:
    """No hook, no attribute, no gradient, no random number; in training mode too."""
    model = get_model(name)
    before, random = state(model), torch.get_rng_state()
    model.train()
    try:
        found = recipes(resolve(model)[1], [1, 2])
    finally:
        model.eval()
    assert set(found.values()) == {USUAL}
    assert torch.equal(torch.get_rng_state(), random)
    assert state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


class Quantised(nn.Module):
    """A linear map whose weights nobody else understands."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", torch.zeros(4, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("needs its own kernel")


def quantised(model: Any) -> Any:
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, Quantised(child))
    return model


def offloaded(model: Any) -> Any:
    """As accelerate does it: weights away, and a forward on each instance that would fetch them."""

    def fetching(forward: Any) -> Any:
        def fetch(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("weights were fetched")

        return functools.wraps(forward)(fetch)

    model.to("meta")
    for module in model.modules():
        module.forward = fetching(module.forward)
    return model


def on_a_gpu(model: Any) -> Any:
    model.config.text_config._attn_implementation = "flash_attention_2"
    return model


DISGUISES: dict[str, Callable[[Any], Any]] = {
    "meta": lambda model: model.to("meta"),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
    "quantised": quantised,
    "offloaded": offloaded,
    "flash": on_a_gpu,
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_any_state_of_a_model_is_tried_out_alike(disguise: str) -> None:
    plain, odd = get_model("llava"), model_of("smollm3")
    for model in (plain, odd):
        expected = recipes(resolve(model)[1], [0, 1, 2])
        assert recipes(resolve(DISGUISES[disguise](copy.deepcopy(model)))[1], [0, 1, 2]) == expected
    assert expected[0] != expected[1]


def test_what_surrounds_a_trial_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = resolve(model_of("smollm3"))[1]
    expected = recipes(parts, [1, 2])
    monkeypatch.setenv("VTC_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert recipes(parts, [1, 2]) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_trial_costs_nothing_at_any_size() -> None:
    text = tf.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    config = tf.LlavaConfig(vision_config=zoo_models._clip(), text_config=text)
    with torch.device("meta"):
        model = tf.LlavaForConditionalGeneration(config)
    parts = resolve(model)[1]
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert set(recipes(parts, [18, 23, 30]).values()) == {USUAL}
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024  # KiB


# ------------------------------------------------------------------------------------- what no method could be right in


def minimax(sparse: bool) -> Any:
    text = {
        **zoo_models._text(head_dim=8),
        "layer_types": ["full_attention", "minimax_m3_sparse" if sparse else "full_attention", "full_attention"],
        "mlp_layer_types": ["dense"] * 3,
        "dense_intermediate_size": 64,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 2}
    with torch.device("meta"):
        return tf.MiniMaxM3SparseForConditionalGeneration(
            tf.MiniMaxM3VLConfig(text_config=text, vision_config=vision, image_token_id=zoo_models.IMAGE)
        )


def test_blocks_of_keys_picked_by_position_are_refused() -> None:
    for model in (minimax(True), minimax(True).model):
        assert "layer 1 picks blocks of keys by the positions of tokens" in refusal(model, "divprune", keep=0.5)
    vtc.patch(minimax(False), "divprune", keep=0.5).unpatch()  # without an indexer it is a model like others


def granite() -> Any:
    text = {"model_type": "granite4_vision_text", **zoo_models._text()}
    vision = zoo_models._clip(hidden_size=64, num_attention_heads=1).to_dict()
    config = tf.Granite4VisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=zoo_models.IMAGE,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 1, 2, 2],
    )
    with torch.device("meta"):
        return tf.Granite4VisionForConditionalGeneration(config)


def test_features_that_only_layers_see_are_refused() -> None:
    """It was accepted, pruned nothing, and said that no image had been encoded."""
    for model in (granite(), granite().model):
        assert "image features do not enter the language model" in refusal(model, "divprune", keep=0.5)


class OneForAll(tf.InternVLModel):
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        output = super().get_image_features(*args, **kwargs)
        output.pooler_output = output.pooler_output.flatten(0, 1)  # whose they are, nobody can tell
        return output


@torch.no_grad()
def test_a_warning_says_what_is_missing() -> None:
    model = copy.deepcopy(get_model("internvl"))
    model.model.__class__ = OneForAll
    text = r"in the \w+ that its encoder returned are no features of single images: nothing is pruned"
    with vtc.patch(model, "divprune", keep=0.5) as patch, pytest.warns(UserWarning, match=text):
        model(**make_batch("internvl"))
    assert patch.last_keep is None


# --------------------------------------------------------------------------------------------------------- the tower


@functools.cache
def with_dinov2() -> Any:
    vision = tf.Dinov2Config(**zoo_models._tower(), mlp_ratio=2)
    sizes = {"image_token_index": zoo_models.IMAGE, "image_seq_length": 16}
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**zoo_models._text()), **sizes)
    return zoo_models._finish(tf.LlavaForConditionalGeneration, config)


@torch.no_grad()
def test_the_cls_row_of_a_dinov2_tower() -> None:
    """It spells heads and scale in its own way: right where it has projections, refused at once where it has not."""
    model, batch = with_dinov2(), make_batch("llava")
    tower = model.model.vision_tower
    if not hasattr(tower.encoder.layer[-1].attention, "q_proj"):  # 5.17
        with pytest.raises(ValueError, match="needs 'cls', which this LlavaForConditionalGeneration cannot give"):
            vtc.patch(model, "todre", keep=4)
        return
    method = vtc.IDPruner(keep=1)  # the first pick is the most important token
    with vtc.patch(model, method) as patch:
        model(**batch)
        picked = [int(kept) for images in patch.last_keep for kept in images]
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    maps = eager(batch["pixel_values"], output_attentions=True).attentions[-1]
    assert picked == maps.mean(1)[:, 0, 1:].argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("layers", [-1, [1, -1]], ids=["last", "two"])
def test_methods_that_read_cls_run_on_a_dinov2_tower(layers: int | list[int]) -> None:
    """What FasterVLM keeps is what eager attention of the last layer but one ranks highest."""
    vision = tf.Dinov2Config(**zoo_models._tower(), mlp_ratio=2)
    sizes = {"image_token_index": zoo_models.IMAGE, "image_seq_length": 16, "vision_feature_layer": layers}
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**zoo_models._text()), **sizes)
    model, batch = zoo_models._finish(tf.LlavaForConditionalGeneration, config), make_batch("llava")
    tower = model.model.vision_tower
    for parameter in tower.parameters():  # or attention is even
        parameter.data = torch.randn_like(parameter) * 0.3
    if not hasattr(tower.encoder.layer[-1].attention, "q_proj"):  # 5.17
        with pytest.raises(ValueError, match="needs 'cls'"):
            vtc.patch(model, "fastervlm", keep=5)
        return
    heard: list[Tensor] = []
    hook = tower.encoder.layer[-2].attention.register_forward_hook(lambda module, args, _: heard.append(args[0]))
    with vtc.patch(model, "fastervlm", keep=5) as patch:
        model(**batch)
        kept = torch.stack([row for images in patch.last_keep for row in images])
    hook.remove()
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    rows = eager(batch["pixel_values"], output_attentions=True).attentions[-2].mean(1)[:, 0, 1:]
    torch.testing.assert_close(cls_row(tower.encoder.layer[-2].attention, heard[0]), rows)
    assert rows.std(-1).min() > 1e-3
    assert torch.equal(kept, rows.topk(5).indices.sort().values)


def test_a_tower_whose_row_differs_is_refused() -> None:
    model = copy.deepcopy(get_model("llava"))
    last = resolve(model)[0].tower(model.model, "image").attention(-1)

    class Colder(type(last)):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return super().forward(hidden_states / 2, **kwargs)

    last.__class__ = Colder
    text = refusal(model, "todre", keep=0.5)
    for word in ("'todre' reads the vision tower", "Colder is not what vtc recomputes", 'pivot="random"'):
        assert word in text
    vtc.patch(model, "divprune", keep=0.5).unpatch()
