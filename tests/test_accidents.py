"""Accidents of real client software: shared modules, threads, interrupts, caches that outlive their patch, pickles,
attributes set under a patch, rules that count from the prompt, malformed inputs.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from release import CACHE
from torch import nn
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from zoo import GREEDY, NEW_TOKENS, get_model, make_batch, models

import vtc
from vtc import handle as handles
from vtc import installing

AHEAD = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="from 5.23 on, models take features encoded ahead",
)


def prompt(family: str = "llava", **options: Any) -> Any:
    return make_batch(family, **{"images_per_sample": (1, 2), **options})


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a patch could leave: hooks and instance attributes of every module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    hooks += ("_forward_hooks_always_called",)
    return {
        name: ([list(getattr(module, kind)) for kind in hooks], sorted(vars(module)))
        for name, module in model.named_modules()
    }


# ------------------------------------------------------------------------------------------------------- shared modules


def test_two_patched_models_that_share_a_language_model() -> None:
    one, other = models.llava(), models.llava()
    other.model.language_model = one.model.language_model
    batch = prompt()
    with vtc.patch(one, "grid", keep=0.5) as first:
        expected, kept = one.generate(**batch, **GREEDY), str(first.last_keep)
        with vtc.patch(other, "divprune", keep=3) as second:
            assert torch.equal(one.generate(**batch, **GREEDY), expected)
            assert str(first.last_keep) == kept
            assert second.last_keep is None
            other.generate(**batch, **GREEDY)
            assert [len(k) for images in second.last_keep or [] for k in images] == [3, 3, 3]
            assert str(first.last_keep) == kept


def test_two_patched_models_that_share_a_tower() -> None:
    one, other = models.llava(), models.llava()
    other.model.vision_tower = one.model.vision_tower
    batch = prompt()
    with vtc.patch(one, vtc.ToDRE(keep=0.5)) as first:
        one.generate(**batch, **GREEDY)
        kept = str(first.last_keep)
        with vtc.patch(other, vtc.ToDRE(keep=0.25)) as second:
            one.generate(**batch, **GREEDY)
            assert str(first.last_keep) == kept
            other.generate(**batch, **GREEDY)
            assert str(second.last_keep) != kept


# -------------------------------------------------------------------------------------------------------------- threads


def test_threads_on_one_patched_model() -> None:
    """8 threads, 50 generates each: every answer is that of the prompt alone."""
    model = get_model("llava")
    prompts = [prompt(images_per_sample=(n,), seed=seed) for n, seed in ((1, 0), (2, 1), (1, 2), (0, 3))]
    short = GREEDY | {"min_new_tokens": 2, "max_new_tokens": 2}
    with vtc.patch(model, "grid", keep=0.5):
        expected = [model.generate(**p, **short) for p in prompts]
        wrong: list[Any] = []

        def work(seed: int) -> None:
            for turn in range(50):
                which = (seed + turn) % len(prompts)
                if not torch.equal(model.generate(**prompts[which], **short), expected[which]):
                    wrong.append((seed, turn))

        run_all([lambda s=s: work(s) for s in range(8)])
    assert wrong == []


@AHEAD
@pytest.mark.parametrize("method", [vtc.DivPrune(keep=0.5), vtc.ToDRE(keep=0.5)], ids=["plain", "cls"])
def test_compress_inputs_beside_generate(method: vtc.Method) -> None:
    """It patches nothing: who generates meanwhile is not pruned, and two may compress at once."""
    model, batch = models.llava(), prompt()
    whole = model.generate(**batch, **GREEDY)
    with vtc.patch(model, method):
        pruned = model.generate(**batch, **GREEDY)[:, -NEW_TOKENS:]
    before, wrong = traces(model), []

    def generates() -> None:
        for _ in range(10):
            if not torch.equal(model.generate(**batch, **GREEDY), whole):
                wrong.append("generate was pruned")

    def compresses() -> None:
        for _ in range(10):
            short = vtc.compress_inputs(model, batch, method)
            if not torch.equal(model.generate(**short, **GREEDY)[:, -NEW_TOKENS:], pruned):
                wrong.append("compress_inputs was wrong")

    run_all([generates, compresses, compresses])
    assert wrong == []
    assert traces(model) == before


def run_all(jobs: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ----------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("at", ["vision_tower", "language_model", "layers"])
def test_an_interrupt_in_a_forward_leaves_nothing_behind(at: str) -> None:
    """Afterwards the language model alone is not pruned, although the ids of the prompt were seen."""
    model, batch = get_model("llava"), prompt()
    decoder = model.get_decoder()
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    module = decoder.layers[1] if at == "layers" else getattr(model.model, at)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for method in (vtc.Grid(keep=0.5), vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3))):
        expected = decoder(inputs_embeds=embeds).last_hidden_state
        with vtc.patch(model, method):
            tokens = model.generate(**batch, **GREEDY)
            hook = module.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**batch)
            hook.remove()
            assert torch.equal(decoder(inputs_embeds=embeds).last_hidden_state, expected)
            assert torch.equal(model.generate(**batch, **GREEDY), tokens)


def interrupted(call: Callable[[], Any], after: int) -> bool:
    """Run it, with a KeyboardInterrupt at a line of vtc/installing.py or of the handle; whether it came to that."""
    left = after

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (installing.__file__, handles.__file__):
            return trace if event == "call" and "torch" not in frame.f_code.co_filename else None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("method", [vtc.ToDRE(keep=0.5), vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3))], ids=str)
def test_an_interrupt_at_any_line_of_patch_or_unpatch(method: vtc.Method) -> None:
    """What is left is nothing, or a model that vtc.unpatch makes whole."""
    model = models.llava()
    clean, points = traces(model), 0
    for at in range(1, 2000, 3):
        if not interrupted(lambda: vtc.patch(model, method), at):
            vtc.unpatch(model)
            break
        points += 1
        if handles.patch_of(model) is not None:
            vtc.unpatch(model)
        assert traces(model) == clean, f"patch, interrupted at line event {at}"
    for at in range(1, 2000, 3):
        handle = vtc.patch(model, method)
        if not interrupted(handle.unpatch, at):
            break
        points += 1
        if handle.active:
            handle.unpatch()
        assert traces(model) == clean, f"unpatch, interrupted at line event {at}"
    assert points > 50


# ------------------------------------------------------------------------------------------ caches that outlive a patch


def pruned_cache(model: Any, batch: Any) -> Any:
    with vtc.patch(model, "grid", keep=0.5):
        return getattr(model(**batch), CACHE)


def test_a_pruned_cache_refuses_a_model_without_its_patch() -> None:
    model, batch = get_model("llava"), prompt()
    cache = pruned_cache(model, batch)
    token = torch.full((2, 1), 50)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    refused = pytest.raises(
        RuntimeError, match=r"this cache was pruned: it stands for \d+ tokens of a prompt and holds"
    )
    with refused:
        model(input_ids=token, attention_mask=mask, **{CACHE: cache})
    with vtc.patch(model, "grid", keep=0.5), refused:  # another patch of the same method is another patch
        model(input_ids=token, attention_mask=mask, **{CACHE: cache})
    with refused:
        model.generate(
            torch.cat([batch["input_ids"], token], 1), attention_mask=mask, max_new_tokens=1, **{CACHE: cache}
        )


@pytest.mark.parametrize("saved", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pruned_cache_can_be_saved_and_goes_on(saved: Any) -> None:
    model, batch = get_model("llava"), prompt()
    token = torch.full((2, 1), 50)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with vtc.patch(model, "grid", keep=0.5), torch.no_grad():
        cache = getattr(model(**batch), CACHE)
        if saved is None:
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            again = torch.load(file, weights_only=False)
        else:
            again = pickle.loads(saved(cache))
        branch = copy.deepcopy(cache)
        logits = [model(input_ids=token, attention_mask=mask, **{CACHE: c}).logits for c in (cache, again, branch)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_patched_model_says_why_it_cannot_be_pickled() -> None:
    model = models.llava()
    with vtc.patch(model, "grid", keep=0.5):
        for call in (pickle.dumps, lambda m: torch.save(m, io.BytesIO()), lambda m: pickle.dumps(m.model)):
            with pytest.raises(TypeError, match=r"cannot be pickled.*vtc.unpatch it first"):
                call(model)
    torch.save(model, io.BytesIO())


# --------------------------------------------------------------------------------------------- attributes under a patch


def test_what_the_user_set_under_a_patch_stays() -> None:
    model, batch = models.llava(), prompt()
    whole = model.generate(**batch, **GREEDY)
    patch = vtc.patch(model, "grid", keep=0.5)
    real, calls = model.prepare_inputs_for_generation, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    counting.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    model.prepare_inputs_for_generation = counting
    loss = model.loss_function = lambda **kwargs: torch.zeros(())
    patch.unpatch()
    assert model.prepare_inputs_for_generation is counting
    assert model.loss_function is loss
    assert torch.equal(model.generate(**batch, **GREEDY), whole)  # what it wraps has become the original
    assert calls


def test_continuous_batching_is_refused_at_every_entrance() -> None:
    model = get_model("llava")
    with vtc.patch(model, "grid", keep=0.5):
        for call in (lambda: model.init_continuous_batching(), lambda: model.generate_batch(inputs=[[1, 2]])):
            with pytest.raises(NotImplementedError, match="continuous batching"):
                call()


# -------------------------------------------------------------------------------------------------- rules with a prompt


class Seen(LogitsProcessor):
    """Forbids every token that stands in the prompt, and remembers what it was shown."""

    def __init__(self, length: int) -> None:
        self.length, self.shown = length, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append(input_ids.clone())
        return scores.scatter(1, input_ids[:, : self.length], -torch.inf)


class Long(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


RULES: dict[str, dict[str, Any]] = {
    "decay": {"exponential_decay_length_penalty": (2, 1.9)},
    "repetition": {"repetition_penalty": 1.7},
    "encoder repetition": {"encoder_repetition_penalty": 0.6},
    "no repeats": {"no_repeat_ngram_size": 1},
    "length": {"max_length": 60},
}


@AHEAD
@pytest.mark.parametrize("rule", [*RULES, "processor", "criterion", "beams"])
def test_rules_see_the_prompt_that_was_written(rule: str) -> None:
    model, batch = get_model("llava"), prompt()
    width = batch["input_ids"].shape[1]
    base = {n: v for n, v in GREEDY.items() if n not in ("min_new_tokens", "max_new_tokens")} | {"max_new_tokens": 8}
    seen = Seen(width)
    rules: dict[str, Any] = RULES.get(rule, {})
    if rule in ("processor", "beams"):
        rules = {"logits_processor": LogitsProcessorList([seen])} | ({"num_beams": 3} if rule == "beams" else {})
    elif rule == "criterion":
        rules = {"stopping_criteria": StoppingCriteriaList([Long(width + 3)])}
    elif rule == "length":
        base.pop("max_new_tokens")
        rules = {"max_length": width + 4}
    with vtc.patch(model, "grid", keep=0.5):
        hooked = model.generate(**batch, **base, **rules)
    seen.shown.clear()
    free = model.generate(**batch, **base, **rules, custom_generate=vtc.generate, method="grid", keep=0.5)
    assert torch.equal(free, hooked)
    for shown in seen.shown:
        rows = batch["input_ids"].repeat_interleave(len(shown) // 2, 0)
        assert torch.equal(shown[:, :width], rows)
    assert bool(seen.shown) == (rule in ("processor", "beams"))


# ------------------------------------------------------------------------------------------ images that cannot be found


def test_embeddings_with_images_merged_are_warned_about_once() -> None:
    model, batch = get_model("llava"), prompt(images_per_sample=(1,), padding="none")
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    whole = model(**batch).logits
    hook.remove()
    with vtc.patch(model, "grid", keep=0.5), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.allclose(model(inputs_embeds=seen["inputs_embeds"]).logits, whole, atol=1e-5)
    assert len([w for w in heard if "images that were merged" in str(w.message)]) == 1


def test_a_forward_that_passes_the_base_model_by_is_warned_about() -> None:
    class Own(transformers.LlavaForConditionalGeneration):
        def forward(self, input_ids: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
            features = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
            embeds = self.get_input_embeddings()(input_ids)
            where = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, torch.cat(list(features)).to(embeds))
            return self.model.language_model(inputs_embeds=embeds)

    model, batch = models.llava(), prompt(images_per_sample=(1,), padding="none")
    model.__class__ = Own
    with (
        vtc.patch(model, "grid", keep=0.5),
        pytest.warns(UserWarning, match="calls its language model without LlavaModel"),
    ):
        model(batch["input_ids"], batch["pixel_values"])


# ----------------------------------------------------------------------------------------------------- malformed inputs


@AHEAD
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "inputs need token ids"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, "inputs need token ids"),
        ({"input_ids": torch.zeros(1, 5)}, "inputs need token ids"),
        ({"input_ids": [[1, 2]]}, "inputs need token ids"),
        ({"attention_mask": torch.ones(3)}, "the attention mask must be"),
        ({"position_ids": torch.ones(1, 3, dtype=torch.long)}, "position ids must have"),
        ({"pixel_values": None}, "placeholders for image and nothing to fill them"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_compress_inputs_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    model, batch = get_model("llava"), prompt()
    inputs = {name: value for name, value in {**batch, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        vtc.compress_inputs(model, inputs, "grid", keep=0.5)


@AHEAD
def test_compress_inputs_takes_what_was_encoded_ahead() -> None:
    model, batch = get_model("llava"), prompt()
    expected = vtc.compress_inputs(model, batch, "grid", keep=0.5)
    with torch.no_grad():
        output = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    short = vtc.compress_inputs(model, inputs | {"mm_encoder_outputs": {"image": output}}, "grid", keep=0.5)
    assert torch.equal(short["input_ids"], expected["input_ids"])
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]


@AHEAD
def test_labels_in_the_holes_of_compressed_inputs_are_ignored() -> None:
    model, batch = get_model("llava"), prompt(padding="right")
    inputs = {**batch, "labels": batch["input_ids"].clone()}
    short = vtc.compress_inputs(model, inputs, "grid", keep=0.5)
    assert short["labels"].shape == short["input_ids"].shape
    assert (short["labels"][short["attention_mask"] == 0] == -100).all()
    assert (short["labels"][short["attention_mask"] == 1] != -100).all()


def test_a_stray_video_token_beside_images() -> None:
    """Qwen3-VL adds features to early layers for every visual column, which a stray token is not."""
    model, batch = get_model("qwen3_vl"), make_batch("qwen3_vl", images_per_sample=(1,))
    batch["input_ids"][0, -2] = model.config.video_token_id
    with torch.no_grad():
        try:
            whole = model(**batch).logits
        except Exception as error:
            pytest.skip(f"the unpatched model refuses it: {error}")
        with vtc.patch(model, "grid", keep=0.5) as patch:
            logits = model(**batch).logits
            assert len((patch.last_keep or [[]])[0]) == 1
    assert logits.shape[1] < whole.shape[1]


# ----------------------------------------------------------------------------------------------------------------- fuzz


def test_random_calls_of_the_public_entrances() -> None:
    """3,000 calls with arguments that make no sense: an error that says so, and never half a patch."""
    model, batch = models.llava(), prompt(images_per_sample=(1,))
    model(**batch)  # transformers installs hooks of its own the first time
    clean = traces(model)
    rng = torch.Generator().manual_seed(0)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=rng))]

    allowed = (ValueError, TypeError, NotImplementedError)
    raw = []
    for turn in range(3000):
        method = pick(
            "divprune", "grid", "todre", "nonsense", "", None, 3, vtc.Grid(keep=0.5), vtc.DivPrune, object(), "chain"
        )
        keep = pick(0.5, 1, 0, -1, 2.0, float("nan"), True, "half", None, [0.5], 10**9, torch.tensor(0.5), 1 + 2j)
        options = pick({}, {}, {"positions": pick("compact", "x", 3)}, {"newlines": pick("keep", 0)}, {"what": 1})
        target = pick(model, model, model, model.model, nn.Linear(1, 1), None, "model")
        entrance = pick("patch", "compress", "config", "estimate")
        try:
            if entrance == "patch":
                vtc.patch(target, method, keep=keep, **options).unpatch()
            elif entrance == "compress":
                inputs = pick(batch, {}, {"input_ids": None}, {"input_ids": batch["input_ids"]})
                vtc.compress_inputs(target, inputs, method, keep=keep, **options)
            elif entrance == "config":
                vtc.CompressionConfig(method, {"keep": keep}, **options).build()
            else:
                vtc.estimate(pick(model, 3, None), pick((8, 8), (0, 0), "big"), method=method, keep=keep)
        except allowed as error:
            raw += [] if str(error) else [(turn, "an error without a word")]
        except Exception as error:
            raw.append((turn, entrance, type(target).__name__, method, keep, options, repr(error)[:200]))
        assert traces(model) == clean, (turn, entrance, method, keep, options)
    assert raw == []
