"""Ways of generating beyond the matrix: beams, sampling, turns, compiled decoding, losses, chunks, and no hooks at all.

Each compares a patched run with another route to the same result that pruning should not change: without a cache,
from scratch instead of from a cache, or called with a hand-pruned prompt.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from flash import flash_attention
from generating import generate, prepared, second_turn
from release import CACHE, OLD, checkpointing
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from zoo import FAMILIES, NEW_TOKENS, Batch

import vtc
from vtc.dialect.caches import physical_length
from vtc.engine.lengths import slot_map

SOME = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma")
ONE_D = tuple(name for name in SOME if FAMILIES[name].one_dim)


# ------------------------------------------------------------------------------------------- decoding strategies


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("padding", ["left", "none"])
def test_sampling_does_not_depend_on_the_cache(family: str, padding: str) -> None:
    if OLD and family == "paligemma":
        pytest.skip("before 5.23, generated tokens join PaliGemma's bidirectional prefix when there is no cache")
    model, batch = prepared(family, padding=padding)
    with vtc.patch(model, "divprune", keep=0.5):
        cached = generate(model, batch, do_sample=True)
        assert torch.equal(cached, generate(model, batch, do_sample=True, use_cache=False))
        assert torch.equal(cached, generate(model, batch, do_sample=True, cache_implementation="static"))
    assert not torch.equal(cached, generate(model, batch, do_sample=True))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("images", [(1, 1, 0), (1, 2, 0)])
def test_beams_carry_their_state(family: str, images: tuple[int, ...]) -> None:
    """Beams reorder the cache: its slot map must follow, or masks of ragged rows point at other rows' tokens."""
    if OLD and (2 in images or family in ("paligemma", "internvl")):
        pytest.skip("before 5.23, unpatched beam search puts the pixels of several images or tiles in the wrong order")
    model, batch = prepared(family, images_per_sample=images)
    with vtc.patch(model, "divprune", keep=0.5) as p:
        beams = generate(model, batch, num_beams=3, num_return_sequences=2)
        assert [len(sample) for sample in p.last_keep] == [n for n in images for _ in range(3)]
        assert torch.equal(beams, generate(model, batch, num_beams=3, num_return_sequences=2, use_cache=False))


