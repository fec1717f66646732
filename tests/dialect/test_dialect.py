"""Names of transformers' insides: spelled in one room, found by looking, refused where they are not, and a tripwire."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from zoo import GREEDY, NEW_TOKENS, get_model, make_batch, models

import vtc
from vtc.dialect import arguments, attention, generation, releases
from vtc.dialect.arguments import CACHE, Role, Spelling

ROOT = Path(__file__).parents[2]
NATIVE = Spelling(get_model("llava").get_decoder().forward, "").name(CACHE)

# -------------------------------------------------------------------------------------------------------- one room only

INSIDES = {
    *("past_key_values", "position_embeddings", "position_ids", "inputs_embeds", "mm_encoder_outputs"),
    *("next_sequence_length", "deepstack_visual_embeds", "deepstack_features", "visual_pos_masks", "vision_mask"),
    *("_prefill", "prepare_inputs_for_generation", "_valid_auto_compile_criteria", "_deepstack_process"),
    *("loss_function", "_loss_function", "generate_batch", "init_continuous_batching", "_compiled_call"),
    *("_prepare_position_ids_for_generation", "_sample", "_beam_search", "prefill_chunk_size"),
    *("masking_utils", "create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate"),
    *("cache_utils", "DynamicCache", "StaticCache", "get_seq_length", "get_mask_sizes", "get_query_offset"),
    *("is_compileable", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"),
    *("modeling_layers", "GradientCheckpointingLayer", "gradient_checkpointing", "num_kv_shared_layers"),
    *("input_layernorm", "apply_rotary_pos_emb", "get_llama_4_attn_scale", "attn_logit_softcapping"),
    *("cu_seqlens", "cu_seq_lens_q", "qkv", "apply_rotary_pos_emb_vision", "get_vision_window_index"),
    *("pooler_output", "get_base_model", "peft_config", "get_decoder", "base_model", "mrope_section"),
}
IN_THE_ENGINE = {
    *("attention_mask", "input_ids", "use_cache"),
    *("layer_types", "sliding_window", "self_attn", "q_proj", "k_proj"),
}
"""Elsewhere these are the words of processors, of configs, and of vtc itself."""


def names_in(file: Path) -> Iterator[tuple[str, int]]:
    """Identifiers, attributes, keywords and strings of a file, but no prose."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            for part in [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]:
                yield part, node.lineno


