"""The layer stage: tokens that leave between decoder layers.

The reference runs the unpatched model over the whole prompt and hides the dropped keys from the layers below each
stage: to leave a token out of a sequence and to be blind to it are the same for everybody else. A method made for the
tests drops tokens by their index, so that nothing but the engine is tested.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from flash import flash_attention
from generating import generate, prepared, second_turn
from reference import blind
from release import CACHE, OLD, checkpointing
from test_matrix import with_positions
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import FAMILIES, GREEDY, NEW_TOKENS, get_model, make_batch

import vtc
from vtc.dialect.attention import CHECKPOINTS_HOOKS
from vtc.dialect.caches import physical_length
from vtc.methods import ModelFacts, Reduction, Stage, register_method
from vtc.places import Entry, Layer
from vtc.signals import Rows, Share, Signal, Transitions
from vtc.tokens import VisualTokens

FITTING = [name for name in FAMILIES if name != "qwen3_5"]  # its linear attention keeps no single tokens
SHORT_WINDOWS = ("gemma3_window8", "gemma4", "gemma4_bidirectional")
SOME = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "mistral3"]


def signals(layer: int) -> tuple[Signal, ...]:
    """All that there are for a stage after so many layers."""
    rows = (Rows(layer, of="text"), Rows(layer, of="last"), Share(layer, of="text"), Share(layer, of="visual"))
    return (*rows, Transitions(0, until=layer))


@register_method
@dataclass(frozen=True, kw_only=True)
class EveryOther(vtc.Method):
    """Drop every other token after some layers, and before the model if asked to; ask for all signals there are."""

    name: ClassVar[str] = "every_other"
    after: tuple[int, ...] = (1,)
    entry: bool = False
    everything: bool = False

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        inside = tuple(Stage(Layer(after), signals(after)) for after in self.after)
        return (Stage(Entry()), *inside) if self.entry else inside

    def counts(self, layouts: Any, stage: Stage | None = None, given: Any = None) -> None:
        return None

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        if isinstance(stage.at, Layer):
            SEEN.append(tokens)
            if self.everything:
                return Reduction.of_mask(torch.zeros_like(tokens.mask), (0,) * len(tokens.counts))
        rank = tokens.mask.cumsum(1) - 1
        return Reduction.of_mask(tokens.mask & (rank % 2 == 0), tuple((n + 1) // 2 for n in tokens.counts))


SEEN: list[VisualTokens] = []
SCHEDULES = {
    "first": EveryOther(after=(1,)),
    "late": EveryOther(after=(2,)),
    "twice": EveryOther(after=(1, 2)),
    "entry_and_inside": EveryOther(after=(2,), entry=True),
    "everything": EveryOther(after=(2,), everything=True),
}


# ---------------------------------------------------------------------------------------------------- the reference


def gone_by_layer(images: list[Tensor], method: EveryOther, length: int, depth: int) -> list[Tensor]:
    """Bool [length] for each layer: columns that it must not see."""
    alive = [columns[::2] if method.entry else columns for columns in images]
    layers = []
    for layer in range(depth):
        if layer in method.after:
            alive = [columns[:0] if method.everything else columns[::2] for columns in alive]
        gone = torch.zeros(length, dtype=torch.bool)
        for columns, left in zip(images, alive, strict=True):
            gone[columns] = True
            gone[left] = False
        layers.append(gone)
    return layers


@functools.cache
def by_hand(family: str, padding: str, schedule: str) -> tuple[Tensor, Tensor]:
    """Logits [B, steps, V] and tokens [B, steps] of the reference."""
    model, batch = get_model(family), make_batch(family, padding=padding)
    model.set_attn_implementation("eager")
    depth = len(model.get_decoder().layers)
    logits, tokens = [], []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        gone = gone_by_layer(images, SCHEDULES[schedule], sample["input_ids"].shape[1], depth)
        with blind(model, gone):
            out = model.generate(**sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(out.logits, 1))
        tokens.append(out.sequences[:, -NEW_TOKENS:])
    return torch.cat(logits), torch.cat(tokens)


# "none" means prompts of one length: generate passes no mask, and what leaves makes holes.
PROMPTS = [*((name, "left") for name in SCHEDULES), ("twice", "none"), ("entry_and_inside", "none")]
RUNS = [
    ("sdpa", {}),
    ("sdpa", {"use_cache": False}),
    ("sdpa", {"cache_implementation": "static"}),
    ("eager", {}),
]


@pytest.mark.sampled(newest=2, older=4, by=("family", "schedule", "padding"))
@pytest.mark.parametrize(("backend", "cache"), RUNS, ids=str)
@pytest.mark.parametrize(("schedule", "padding"), PROMPTS)
@pytest.mark.parametrize("family", FITTING)
def test_leaving_is_being_unseen(family: str, schedule: str, padding: str, backend: str, cache: dict[str, Any]) -> None:
    if OLD and family == "paligemma" and cache == {"use_cache": False}:
        pytest.skip("before 5.23, generated tokens join PaliGemma's bidirectional prefix when there is no cache")
    if OLD and family == "paligemma":
        pytest.skip("before 5.23, the reference, which has no cache, lets generated tokens join PaliGemma's prefix")
    if OLD and family == "gemma4_bidirectional" and "cache_implementation" in cache:
        pytest.skip("before 5.23, Gemma4's bidirectional masks do not fit a static cache")
    logits, tokens = by_hand(family, padding, schedule)
    model, batch = get_model(family), make_batch(family, padding=padding)
    model.set_attn_implementation(backend)
    with vtc.patch(model, SCHEDULES[schedule]):
        out = model.generate(**batch, **GREEDY, **cache, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=0, atol=1e-4)
    assert torch.equal(out.sequences[:, -NEW_TOKENS:], tokens)


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("family", [name for name in FITTING if name not in SHORT_WINDOWS])
def test_rows_are_those_of_eager_attention(family: str) -> None:
    """The signals against the model's own attention weights, sample by sample and unpadded."""
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("sdpa")
    SEEN.clear()
    with vtc.patch(model, EveryOther(after=(1,))), torch.no_grad():
        model(**with_positions(family, batch))
    tokens = SEEN[0]
    model.set_attn_implementation("eager")
    image = 0
    for sample, columns_of in zip(batch.samples, batch.images, strict=True):
        with torch.no_grad():
            attention = model(**sample, output_attentions=True).attentions[1][0].mean(0)  # [L, L]
        if not columns_of:
            continue
        visual = torch.cat(columns_of)
        text = torch.arange(int(visual.max()) + 1, len(attention))
        for columns in columns_of:
            n = len(columns)
            rows = attention[text][:, columns]
            close = functools.partial(torch.testing.assert_close, rtol=0, atol=2e-5)
            close(tokens.signals["instruction"][image, :n], rows.mean(0))
            close(tokens.signals["last"][image, :n], rows[-1])
            close(tokens.signals["text_to_visual"][image], attention[text][:, visual].sum(1).mean())
            close(tokens.signals["visual_to_text"][image], attention[visual][:, text].sum(1).mean())
            image += 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_transitions_are_those_of_the_modules(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("sdpa")
    SEEN.clear()
    with vtc.patch(model, EveryOther(after=(2,))), torch.no_grad():
        model(**batch)
    sums = SEEN[0].signals["transition"]
    image = 0
    for sample, columns_of in zip(batch.samples, batch.images, strict=True):
        pairs: list[tuple[Tensor, Tensor]] = []

        def listen(module: Any, args: Any, kwargs: Any, output: Any, pairs: Any = pairs) -> None:
            before = kwargs.get("hidden_states", args[0] if args else None)
            pairs.append((before, output[0] if isinstance(output, tuple) else output))

        modules = [m for layer in model.get_decoder().layers[:2] for m in (layer.self_attn, layer.mlp)]
        handles = [module.register_forward_hook(listen, with_kwargs=True) for module in modules]
        with torch.no_grad():
            model(**sample)
        for handle in handles:
            handle.remove()
        expected = sum(vtc.ops.transition_variation(before, after) for before, after in pairs)[0]
        for columns in columns_of:
            torch.testing.assert_close(sums[image, : len(columns)], expected[columns], rtol=0, atol=1e-5)
            image += 1


# ----------------------------------------------------------------------------------------------- caches, turns, beams


@pytest.mark.parametrize("family", SOME)
def test_layers_store_what_they_saw(family: str) -> None:
    model, batch = prepared(family, images_per_sample=(1,))
    n = batch["input_ids"].shape[1]
    visual = sum(map(len, batch.images[0]))
    with vtc.patch(model, EveryOther(after=(1, 2))) as p, torch.no_grad():
        cache = getattr(model(**batch, use_cache=True), CACHE)
        depth = len(model.get_decoder().layers)
        half, quarter = visual - (visual + 1) // 2, visual - ((visual + 1) // 2 + 1) // 2
        stored = [physical_length(cache, layer) for layer in range(depth)]
        assert stored == [n, n - half] + [n - quarter] * (depth - 2)
        assert [cache.get_seq_length(layer) for layer in range(depth)] == [n] * depth
        assert [after for after, _ in p.last_stages] == [0, 1, 2]
        assert sum(map(len, p.last_keep[0])) == visual - quarter
        assert p.report().tokens_per_layer[:3] == (visual, visual - half, visual - quarter)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_continues_every_layer(family: str, padding: str, kind: str) -> None:
    model, batch = prepared(family, padding=padding)
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=160)
    with vtc.patch(model, EveryOther(after=(1, 2), entry=True)):
        first = generate(model, batch, **{CACHE: cache})
        whole, text = second_turn(batch, first)
        if family == "paligemma":
            whole["token_type_ids"][:, batch["input_ids"].shape[1] :] = 1
        assert torch.equal(generate(model, text, **{CACHE: cache}), generate(model, whole))


