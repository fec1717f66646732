"""vtc.verify: it agrees where vtc is right, and it can fail. What is broken here is broken on purpose."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from flash import flash_attention
from reference import continue_by_hand
from torch import Tensor
from zoo import SPECIAL_IDS, get_model, make_batch

import vtc
from vtc.checking import byhand, prompts
from vtc.checking.result import Check, Verification
from vtc.engine.compaction import Compaction
from vtc.engine.entry import EntryStage
from vtc.engine.lengths import SlotMap
from vtc.models import resolve

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def verify(family: str = "llava", images: tuple[int, ...] = (1,), **arguments: Any) -> Verification:
    return vtc.verify(get_model(family), make_batch(family, images), **arguments)


def check(result: Verification, name: str) -> Check:
    return next(check for check in result.checks if check.name == name)


# ------------------------------------------------------------------------------------------------------------- agreeing


# One of a kind: plain, crops, m-rope, DeepStack, linear attention, per-layer inputs, prepared masks, tiles.
KINDS = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "idefics3"]


@pytest.mark.parametrize("family", KINDS)
def test_a_model_is_right(family: str) -> None:
    result = verify(family)
    assert result.ok, result
    assert result.difference < 5e-5
    names = [check.name for check in result.checks]
    assert [name for name in names if "cache" in name] == [
        f"{how}, {cache}" for how in ("alone", "padded batch") for cache in ("cache", "no cache")
    ]
    assert len(names) == 6


def test_what_the_unpruned_model_does_not_do_is_not_vtcs_fault() -> None:
    """Before 5.23, PaliGemma without a cache lets generated tokens join its bidirectional prefix."""
    result = verify("paligemma")
    assert [check(result, f"{how}, cache").verdict for how in ("alone", "padded batch")] == ["ok", "ok"]
    assert result.ok is not OLD
    assert result.verdict == ("upstream" if OLD else "ok")


def test_a_batch_is_taken_as_it_is() -> None:
    result = verify("llava_next", (1, 2, 0), method="grid", keep=3, positions="compact")
    assert result.ok, result
    assert [check.name for check in result.checks][:2] == ["batch of 3, cache", "batch of 3, no cache"]


def test_methods_options_and_lengths_are_passed_on() -> None:
    result = verify(method=vtc.Random(keep=0.3, seed=4), new_tokens=2)
    assert result.ok, result
    assert "seed=4" in repr(result)
    assert check(result, "alone, cache").tokens == 2
    assert "keep=0.25" in repr(verify(keep=0.25))


def test_flash_attention_is_compared_with_sdpa_by_hand() -> None:
    model = get_model("llava")
    with flash_attention(model):
        assert verify().ok
        assert model.get_decoder().config._attn_implementation == "flash_on_cpu"


def test_half_precision_has_a_wider_tolerance_and_calls_fewer_tokens() -> None:
    model = copy.deepcopy(get_model("llava")).to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in make_batch("llava", (1,)).items()}
    result = vtc.verify(model, inputs)
    assert result.ok, result
    batch = check(result, "padded batch, cache")
    assert batch.tolerance > 100 * check(verify(), "padded batch, cache").tolerance
    assert batch.agree == batch.decided < batch.tokens
    assert "too close to call" in repr(result)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "gemma4"])
def test_by_hand_is_the_reference_of_the_tests(family: str) -> None:
    """Two hands, written apart: one runs the decoder by itself step by step, the other a hook and one forward pass."""
    model, batch = get_model(family), make_batch(family, (1,))
    keep = [torch.arange(1, len(columns), 2) for columns in batch.images[0]]
    reference = continue_by_hand(model, batch.samples[0], batch.images[0], keep, "original", 3, SPECIAL_IDS)
    dropped = torch.cat([columns[::2] for columns in batch.images[0]])
    ours = byhand.logits_by_hand(resolve(model)[1], batch, 0, dropped, reference.tokens)
    torch.testing.assert_close(ours, reference.logits, rtol=0, atol=1e-4)


def test_windows_that_end_between_visual_tokens_are_compared_at_the_first_token_only() -> None:
    """They count stored tokens in decode steps (README, limits): 4 of 4 where the text is longer than the window."""
    model, inputs = get_model("gemma3_window8"), dict(make_batch("gemma3_window8", (1,)))
    assert check(vtc.verify(model, inputs), "alone, cache").tokens == 4
    short = {name: value if name == "pixel_values" else value[:, :-6] for name, value in inputs.items()}
    result = vtc.verify(model, short)
    assert result.ok, result
    assert [check(result, f"alone, {how}").tokens for how in ("cache", "no cache")] == [1, 4]
    assert "first token only" in check(result, "alone, cache").note


# --------------------------------------------------------------------------------------------------- leaving no trace


def state(model: torch.nn.Module) -> list[Any]:
    """Every attribute of every module, and what is in those that are dictionaries."""
    return [
        (name, key, id(value), sorted(map(str, value)) if isinstance(value, dict) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "training"
    ]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = copy.deepcopy(get_model(family)).train()
    model.get_decoder().layers[0].eval()
    training = [module.training for module in model.modules()]
    before, weights = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # and a second time on what the first has left
        assert vtc.verify(model, make_batch(family, (1,))).ok
        assert state(model) == before
        assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- failing


def failed(result: Verification) -> list[str]:
    assert result.ok is False
    assert result.verdict == "FAILED"
    return [check.name for check in result.checks if check.verdict == "FAILED"]


def test_a_mask_that_is_not_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows lose different numbers of tokens, so the padding of the prompt is not where the cache has it."""
    monkeypatch.setattr(SlotMap, "physical_mask", lambda self, mask, length: None if mask is None else mask[:, :length])
    result = verify()
    assert failed(result) == ["padded batch, cache"]
    (fault,) = result.faults
    assert "sample 2, token 1" in fault
    assert "differ from pruning by hand by up to" in fault