@pytest.mark.parametrize("family", SOME)
def test_assisted_decoding_is_greedy_decoding(family: str) -> None:
    """Prompt lookup verifies several candidates at once and crops the rejected ones off the pruned cache."""
    model, batch = prepared(family, images_per_sample=(2,))
    batch["input_ids"][:, -6:] = batch["input_ids"][:, -3:].repeat(1, 2)  # something to look up
    with vtc.patch(model, "divprune", keep=0.5):
        assert torch.equal(generate(model, batch), generate(model, batch, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("family", SOME)
def test_assisted_decoding_with_a_static_cache(family: str) -> None:
    """5.24 taught static caches to be cropped; before, `generate` refused them."""
    model, batch = prepared(family, images_per_sample=(2,))
    batch["input_ids"][:, -6:] = batch["input_ids"][:, -3:].repeat(1, 2)
    # One of our own: the cache that 5.24 makes from "static" has no room for the candidates of the last step.
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    with vtc.patch(model, "divprune", keep=0.5):
        expected = generate(model, batch)
        if not hasattr(StaticLayer, "crop"):
            with pytest.raises(ValueError, match="not supported with Static cache"):
                generate(model, batch, prompt_lookup_num_tokens=3, **{CACHE: cache})
            return
        assert torch.equal(generate(model, batch, prompt_lookup_num_tokens=3, **{CACHE: cache}), expected)


# ------------------------------------------------------------------------------------------------- several turns


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_continues_the_cache(family: str, padding: str, kind: str, positions: str) -> None:
    if positions == "compact" and family not in ONE_D:
        pytest.skip("3-D positions have no compact form")
    model, batch = prepared(family, padding=padding)
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=160)
    with vtc.patch(model, "divprune", keep=0.5, positions=positions):
        first = generate(model, batch, **{CACHE: cache})
        whole, text = second_turn(batch, first)
        if family == "paligemma":  # its prefix attends both ways: what comes later must be told to be suffix
            whole["token_type_ids"][:, batch["input_ids"].shape[1] :] = 1
        scratch = generate(model, whole)
        assert torch.equal(generate(model, text, **{CACHE: cache}), scratch)


@pytest.mark.parametrize("family", [name for name in SOME if name not in ("gemma3", "paligemma")])
def test_a_second_turn_may_bring_an_image(family: str) -> None:
    """Two prefills on one cache, each pruned: the same tokens as one prefill of everything."""
    model, batch = prepared(family, images_per_sample=(1,))
    _, more = prepared(family, images_per_sample=(1,), seed=5)
    with vtc.patch(model, "grid", keep=0.5) as p, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        positions = p.model._prepare_position_ids_for_generation(
            both(batch, more)["input_ids"], dict(both(batch, more))
        )
        n = batch["input_ids"].shape[1]
        model(**batch, **{CACHE: cache}, position_ids=positions[..., :n])
        mask = torch.ones_like(both(batch, more)["input_ids"])
        later = model(**more | {"attention_mask": mask}, **{CACHE: cache}, position_ids=positions[..., n:])
        at_once = model(**both(batch, more), position_ids=positions)
    torch.testing.assert_close(later.logits[:, -1], at_once.logits[:, -1], rtol=0, atol=1e-4)


def both(first: Batch, second: Batch) -> dict[str, Tensor]:
    joined = {}
    for name in first:
        dim = 1 if first[name].shape == first["input_ids"].shape else 0
        joined[name] = torch.cat([first[name], second[name]], dim)
    return joined


@pytest.mark.parametrize("family", SOME)
def test_a_loop_written_by_hand_needs_no_positions(family: str) -> None:
    """Default positions and generate's slicing both ask the cache for its length: it must answer the logical one."""
    model, batch = prepared(family, images_per_sample=(1,))
    with vtc.patch(model, "divprune", keep=0.5), torch.no_grad():
        out = model(**batch, use_cache=True)
        cache, token, tokens = getattr(out, CACHE), out.logits[:, -1:].argmax(-1), []
        dropped = slot_map(cache).removed
        assert dropped > 0
        assert cache.get_seq_length() == batch["input_ids"].shape[1] == physical_length(cache) + dropped
        if family in ONE_D and family != "paligemma":  # the last ones compute positions from more than the length
            for _ in range(3):
                out = model(input_ids=token, **{CACHE: cache})
                tokens.append(int(token))
                token = out.logits[:, -1:].argmax(-1)
            whole = torch.cat([batch["input_ids"], torch.tensor([tokens])], 1)
            extra = (
                {"token_type_ids": torch.nn.functional.pad(batch["token_type_ids"], (0, 3))}
                if "gemma" in family
                else {}
            )
            again = model(**batch | {"input_ids": whole, "attention_mask": torch.ones_like(whole)} | extra)
            torch.testing.assert_close(out.logits[:, -1], again.logits[:, -1], rtol=0, atol=1e-4)


def test_a_copied_cache_goes_its_own_way() -> None:
    """Prefix reuse: users deep-copy the cache of a shared prompt."""
    model, batch = prepared("llava")
    with vtc.patch(model, "divprune", keep=0.5):
        cache = DynamicCache(config=model.config.get_text_config())
        first = generate(model, batch, **{CACHE: cache})
        fork = copy.deepcopy(cache)
        _, text = second_turn(batch, first)
        expected = generate(model, text, **{CACHE: cache})
        assert torch.equal(generate(model, text, **{CACHE: fork}), expected)


def test_a_reset_cache_is_an_ordinary_one() -> None:
    model, batch = prepared("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    with vtc.patch(model, "divprune", keep=0.5):
        once = generate(model, batch, **{CACHE: cache})
        cache.reset()
        assert type(cache) is StaticCache
        assert slot_map(cache) is None
        assert torch.equal(generate(model, batch, **{CACHE: cache}), once)


def test_crop_refuses_to_cut_what_rows_lost_differently() -> None:
    model, batch = prepared("llava")
    with vtc.patch(model, "divprune", keep=0.5), torch.no_grad():
        cache = getattr(model(**batch, use_cache=True), CACHE)
        with pytest.raises(ValueError, match="crop would remove 40 tokens"):
            cache.crop(-40)


# ------------------------------------------------------------------------------------------------ compiled decoding


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_decoding_compiles_to_one_graph(family: str, padding: str) -> None:
    """With a static cache the decode step is traced whole (fullgraph) and once: hooks leave nothing in the graph."""
    model, batch = prepared(family, padding=padding)
    with vtc.patch(model, "divprune", keep=0.5):
        plain = generate(model, batch)
        torch._dynamo.reset()
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True
        compiled = generate(model, batch, cache_implementation="static", compile_config=config, disable_compile=False)
    assert torch.equal(plain, compiled)
    assert len(graphs) == 1, f"{len(graphs)} graphs for {NEW_TOKENS - 1} steps"


# ---------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_loss_ignores_what_was_dropped(family: str, padding: str) -> None:
    """`labels` lose the columns that the logits lost; the loss is that of the pruned prompt, its gradient exists."""
    model, batch = prepared(family, padding=padding)
    labels = batch["input_ids"].clone()
    labels[(labels < 20) | (batch["attention_mask"] == 0)] = -100
    with vtc.patch(model, "divprune", keep=0.5) as p:
        out = model(**batch, labels=labels)
        columns = p.last_columns
    total, count = 0.0, 0
    for row, (kept, own) in enumerate(zip(columns, labels, strict=True)):
        width = out.logits.shape[1]
        logits = out.logits[row, : len(kept)] if padding == "right" else out.logits[row, width - len(kept) :]
        target = own[kept][1:]
        total += torch.nn.functional.cross_entropy(logits[:-1], target, ignore_index=-100, reduction="sum").item()
        count += int((target != -100).sum())
    assert out.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_gradients_do_not_depend_on_checkpointing() -> None:
    model, batch = prepared("llava", padding="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    with vtc.patch(model, "divprune", keep=0.5):
        for recompute in (False, True):
            model.train()
            if recompute:
                checkpointing(model, True)
            model(**batch, labels=labels).loss.backward()
            gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
            model.zero_grad()
        checkpointing(model, False)
        model.eval()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


# ------------------------------------------------------------------------------------------------ embeds, flash, PEFT


def test_prompts_given_as_embeddings_are_pruned_too() -> None:
    model, batch = prepared("llava")
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {n: v for n, v in batch.items() if n != "input_ids"}
    with vtc.patch(model, "divprune", keep=0.5) as p, torch.no_grad():
        expected, keep = model(**batch).logits, p.last_keep
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, expected)
        assert [len(sample) for sample in p.last_keep] == [len(sample) for sample in keep]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3"])
@pytest.mark.parametrize("images", [(1, 2, 0), (2,)])
@pytest.mark.parametrize("cache", [{}, {"use_cache": False}])
def test_flash_attention_sees_the_same(family: str, images: tuple[int, ...], cache: dict[str, Any]) -> None:
    """A stand-in with flash attention's habits: no 4-D masks, no weights, and gaps in positions mean packing."""
    model, batch = prepared(family, images_per_sample=images)
    with vtc.patch(model, "divprune", keep=0.5) as p:
        expected, keep = generate(model, batch), p.last_keep
    with flash_attention(model), vtc.patch(model, "divprune", keep=0.5) as p:
        assert torch.equal(generate(model, batch, **cache), expected)
        assert str(p.last_keep) == str(keep)
        if len(images) == 1 and not cache:  # a later turn of several tokens is where packing would forget the cache
            whole, text = second_turn(batch, expected)
            history = getattr(generate(model, batch, return_dict_in_generate=True), CACHE)
            assert torch.equal(generate(model, text, **{CACHE: history}), generate(model, whole))


def test_switching_to_flash_attention_under_a_patch_is_refused() -> None:
    model, batch = prepared("llava")
    with (
        vtc.patch(model, "divprune", keep=0.5),
        flash_attention(model),
        pytest.raises(RuntimeError, match="switched to flash attention"),
    ):
        generate(model, batch)


# ---------------------------------------------------------------------------------------- chunks, and without hooks


needs_features = pytest.mark.skipif(OLD, reason="before 5.23, models take no features encoded ahead")


@needs_features
# A short window counts stored tokens here, but the prompt's own distances where the engine prunes prepared masks.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3_window8"])
def test_three_ways_to_prune_agree(family: str) -> None:
    """Hooks, `custom_generate=vtc.generate` (patched or not) and `compress_inputs` choose and generate the same."""
    model, batch = prepared(family)
    with vtc.patch(model, "divprune", keep=0.5) as p:
        hooked, keep = generate(model, batch), p.last_keep
        assert torch.equal(generate(model, batch, custom_generate=vtc.generate), hooked)
        assert str(p.last_keep) == str(keep)
    short = vtc.compress_inputs(model, batch, "divprune", keep=0.5)
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(generate(model, short)[:, -NEW_TOKENS:], hooked[:, -NEW_TOKENS:])
    unpatched = {"custom_generate": vtc.generate, "method": "divprune", "keep": 0.5}
    if family == "video_llava":
        with pytest.raises(ValueError, match=r"vtc\.patch\(model, \.\.\.\) before encoding"):
            generate(model, batch, **unpatched)
    else:
        assert torch.equal(generate(model, batch, **unpatched), hooked)


@needs_features
@pytest.mark.parametrize("options", [{"do_sample": True}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_generating_without_hooks_in_other_modes(options: dict[str, Any], positions: str) -> None:
    model, batch = prepared("llava_next")
    with vtc.patch(model, "divprune", keep=0.5, positions=positions):
        hooked = generate(model, batch, **options)
        assert torch.equal(generate(model, batch, custom_generate=vtc.generate, **options), hooked)


@needs_features
def test_beams_without_hooks() -> None:
    model, batch = prepared("llava_next")
    with vtc.patch(model, "divprune", keep=0.5):
        options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
        hooked = generate(model, batch, **options).sequences
        assert torch.equal(generate(model, batch, custom_generate=vtc.generate, **options).sequences, hooked)


@needs_features
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_chunked_prefill(family: str) -> None:
    """Refused with hooks, which would select inside a chunk; right without them, where selection saw whole images."""
    model, batch = prepared(family)
    with vtc.patch(model, "divprune", keep=0.5):
        expected = generate(model, batch)
        with pytest.raises(NotImplementedError, match="prefill_chunk_size=7"):
            generate(model, batch, prefill_chunk_size=7)
        chunked = generate(model, batch, prefill_chunk_size=7, custom_generate=vtc.generate)
    assert torch.equal(chunked, expected)


@pytest.mark.skipif(not OLD, reason="from 5.23 on, models take features encoded ahead")
def test_older_releases_say_why_hooks_are_needed() -> None:
    model, batch = prepared("llava")
    assert "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters
    with pytest.raises(NotImplementedError, match=r"use vtc\.patch"):
        vtc.compress_inputs(model, batch, "divprune", keep=0.5)


def test_decoding_modes_without_hooks_are_named_when_refused() -> None:
    if OLD:
        pytest.skip("before 5.23, models take no features encoded ahead")
    model, batch = prepared("llava")
    with pytest.raises(ValueError, match="give a method"):
        generate(model, batch, custom_generate=vtc.generate)
    with vtc.patch(model, "divprune"), pytest.raises(ValueError, match="leave the method out"):
        generate(model, batch, custom_generate=vtc.generate, method="grid")