@pytest.mark.parametrize("family", ["llava", "mistral3", "qwen2_5_vl"])
def test_a_second_turn_may_bring_an_image(family: str) -> None:
    """Each prompt loses its own tokens, in every layer; signals of the second are not compared (they see the first)."""
    model, batch = prepared(family, images_per_sample=(1,))
    _, more = prepared(family, images_per_sample=(1,), seed=5)
    joined = {
        name: torch.cat([batch[name], more[name]], 1 if batch[name].shape == batch["input_ids"].shape else 0)
        for name in batch
    }
    n = batch["input_ids"].shape[1]
    with vtc.patch(model, EveryOther(after=(1, 2), entry=True)) as p, torch.no_grad():
        positions = p.model._prepare_position_ids_for_generation(joined["input_ids"], dict(joined))
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, **{CACHE: cache}, position_ids=positions[..., :n])
        mask = torch.ones_like(joined["input_ids"])
        later = model(**more | {"attention_mask": mask}, **{CACHE: cache}, position_ids=positions[..., n:])
        at_once = model(**joined, position_ids=positions)
    torch.testing.assert_close(later.logits[:, -1], at_once.logits[:, -1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_call_after_a_cached_one_needs_no_mask() -> None:
    model, batch = prepared("llava", images_per_sample=(1, 1), padding="none")
    length = batch["input_ids"].shape[1]
    results = []
    with vtc.patch(model, EveryOther(after=(1, 2))):
        for masked in (True, False):
            cache, seen = DynamicCache(config=model.config.get_text_config()), len(SEEN)
            for turn in (1, 2):
                mask = {"attention_mask": batch["input_ids"].new_ones(2, turn * length)} if masked else {}
                inputs = {name: value for name, value in batch.items() if name != "attention_mask"} | mask
                logits = model(**inputs, **{CACHE: cache}).logits
            results.append((logits, SEEN[seen:]))
    (expected, heard), (got, also) = results
    torch.testing.assert_close(got, expected)
    assert len(heard) == len(also) == 4
    for one, other in zip(heard, also, strict=True):
        for name in one.signals:
            torch.testing.assert_close(one.signals[name], other.signals[name])


@pytest.mark.parametrize("family", SOME)
def test_beams_carry_the_state_of_every_layer(family: str) -> None:
    if OLD and family == "paligemma":
        pytest.skip("before 5.23, generated tokens join PaliGemma's bidirectional prefix when there is no cache")
    model, batch = prepared(family, images_per_sample=(1, 1, 0))
    with vtc.patch(model, EveryOther(after=(1, 2), entry=True)):
        beams = generate(model, batch, num_beams=3)
        assert torch.equal(beams, generate(model, batch, num_beams=3, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3"])
@pytest.mark.parametrize("images", [(1, 2, 0), (2,)])
def test_flash_attention_sees_the_same_inside(family: str, images: tuple[int, ...]) -> None:
    model, batch = prepared(family, images_per_sample=images)
    method = EveryOther(after=(1, 2), entry=True)
    with vtc.patch(model, method):
        expected = generate(model, batch)
    with flash_attention(model), vtc.patch(model, method):
        assert torch.equal(generate(model, batch), expected)


@pytest.mark.parametrize("family", SOME)
def test_a_sample_is_the_same_alone(family: str) -> None:
    """Ragged batch of eight: the same tokens as each sample by itself."""
    model, batch = prepared(family, images_per_sample=(1, 2, 0, 1, 0, 2, 1, 3))
    with vtc.patch(model, EveryOther(after=(1, 2), entry=True)):
        together = generate(model, batch)[:, -NEW_TOKENS:]
        alone = [generate(model, sample)[:, -NEW_TOKENS:] for sample in batch.samples]
    assert torch.equal(together, torch.cat(alone))


def test_gradients_flow_with_and_without_checkpointing() -> None:
    model, batch = prepared("llava", padding="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    with vtc.patch(model, EveryOther(after=(1,))):
        for recompute in (False, True):
            model.train()
            if recompute:
                checkpointing(model, True)
            try:
                if recompute and CHECKPOINTS_HOOKS:
                    with pytest.raises(NotImplementedError, match="tokens would leave twice"):
                        model(**batch, labels=labels)
                    return
                model(**batch, labels=labels).loss.backward()
                gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
            finally:
                model.zero_grad()
                checkpointing(model, False)
                model.eval()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


# ----------------------------------------------------------------------------------------------------------- refusals


def test_hybrid_models_are_refused() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match="linear_attention layers"):
        vtc.patch(get_model("qwen3_5"), EveryOther())


def test_compact_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions='compact' would give every layer"):
        vtc.patch(get_model("llava"), EveryOther(), positions="compact")


@pytest.mark.skipif(OLD, reason="before 5.23, models take no features encoded ahead")
def test_a_shortened_prompt_cannot_express_it() -> None:
    model, batch = prepared("llava")
    with pytest.raises(NotImplementedError, match="inside the language model"):
        vtc.compress_inputs(model, batch, EveryOther())
    with vtc.patch(model, EveryOther()), pytest.raises(NotImplementedError, match="inside the language model"):
        generate(model, batch, custom_generate=vtc.generate)
