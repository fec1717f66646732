"""Bad input: a clear error that carries the offending value and says what would work.

That nothing was touched by then is invariant 8, in test_invariants.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from zoo import FAMILIES, GREEDY, PLACEHOLDERS, Batch, get_model, make_batch
from zoo.parts import FIRST_TEXT

import vtc

SHORT = GREEDY | {"min_new_tokens": 2, "max_new_tokens": 2}
SUPPORTED = ["Supported:", "llava_next", "qwen2_5_vl", "@vtc.register_model"]


NEW = "mm_encoder_outputs" in inspect.signature(tf.LlavaModel.forward).parameters
TAKES_FEATURES = pytest.mark.skipif(not NEW, reason="vtc.compress_inputs needs a transformers with mm_encoder_outputs")


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"a {type(caught.value).__name__} where a {error.__name__} is promised"
    return str(caught.value)


def assert_says(text: str, *words: str) -> None:
    assert [word for word in words if word not in text] == [], text


@functools.cache
def batch_of(family: str, images: tuple[int, ...] = (1, 2, 0)) -> Batch:
    return make_batch(family, images)


@pytest.fixture
def llava() -> Iterator[Any]:
    """The shared model; a test that leaves it patched is itself wrong."""
    model = get_model("llava")
    yield model
    left = [vtc.handle.patch_of(part) for part in (model, model.model)]
    for patch in left:
        if patch is not None and patch.active:
            patch.unpatch()  # other tests need not fail with this one
    assert left == [None, None]


# ----------------------------------------------------------------------------------------------------- keep and options

FRACTION, COUNT = "as a float is the fraction kept and must lie in (0, 1]", "must be at least 1"
EITHER = "give a float in (0, 1] (a fraction) or an int >= 1 (tokens per image)"


@pytest.mark.parametrize(
    ("keep", "error", "words"),
    [
        (0, ValueError, ["keep=0", COUNT]),
        (-2, ValueError, ["keep=-2", COUNT]),
        (0.0, ValueError, ["keep=0.0", FRACTION]),
        (-0.25, ValueError, ["keep=-0.25", FRACTION]),
        (math.nan, ValueError, ["keep=nan", FRACTION]),
        (math.inf, ValueError, ["keep=inf", FRACTION]),
        (1.25, ValueError, ["keep=1.25", FRACTION, "keep=1"]),
        (64.0, ValueError, ["keep=64.0", FRACTION, "write keep=64"]),
        (True, TypeError, ["keep=True", EITHER]),
        ("0.5", TypeError, ["keep='0.5'", EITHER]),
        ([0.5], TypeError, ["keep=[0.5]", EITHER]),
    ],
)
@pytest.mark.parametrize("way", ["name", "object", "config", pytest.param("compress_inputs", marks=TAKES_FEATURES)])
def test_bad_keep(llava: Any, way: str, keep: Any, error: type[Exception], words: list[str]) -> None:
    ways: dict[str, Callable[[], Any]] = {
        "name": lambda: vtc.patch(llava, "divprune", keep=keep),
        "object": lambda: vtc.patch(llava, vtc.DivPrune(keep=keep)),
        "config": lambda: vtc.patch(llava, vtc.CompressionConfig("divprune", {"keep": keep})),
        "compress_inputs": lambda: vtc.compress_inputs(llava, batch_of("llava"), "divprune", keep=keep),
    }
    assert_says(message(error, ways[way]), *words)


@pytest.mark.parametrize("family", ["llava", "llava_pixtral", "qwen3_vl"])
def test_more_than_an_image_has_keeps_all_with_a_warning(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    sizes = [[len(columns) for columns in images] for images in batch.images]
    unpruned = model(**batch).logits
    largest = max(size for images in sizes for size in images)
    with vtc.patch(model, "divprune", keep=largest + 1) as patch:
        with pytest.warns(UserWarning, match=rf"keep={largest + 1} is more than the \d+ visual tokens"):
            logits = model(**batch).logits
        assert [[len(kept) for kept in images] for images in patch.last_keep] == sizes
    assert torch.equal(logits, unpruned)


def test_more_than_one_of_the_images_has_prunes_the_others() -> None:
    """Pixtral images of 8, 12 and 9 tokens: keep=9 warns of the first and prunes the second."""
    model, batch = get_model("llava_pixtral"), batch_of("llava_pixtral")
    with vtc.patch(model, "grid", keep=9) as patch:
        with pytest.warns(UserWarning, match="keep=9 is more than the 8 visual tokens"):
            model(**batch)
        assert [[len(kept) for kept in images] for images in patch.last_keep] == [[8], [9, 9], []]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divprun", ["'divprun'", "did you mean", "'divprune'"]),
        ("DivPrune", ["'DivPrune'", "did you mean", "'divprune'"]),
        ("ToDER", ["'ToDER'", "did you mean", "'todre'"]),
        ("xyzzy", ["'xyzzy'", "known:", "divprune", "grid", "random", "todre"]),
        ("", ["''", "known:", "divprune"]),
    ],
)
def test_unknown_method(llava: Any, name: str, words: list[str]) -> None:
    assert_says(message(ValueError, lambda: vtc.patch(llava, name, keep=0.5)), "unknown method", *words)


@pytest.mark.parametrize("method", [None, 5, vtc.DivPrune, {"method": "divprune"}])
def test_what_is_no_method(llava: Any, method: Any) -> None:
    text = message(TypeError, lambda: vtc.patch(llava, method))
    assert_says(text, repr(method), "vtc.Method", "vtc.CompressionConfig")


@pytest.mark.parametrize("method", [vtc.DivPrune(), vtc.CompressionConfig("random")])
@pytest.mark.parametrize("options", [{"keep": 0.5}, {"seed": 3}, {"keep": 0.5, "seed": 3}])
def test_options_beside_an_object(llava: Any, method: Any, options: dict[str, Any]) -> None:
    text = message(TypeError, lambda: vtc.patch(llava, method, **options))
    assert_says(text, type(method).__name__, "carries its own", *options)


def test_unknown_option(llava: Any) -> None:
    text = message(TypeError, lambda: vtc.patch(llava, "divprune", keep=0.5, pivot="cls"))
    assert_says(text, "divprune has no option 'pivot'", "its options: keep, newlines")


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("todre", {"variant": "sum"}, ["variant='sum'", "'max_sum'", "'k_center'"]),
        ("todre", {"pivot": "centre"}, ["pivot='centre'", "'cls'", "'random'"]),
        ("grid", {"newlines": "drop"}, ["newlines='drop'", "'candidates'", "'keep'"]),
        ("grid", {"positions": "packed"}, ["positions='packed'", "'original'", "'compact'"]),
    ],
)
def test_bad_choice(llava: Any, method: str, options: dict[str, Any], words: list[str]) -> None:
    assert_says(message(ValueError, lambda: vtc.patch(llava, method, **options)), *words)


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"version": 2, "method": "divprune"}, ["version 2", "newer than 1", "update vtc"]),
        ({"version": 99, "method": "unheard", "novelty": []}, ["version 99", "newer than 1", "update vtc"]),
        ({"version": 1, "method": "divprun"}, ["'divprun'", "did you mean 'divprune'"]),
        ({"version": 1, "method": "grid", "options": {"seed": 1}}, ["'seed'", "known: keep, newlines"]),
        ({"version": 1, "method": "grid", "options": {"keep": 0}}, ["keep=0", COUNT]),
        ({"version": 1, "method": "grid", "positions": "packed"}, ["'packed'", "'original'"]),
    ],
)
def test_bad_config_file(llava: Any, data: dict[str, Any], words: list[str], tmp_path: Any) -> None:
    path = tmp_path / vtc.CompressionConfig.FILE_NAME
    path.write_text(json.dumps(data))
    text = message(ValueError, lambda: vtc.patch(llava, vtc.CompressionConfig.from_pretrained(tmp_path)))
    assert_says(text, str(path), *words)


# --------------------------------------------------------------------------------------------------------------- models

TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def llama4() -> nn.Module:
    text = TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 16, "pad_token_id": 0, "head_dim": 8}
    vision = VISION | {"num_attention_heads": 2, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    return tf.Llama4ForConditionalGeneration(tf.Llama4Config(text_config=text, vision_config=vision))


def mllama() -> nn.Module:
    text = TEXT | {"num_key_value_heads": 2, "cross_attention_layers": [0], "pad_token_id": 0}
    vision = VISION | {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return tf.MllamaForConditionalGeneration(tf.MllamaConfig(text_config=text, vision_config=vision))


def text_only() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))


def encoder_decoder() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1))


def plain_module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (llama4, ["'llama4'", "fixed chunks of positions"]),
        (mllama, ["'mllama'", "cross-attention"]),
        (text_only, ["LlamaForCausalLM", "'llama'", "does not encode images"]),
        (encoder_decoder, ["'t5'", "does not encode images"]),
        (plain_module, ["Sequential", "not a transformers PreTrainedModel"]),
        (object, ["object", "not a torch.nn.Module"]),
    ],
)
@pytest.mark.parametrize("call", [vtc.patch, lambda m, name: vtc.compress_inputs(m, {}, name)], ids=["patch", "inputs"])
def test_model_without_an_adapter(build: Callable[[], Any], words: list[str], call: Callable[..., Any]) -> None:
    with torch.device("meta"):  # no weight is needed to refuse a model
        model = build()
    text = message(vtc.UnsupportedModelError, lambda: call(model, "divprune"))
    assert_says(text, "cannot be pruned", *words, *SUPPORTED)


def test_an_unsupported_model_is_a_value_error() -> None:
    assert issubclass(vtc.UnsupportedModelError, ValueError)


WITHOUT_CLS = ["llava_onevision", "paligemma", "gemma3", "smolvlm", "qwen2_vl", "qwen3_vl", "llava_pixtral", "mistral3"]


@pytest.mark.parametrize("family", WITHOUT_CLS)
def test_method_that_needs_a_cls_token(family: str) -> None:
    model = get_model(family)
    text = message(ValueError, lambda: vtc.patch(model, "todre", keep=0.5))
    assert_says(text, "'todre'", "'cls'", type(model).__name__, 'ToDRE(pivot="random")')
    with vtc.patch(model, vtc.ToDRE(keep=0.5, pivot="random")) as patch:  # what the message says works
        model(**batch_of(family))
        assert patch.last_keep


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm46v"])
def test_compact_positions_in_3d(family: str) -> None:
    text = message(ValueError, lambda: vtc.patch(get_model(family), "grid", positions="compact"))
    assert_says(text, "positions='compact'", "(time, height, width)", "positions='original'")


@pytest.mark.parametrize("build", ["gemma3", "paligemma", "gemma4"])
def test_flex_attention_where_masks_are_prepared_early(build: str) -> None:
    model = FAMILIES[build].build()
    model.set_attn_implementation({"text_config": "flex_attention"})
    text = message(vtc.UnsupportedModelError, lambda: vtc.patch(model, "grid"))
    assert_says(text, type(model).__name__, "flex_attention", "'sdpa'", "'eager'", "'flash_attention_2'")


# ------------------------------------------------------------------------------------------------- twice, or not at all


def test_patching_twice(llava: Any) -> None:
    with vtc.patch(llava, "divprune", keep=0.5) as patch:
        for model in (llava, llava.model):  # the base model shares the modules that were patched
            text = message(ValueError, functools.partial(vtc.patch, model, "grid"))
            assert_says(text, "patched already", "DivPrune(keep=0.5", "vtc.unpatch(model) first")
        assert patch.active
        text = message(ValueError, lambda: vtc.compress_inputs(llava, batch_of("llava"), "grid"))
        assert_says(text, "is patched", "vtc.unpatch(model)")


def test_patching_the_root_after_its_base(llava: Any) -> None:
    with vtc.patch(llava.model, "divprune", keep=0.5):
        text = message(ValueError, lambda: vtc.patch(llava, "grid"))
        assert_says(text, "patched already", "vtc.unpatch(model) first")


def test_unpatching_what_is_not_patched(llava: Any) -> None:
    words = [type(llava).__name__, "is not patched", "nothing to undo"]
    assert_says(message(ValueError, lambda: vtc.unpatch(llava)), *words)
    patch = vtc.patch(llava, "grid")
    vtc.unpatch(llava)
    assert_says(message(ValueError, lambda: vtc.unpatch(llava)), *words)
    assert_says(message(ValueError, patch.unpatch), *words)
    assert not patch.active


@pytest.mark.parametrize("model", [nn.Linear(2, 2), object(), None], ids=["module", "object", "None"])
def test_unpatching_what_could_not_be_patched(model: Any) -> None:
    assert_says(message(ValueError, lambda: vtc.unpatch(model)), type(model).__name__, "is not patched")


def test_a_with_block_whose_patch_is_gone_already_ends_in_peace(llava: Any) -> None:
    with vtc.patch(llava, "grid"):
        vtc.unpatch(llava)


# ---------------------------------------------------------------------------------------------- ways of running a model


def test_generate_batch(llava: Any) -> None:
    with vtc.patch(llava, "grid"):
        text = message(NotImplementedError, lambda: llava.generate_batch([[3, 4, 5]]))
    assert_says(text, "generate_batch", "paged cache", "generate()", "vtc.unpatch(model)")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next_video", "glm46v_video"])
def test_chunked_prefill_of_an_image(family: str) -> None:
    model = get_model(family)
    with vtc.patch(model, "grid"):
        text = message(NotImplementedError, lambda: model.generate(**batch_of(family), **SHORT, prefill_chunk_size=8))
    assert_says(text, "prefill_chunk_size=8", "custom_generate=vtc.generate", "leave prefill_chunk_size out")


def test_chunked_prefill_of_text_is_none_of_our_business(llava: Any) -> None:
    sample = batch_of("llava").samples[2]
    expected = llava.generate(**sample, **SHORT)
    with vtc.patch(llava, "grid"):
        assert torch.equal(llava.generate(**sample, **SHORT, prefill_chunk_size=8), expected)


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.model], ids=["root", "base"])
def test_deepcopy_of_a_patched_model(llava: Any, part: Callable[[Any], Any]) -> None:
    with vtc.patch(llava, "grid"):
        text = message(TypeError, lambda: copy.deepcopy(part(llava)))
    assert_says(text, "cannot be copied", "vtc.unpatch it first")
    copy.deepcopy(part(llava))


# ------------------------------------------------------------------------------------------------- poisoned features

PROJECTORS = {"llava": 1, "internvl": 1, "llava_next": 3}
"""Families with a `multi_modal_projector`, and how many pictures their first image was cut into."""
POISONS = {"nan": math.nan, "zero": 0.0, "inf": math.inf}
METHODS = [
    vtc.DivPrune(keep=0.4),
    vtc.ToDRE(keep=0.4, pivot="random"),
    vtc.ToDRE(keep=0.4, pivot="random", variant="k_center"),
    vtc.Random(keep=0.4),
    vtc.Grid(keep=0.4),
]


@contextmanager
def poisoned(model: Any, pictures: int, value: float, tokens: slice) -> Iterator[None]:
    """Overwrite the projected features of the first image."""

    def poison(module: nn.Module, args: Any, features: Tensor) -> Tensor:
        features = features.clone()
        features[:pictures, tokens] = value
        return features

    hook = model.model.multi_modal_projector.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def keep_sets(model: Any, batch: Batch, method: vtc.Method) -> tuple[list[list[list[int]]], Tensor]:
    with vtc.patch(model, method) as patch:
        logits = model(**batch).logits[:, -1]
        return [[kept.tolist() for kept in images] for images in patch.last_keep], logits


@pytest.mark.parametrize("tokens", [slice(None), slice(2, 7)], ids=["all", "some"])
@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize("family", PROJECTORS)
def test_poisoned_features_are_pruned_all_the_same(family: str, value: float, tokens: slice) -> None:
    model, batch = get_model(family), batch_of(family)
    for method in METHODS:
        clean, clean_logits = keep_sets(model, batch, method)
        with poisoned(model, PROJECTORS[family], value, tokens):
            sets, logits = keep_sets(model, batch, method)
            again, _ = keep_sets(model, batch, method)
        assert sets == again, f"{method} is not deterministic"
        assert [len(kept) for kept in sets[0]] == [len(kept) for kept in clean[0]]
        assert all(sorted(set(kept)) == kept for kept in sets[0]), "not ascending, or picked twice"
        assert sets[1:] == clean[1:], "poison reached the other samples"
        torch.testing.assert_close(logits[1:], clean_logits[1:], rtol=0, atol=1e-5)
        if value == 0.0:
            assert logits.isfinite().all()


def test_all_zero_features_keep_the_first_tokens() -> None:
    """Every cosine is 0, and ties go to the lowest index."""
    model, batch = get_model("llava"), batch_of("llava")
    with poisoned(model, 3, 0.0, slice(None)):
        assert keep_sets(model, batch, vtc.DivPrune(keep=5))[0] == [[[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]] * 2, []]


def test_nan_tokens_are_no_reason_for_nan_elsewhere() -> None:
    """One NaN token: the others are chosen by their distances as if it were not there, and NaN does not win them all.

    Among 16 tokens the NaN one counts as a zero row, cosine 0 to all: as far away as a token at a right angle.
    """
    model, batch = get_model("llava"), batch_of("llava", (1,))
    with poisoned(model, 1, math.nan, slice(3, 4)):
        nan, _ = keep_sets(model, batch, vtc.DivPrune(keep=6))
    with poisoned(model, 1, 0.0, slice(3, 4)):
        zero, _ = keep_sets(model, batch, vtc.DivPrune(keep=6))
    assert nan == zero


# ---------------------------------------------------------------------------------- placeholders that match no image


def one_too_few(batch: Batch) -> dict[str, Tensor]:
    ids = batch["input_ids"].clone()
    row, column = (torch.isin(ids, torch.tensor(PLACEHOLDERS))).nonzero()[0]
    ids[row, column] = FIRST_TEXT
    return {**batch, "input_ids": ids}


def one_too_many(batch: Batch) -> dict[str, Tensor]:
    ids = batch["input_ids"].clone()
    ids[0, -2] = ids[0][torch.isin(ids[0], torch.tensor(PLACEHOLDERS))][0]
    return {**batch, "input_ids": ids}


def no_placeholders(batch: Batch) -> dict[str, Tensor]:
    ids = batch["input_ids"]
    ids = ids.masked_fill(torch.isin(ids, torch.tensor(PLACEHOLDERS)), FIRST_TEXT)
    return {**batch, "input_ids": ids}


def no_pixels(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if not name.startswith("pixel_values")}


@torch.no_grad()
def outcome(model: Any, inputs: dict[str, Tensor], way: str) -> Any:
    """What comes out, be it logits or an error."""
    try:
        return model(**inputs).logits if way == "forward" else model.generate(**inputs, **SHORT)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore:this prompt has image placeholders, but no image")
@pytest.mark.parametrize("spoil", [one_too_few, one_too_many, no_placeholders, no_pixels], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_complaint_about_placeholders(family: str, spoil: Callable[[Batch], Any]) -> None:
    if family == "idefics3" and spoil is one_too_few and not NEW:
        pytest.skip("this transformers does not complain")
    model, inputs = get_model(family), spoil(batch_of(family))
    for way in ("forward", "generate") if spoil is one_too_few else ("forward",):
        expected = outcome(model, inputs, way)
        with vtc.patch(model, "divprune", keep=0.5):
            patched = outcome(model, inputs, way)
        if isinstance(expected, tuple):
            assert patched == expected
        else:  # nothing to complain about, and nothing that could be pruned
            assert isinstance(patched, Tensor), patched
            assert torch.equal(patched, expected)
    if spoil in (one_too_few, one_too_many):
        assert isinstance(expected, tuple), "the zoo's prompt was not spoilt"