def test_names_of_transformers_are_spelled_in_one_room() -> None:
    found = []
    for file in [*(ROOT / "vtc").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        if file.is_relative_to(ROOT / "vtc/dialect") or file.is_relative_to(ROOT / "vtc/zoo"):
            continue
        banned = INSIDES | (IN_THE_ENGINE if file.is_relative_to(ROOT / "vtc/engine") else set())
        if file.is_relative_to(ROOT / "integrations/vtc_vllm"):
            banned -= {"inputs_embeds", "mrope_section"}  # there they are vLLM's
        found += [f"{file.relative_to(ROOT)}:{line} {name}" for name, line in names_in(file) if name in banned]
    assert found == []


def test_the_room_is_what_the_rule_is_about() -> None:
    """The rule would notice: nearly every banned name does stand in the room."""
    room = {name for file in (ROOT / "vtc/dialect").rglob("*.py") for name, _ in names_in(file)}
    assert len(INSIDES - room) < 10, sorted(INSIDES - room)


# ------------------------------------------------------------------------------------------------------ other spellings


class Renamed(nn.Module):
    """The language model of a LLaVA whose argument for the cache has another name, and a base model that uses it."""

    def __init__(self, decoder: Any, name: str) -> None:
        super().__init__()
        self.decoder, self.layers, self.config, self.name = decoder, decoder.layers, decoder.config, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if NATIVE in kwargs:
            kwargs[self.name] = kwargs.pop(NATIVE)
        return super().__call__(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    @property
    def forward(self) -> Any:
        def forward(**kwargs: Any) -> Any:
            assert self.name == NATIVE or NATIVE not in kwargs, "somebody spoke another name than this decoder's"
            return self.decoder(**{NATIVE if name == self.name else name: value for name, value in kwargs.items()})

        signature = inspect.signature(self.decoder.forward)
        parameters = [p.replace(name=self.name) if p.name == NATIVE else p for p in signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return forward


def renamed(name: str) -> Any:
    model = models.llava()
    model.model.language_model = Renamed(model.model.language_model, name)
    return model


def answers(model: Any) -> torch.Tensor:
    batch = make_batch("llava", images_per_sample=(1, 2, 0))
    with vtc.patch(model, "grid", keep=0.5):
        return model.generate(**batch, **GREEDY)[:, -NEW_TOKENS:]


@pytest.mark.parametrize("name", CACHE.names)
def test_a_decoder_may_call_its_cache_by_any_known_name(name: str) -> None:
    assert torch.equal(answers(renamed(name)), answers(models.llava()))


def test_a_decoder_that_calls_its_cache_by_an_unknown_name_is_refused() -> None:
    model = renamed("kv_store")
    before = {id(module): dict(module.__dict__) for module in model.modules()}
    with pytest.raises(
        vtc.UnsupportedModelError, match=r"Renamed.forward has no argument for the key-value cache"
    ) as why:
        vtc.patch(model, "grid", keep=0.5)
    for word in ("past_key_values", "kv_store", "transformers 5.", "tested with 5.17 to"):
        assert word in str(why.value)
    assert {id(module): dict(module.__dict__) for module in model.modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "role", [role for role in vars(arguments).values() if isinstance(role, Role)], ids=lambda r: r.names[0]
)
def test_of_two_spellings_the_newest_counts(role: Role) -> None:
    assert role.read({name: index for index, name in enumerate(role.names, 1)}) == 1
    assert role.read({role.names[-1]: 7}) == 7
    assert role.read({}) is None


@pytest.mark.parametrize("method", [generation.PREPARE, generation.PREFILL, *generation.PAGED], ids=lambda m: m.name)
def test_a_method_that_is_gone_is_refused(method: generation.WrappedMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model("llava")
    monkeypatch.setattr(type(model), method.name, None)
    with pytest.raises(vtc.UnsupportedModelError, match=f"has no {method.name}.*tested with"):
        vtc.patch(model, "grid", keep=0.5)
    assert not model._forward_hooks


def test_a_method_that_takes_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model("llava")
    monkeypatch.setattr(type(model), "_prefill", lambda self, prompt, config: None)
    with pytest.raises(vtc.UnsupportedModelError, match="takes no generation_config, input_ids, model_kwargs"):
        vtc.patch(model, "grid", keep=0.5)


def test_caches_without_what_is_overridden_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.Cache.get_query_offset")
    with pytest.raises(vtc.UnsupportedModelError, match="Cache has no get_query_offset"):
        vtc.patch(get_model("llava"), "grid", keep=0.5)


# --------------------------------------------------------------------------------------------------------- the tripwire


def another_cache(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {NATIVE: DynamicCache(config=decoder.config)}


def a_column_less(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    shorter = {name: kwargs[name][:, 1:] for name in ("inputs_embeds", "position_ids") if kwargs.get(name) is not None}
    return args, kwargs | shorter


FAULTS = {another_cache: "returned another DynamicCache", a_column_less: "should hold {0: .*and holds {0: "}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_the_tripwire_fires(fault: Any, call: str) -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1,))
    whole = model.generate(**batch, **GREEDY)
    hook = model.get_decoder().register_forward_pre_hook(fault, with_kwargs=True)
    try:
        with vtc.patch(model, "grid", keep=0.5), pytest.raises(RuntimeError, match=FAULTS[fault]) as why:
            model.generate(**batch, **GREEDY) if call == "generate" else model(**batch)
        assert "vtc doctor" in str(why.value)
    finally:
        hook.remove()
    assert torch.equal(model.generate(**batch, **GREEDY), whole)
    answers(model)


def test_the_tripwire_watches_every_stage() -> None:
    """A layer past a stage that stores more than it should."""
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1,))

    def twice(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = CACHE.read(kwargs)
        keys = cache.layers[2].keys[:, :, :1]
        cache.update(keys, keys, 2)

    with vtc.patch(model, vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3))):
        hook = model.get_decoder().layers[2].register_forward_hook(twice, with_kwargs=True)
        try:
            with pytest.raises(RuntimeError, match="by layer, the cache should hold"):
                model(**batch)
        finally:
            hook.remove()


# ------------------------------------------------------------------------------------------------------------- releases


@pytest.mark.parametrize(("release", "warns"), [("5.17.0", 0), ("5.24.3", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)])
def test_a_release_that_nobody_tested_warns_once(release: str, warns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases.transformers, "__version__", release)
    releases.warn_if_untested.cache_clear()
    model = get_model("llava")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            vtc.patch(model, "grid", keep=0.5).unpatch()
    said = [str(w.message) for w in heard if "vtc doctor" in str(w.message)]
    assert len(said) == warns
    assert all(f"transformers {release}" in text for text in said)
    releases.warn_if_untested.cache_clear()


# ------------------------------------------------------------------------------------------------- layers and positions


@pytest.mark.parametrize(
    ("family", "reads"), [("llava", False), ("mistral3", False), ("ministral3", True), ("qwen2_vl", False)]
)
def test_layers_that_compute_with_positions_are_told_apart(family: str, reads: bool) -> None:
    """Qwen2-VL's attention has the argument, and only passes it on."""
    assert attention.reads_positions(get_model(family).get_decoder().layers[0]) is reads