def test_positions_that_do_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Compaction, "positions", lambda self, ids: torch.arange(self.index.shape[1]).expand_as(self.index)
    )
    assert len(failed(verify())) == 4


def test_deepstack_rows_that_do_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EntryStage._deepstack

    def shifted(self: Any, call: Any, *others: Any) -> None:
        right(self, call, *others)
        call.named |= {k: [rows.roll(1, 0) for rows in v] for k, v in call.named.items() if isinstance(v, list) and v}

    monkeypatch.setattr(EntryStage, "_deepstack", shifted)
    assert len(failed(verify("qwen3_vl"))) == 4


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is given to a decoder, whatever the cache is called."""
    return {name: value for name, value in kwargs.items() if not hasattr(value, "get_seq_length")}


@pytest.mark.parametrize("prefill", [True, False])
def test_a_patch_that_drops_the_cache(monkeypatch: pytest.MonkeyPatch, prefill: bool) -> None:
    """At once, which vtc itself notices, or in decode steps."""
    right = EntryStage.before_decoder

    def forgetful(self: Any, *arguments: Any) -> Any:
        args, kwargs = right(self, *arguments)
        step = any(isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 1 for value in kwargs.values())
        return args, without_cache(kwargs) if prefill or step else kwargs

    monkeypatch.setattr(EntryStage, "before_decoder", forgetful)
    result = verify()
    assert failed(result) == ["alone, cache", "padded batch, cache"]
    assert ("RuntimeError: divprune dropped visual tokens, but" if prefill else "logits differ") in result.faults[0]


def test_a_decoder_that_drops_the_cache_by_itself() -> None:
    """Then the unpruned model is as wrong: not ok, and not vtc's fault."""
    model = copy.deepcopy(get_model("llava"))
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: (args, without_cache(kwargs)), with_kwargs=True
    )
    result = vtc.verify(model, make_batch("llava", (1,)))
    assert result.ok is False
    assert [check(result, f"alone, {how}").verdict for how in ("cache", "no cache")] == ["upstream", "ok"]
    assert result.verdict == "upstream"
    assert "the unpruned model has it too" in result.faults[0]


def test_a_patch_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(get_model("llava"))

    def leaving(self: Any) -> None:
        right(self)
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + 1.0)

    right = vtc.Patch.unpatch
    monkeypatch.setattr(vtc.Patch, "unpatch", leaving)
    assert "unpruned, before and after" in failed(vtc.verify(model, make_batch("llava", (1,))))


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Crowded(vtc.Method):
    """Keeps other tokens in company: what a method must not do."""

    name = "crowded"

    def reduce(self, stage: Any, tokens: Any, budget: tuple[int, ...]) -> vtc.Reduction:
        return vtc.Reduction(torch.arange(max(budget)).expand(len(budget), -1) + (len(budget) > 1))


def test_kept_tokens_that_depend_on_the_batch() -> None:
    """What is then computed from them is right."""
    result = verify(method=Crowded(keep=2))
    assert failed(result) == ["same tokens kept in every run"]
    assert "sample 0 keeps [[1, 2]] in one run and [[0, 1]] in another" in result.faults[0]


def test_an_exception_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        raise KeyError("a name of\nanother release")

    monkeypatch.setattr(EntryStage, "before_decoder", broken)
    result = verify()
    assert len(failed(result)) == 5  # with the kept tokens, which nothing was heard of
    assert "KeyError: 'a name of" in result.faults[0]
    assert "vtc" not in [key for key in vars(get_model("llava")) if "patch" in key]


def test_no_checks_are_not_ok() -> None:
    assert not Verification("nothing", ()).ok
    assert Verification("nothing", (Check("a", "upstream"),)).verdict == "FAILED"


# -------------------------------------------------------------------------------------------------------------- refused


def test_refusals() -> None:
    model, inputs = get_model("llava"), make_batch("llava", (1,))
    with vtc.patch(model, "grid"), pytest.raises(ValueError, match="patched already"):
        vtc.verify(model, inputs)
    with pytest.raises(ValueError, match="hold no image"):
        vtc.verify(model, make_batch("llava", (0,)))
    with pytest.raises(ValueError, match=r"between the layers.*'divprune'"):
        vtc.verify(model, inputs, vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3)))
    with pytest.raises(ValueError, match="new_tokens=0"):
        vtc.verify(model, inputs, new_tokens=0)
    with pytest.raises(ValueError, match="on the left"):
        vtc.verify(model, make_batch("llava", (1, 2), padding="right"))
    with pytest.raises(ValueError, match="input_ids must be"):
        vtc.verify(model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(ValueError, match="must have the shape of input_ids"):
        vtc.verify(model, inputs | {"attention_mask": torch.ones(1, 3)})
    with pytest.raises(ValueError, match="leave the position ids out"):
        vtc.verify(model, inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]})
    with pytest.raises(TypeError, match="carries its own"):
        vtc.verify(model, inputs, vtc.Grid(), keep=0.5)


def test_the_padded_batch_is_ragged_in_every_way() -> None:
    _, parts = resolve(get_model("qwen2_vl"))
    inputs = dict(make_batch("qwen2_vl", (1,)))
    three = [inputs, prompts.longer_variant(parts, inputs), prompts.without_images(parts, inputs)]
    batch = prompts.padded(parts, three)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 3
    assert (batch["input_ids"] == parts.placeholders["image"]).sum(1).tolist()[1:] == [8, 0]
    assert batch["attention_mask"][:, -1].all()
    assert len(batch["image_grid_thw"]) == 2
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"].repeat(2, 1))
