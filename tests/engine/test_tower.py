"""Stages inside the vision tower: the same as a tower that does not see what left, and every trap on the way.

That each family's answers are right is the methods' matrix (`intower` in tests/methods/every.py); here are stages that
no method of the library has, and what must be refused or is bit-exact.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from masked_tower import BlindTower, overheard_departures
from reference import blind
from release import OLD
from torch import Tensor
from zoo import GREEDY, NEW_TOKENS, get_model, make_batch

import vtc
from vtc.engine.choosing import Chooser
from vtc.engine.passage import Departure, Passage
from vtc.engine.tower import TowerStages
from vtc.methods.base import ModelFacts, Reduction, Stage
from vtc.places import Tower
from vtc.signals import Cls, Received, Rows, Text, TowerFeatures
from vtc.tokens import VisualTokens

DROPS = ("llava", "vipllava", "llava_next", "llava_next_video_image", "video_llava", "paligemma")
RESTORES = ("gemma3", "idefics3", "smolvlm", "llava_onevision", "internvl", "llava_next_video")


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Twice(vtc.Method):
    """Half leave at once, by their features, and half of the others one block later."""

    restore: bool | None = None

    name: ClassVar[str] = "twice_in_the_tower"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return Stage(Tower(0, self.restore)), Stage(Tower(1, self.restore), needs=(TowerFeatures(layer=0),))

    def quota(self, n: int, stage: Stage) -> int:
        return -(-n // 2) if stage.number == 0 else -(-n // 4)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        assert budget is not None
        values = tokens.features if stage.number == 0 else tokens.signals["tower_features"]
        scores = values.double().square().sum(-1).masked_fill(~tokens.mask, -torch.inf)
        return Reduction(scores.sort(dim=1, descending=True, stable=True).indices[:, : max(budget)])


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Melting(vtc.Method):
    """The even patches stay, each as the mean of itself and the next."""

    name: ClassVar[str] = "melting_in_the_tower"
    merges: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(Tower(1)),)

    def quota(self, n: int, stage: Stage) -> int:
        return n // 2

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        x = tokens.features
        index = torch.arange(0, x.shape[1], 2).expand(len(x), -1)
        return Reduction(index, features=(x[:, ::2] + x[:, 1::2]) / 2, size=torch.full(index.shape, 2.0))


def answers(model: Any, inputs: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Logits [B, steps, V] and tokens [B, steps]."""
    out = model.generate(**inputs, **GREEDY, **more, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), out.sequences[:, -NEW_TOKENS:]


def by_hand(family: str, method: vtc.Method) -> tuple[Any, Any]:
    """What a patched batch answers, and what the unpatched model does when it is blind to what left."""
    if OLD and family == "paligemma":
        pytest.skip("before 5.23, the reference, which has no cache, lets generated tokens join PaliGemma's prefix")
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("eager")
    with overheard_departures() as departures, vtc.patch(model, method) as p:
        ours = answers(model, batch)
        keep = p.last_keep
    logits, tokens, tower = [], [], BlindTower(model, departures)
    for sample, images, kept in zip(batch.samples, batch.images, keep, strict=True):
        gone = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
        for columns, left in zip(images, kept, strict=True):
            gone[columns] = True
            gone[columns[left]] = False
        with tower.sample(), blind(model, [gone] * len(model.get_decoder().layers)):
            one = answers(model, sample, use_cache=False)
        logits.append(one[0])
        tokens.append(one[1])
    return ours, (torch.cat(logits), torch.cat(tokens))


@pytest.mark.parametrize("family", [*DROPS, *RESTORES])
def test_two_stages(family: str) -> None:
    (logits, tokens), (expected, said) = by_hand(family, Twice())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, said)


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next", "paligemma"])
def test_restored_where_nobody_must(family: str) -> None:
    method = Twice(restore=True)
    (logits, tokens), (expected, said) = by_hand(family, method)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, said)
    model, batch = get_model(family), make_batch(family)
    with vtc.patch(model, method) as p:
        model.generate(**batch, **GREEDY)
        assert all(len(kept) == len(c) for ks, cs in zip(p.last_keep, batch.images, strict=True)
                   for kept, c in zip(ks, cs, strict=True))  # fmt: skip


def test_new_values_stand_there() -> None:
    """One block by hand on the rows that stay."""
    model, batch = get_model("llava"), make_batch("llava")
    adapter, parts = vtc.models.resolve(model)
    blocks, entered = adapter.tower(parts.base, "image").layers, []
    hook = blocks[1].register_forward_hook(lambda module, args, output: entered.append((args[0], output)))
    with torch.no_grad(), vtc.patch(model, Melting()) as p:
        features = torch.stack(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        model.generate(**batch, **GREEDY)
    hook.remove()
    assert all(kept.tolist() == list(range(0, 16, 2)) for kepts in p.last_keep for kept in kepts)
    with torch.no_grad():
        before = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[1]
        mean = (before[:, 1::2] + before[:, 2::2]) / 2
        torch.testing.assert_close(entered[0][0], torch.cat([before[:, :1], mean], 1))
        assert adapter.facts(parts).tower_depth == 2  # what the projector gets is what this block returns
        torch.testing.assert_close(features[:, ::2], model.model.multi_modal_projector(entered[0][1][:, 1:]))


@pytest.mark.parametrize("kind", ["none", "bool", "float", "rows"])
def test_masks_that_blocks_were_given_stay_beside_the_sizes(kind: str) -> None:
    passage = Passage(special=1, patches=4, restores=False)
    passage.there, passage.size = torch.tensor([[0, 2]]), torch.tensor([[1.0, 9.0, 3.0, 9.0]])
    seen = torch.tensor([True, False, True])[None, None, None]
    given = {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -5.0), "rows": seen[:, 0, 0].long()}[kind]
    found = passage.weighed(given, torch.float32)
    hidden = {"none": 0.0, "float": -5.0}.get(kind, torch.finfo(torch.float32).min)
    torch.testing.assert_close(found, torch.tensor([0.0, hidden, math.log(3)])[None, None, None])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_chain_behind_the_tower_is_the_method_itself_with_a_share_of_what_is_left(family: str) -> None:
    model, batch, kept = get_model(family), make_batch(family), []
    share = 0.5 if family == "gemma3" else 0.25  # where patches come back, all are left
    inside = {"rule": "diverse", "keep": 0.5, "after": 1}
    for method in (
        vtc.Chain(vtc.InTower(**inside), vtc.DivPrune(keep=0.5)),
        vtc.InTower(**inside, then=vtc.DivPrune(keep=share)),
    ):
        with vtc.patch(model, method) as p:
            model.generate(**batch, **GREEDY)
            kept.append([[k.tolist() for k in sample] for sample in p.last_keep])
    assert kept[0] == kept[1]


# ------------------------------------------------------------------------------------------------------------ bit-exact


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3"])
def test_keep_one_changes_no_bit(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    before = answers(model, batch)
    with vtc.patch(model, vtc.InTower(keep=1.0, after=1)):
        for ours, theirs in zip(answers(model, batch), before, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llava", "gemma3", "internvl"])
def test_unpatched_it_is_what_it_was(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    before, hooks = (
        answers(model, batch),
        {m: len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()},
    )
    patch = vtc.patch(model, vtc.InTower(keep=0.5, after=1))
    assert not torch.equal(answers(model, batch)[0], before[0])
    patch.unpatch()
    assert torch.equal(answers(model, batch)[0], before[0])
    assert hooks == {m: len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()}


def test_threads() -> None:
    """Each has a recording of its own."""
    model = get_model("llava")
    batches = [make_batch("llava", images_per_sample=counts) for counts in ((1, 2), (3, 1), (2, 2))]
    with vtc.patch(model, vtc.InTower(keep=0.5, after=1, then=vtc.DivPrune(keep=0.25))):
        alone = [answers(model, batch)[0] for batch in batches]
        found: dict[int, Tensor] = {}

        def run(at: int) -> None:
            for _ in range(3):
                found[at] = answers(model, batches[at])[0]

        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for at, logits in found.items():
        assert torch.equal(logits, alone[at])


# --------------------------------------------------------------------------------------------------- negative controls


@contextmanager
def broken(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def apart(family: str, method: vtc.Method) -> float:
    (logits, _), (expected, _) = by_hand(family, method)
    return float((logits - expected).abs().max())


def test_control_zeros_in_the_prompt_are_found() -> None:
    """Trap 1: what left inside must leave the prompt too."""
    model, batch = get_model("llava"), make_batch("llava")
    with vtc.patch(model, Twice()):
        right = answers(model, batch)[0]
        with broken(Chooser, "arrived", lambda self, tokens, running, images: tokens):
            wrong = answers(model, batch)[0]
    assert (right - wrong).abs().max() > 0.1


def test_control_holes_where_tokens_are_pooled_are_found() -> None:
    """Trap 2: dropping where a token is made of several patches is another answer; it is refused."""
    with pytest.raises(ValueError, match="makes one token of several patches"):
        vtc.patch(get_model("gemma3"), Twice(restore=False))
    with broken(Passage, "whole", lambda self, state: holes(self, state)):
        assert apart("gemma3", Twice()) > 0.1


def holes(passage: Passage, state: Tensor) -> Tensor:
    rows = state[:, passage.special :]
    if rows.shape[1] == passage.patches or passage.there is None or rows.shape[1] != passage.there.shape[1]:
        return state
    return torch.cat([state[:, : passage.special], passage.spread(rows)], 1)


def test_control_a_state_of_an_early_block_is_whole() -> None:
    """Trap 3: VipLLaVA takes states of several blocks, some from before anything left."""
    with broken(Departure, "undone", lambda self, rows: rows.new_zeros(len(rows), 16, rows.shape[2])):
        assert apart("vipllava", Twice()) > 0.1


@pytest.mark.parametrize("rule", ["cls", "received"])
def test_signals_behind_are_at_their_places(rule: str) -> None:
    """Trap 4: what later blocks attend to has fewer rows; behind the tower it stands where the patches are."""
    model, batch = get_model("llava"), make_batch("llava")
    inside = vtc.InTower(rule="diverse", keep=0.5, after=1, then=vtc.FasterVLM(keep=0.25, saliency=rule))
    with overheard_departures() as departures, vtc.patch(model, inside) as p:
        model.generate(**batch, **GREEDY)
    dead = departures["image"][0].dead
    kept = [k for kepts in p.last_keep for k in kepts]
    assert all(len(k) == 4 and not row[k].any() for k, row in zip(kept, dead, strict=True))


def test_nobody_waits_for_counts_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 5: what is unpadded of a mosaic depends on its picture; one picture, one image is known."""
    known: list[Any] = []
    real = Chooser.arrived

    def arrived(self: Any, tokens: Any, running: Any, images: Any) -> Any:
        known.extend(running.encoded[image.modality].left for image in images)
        return real(self, tokens, running, images)

    monkeypatch.setattr(Chooser, "arrived", arrived)
    for family, expected in (("llava", True), ("llava_next", False), ("idefics3", True)):
        known.clear()
        model, batch = get_model(family), make_batch(family)
        with vtc.patch(model, vtc.InTower(keep=0.5, after=1)):
            model.generate(**batch, **GREEDY)
        assert {left is not None for left in known} == {expected}, family


def test_gradient_checkpointing_is_refused() -> None:
    """Trap 6: the tower's hooks would run twice."""
    from zoo import FAMILIES

    model, batch = FAMILIES["llava"].build(), make_batch("llava")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with (
        vtc.patch(model, vtc.InTower(keep=0.5, after=1)),
        pytest.raises(NotImplementedError, match="gradient checkpointing"),
    ):
        model(**batch)


# ---------------------------------------------------------------------------------------------------- refused, and why


FIRST = Stage(Tower(1))


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class At(vtc.Method):
    """One stage, of any kind."""

    stage: Any = FIRST

    name: ClassVar[str] = "at_a_stage"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return (self.stage,)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("qwen2_vl", vtc.InTower(rule="diverse", after=1, restore=True), "with the token that they are made into"),
        ("qwen3_vl", vtc.InTower(rule="diverse", after=3), "before block 3 .* nothing would be saved. Blocks 0 to 2"),
        ("qwen3_vl", Melting(), "a token is 4 rows there"),
        ("mistral3", vtc.InTower(rule="diverse", after=1), "not built so that vtc could"),
        ("llava_pixtral", vtc.InTower(rule="diverse", after=1), "not built so that vtc could"),
        ("gemma4", vtc.InTower(rule="diverse", after=1), "not built so that vtc could"),
        ("llava", vtc.InTower(after=7), "before block 7 .* nothing would be saved. Blocks 0 to"),
        ("llava", vtc.InTower(after=0), "'cls' before block 0"),
        ("gemma3", vtc.InTower(after=1, restore=False), "restore=True, or None"),
        ("paligemma", vtc.InTower(rule="cls", after=1), "cannot give"),
        ("llava", At(stage=Stage(Tower(1), needs=(Cls(layer=-1),))), "'cls' before block 1"),
        ("llava", At(stage=Stage(Tower(1), needs=(Received(layer=1),))), "'received' before block 1"),
        ("llava", At(stage=Stage(Tower(1), needs=(Text(),))), "'text' before block 1"),
        ("llava", At(stage=Stage(Tower(1), needs=(Rows(0),))), "the language model has not run there"),
    ],
)
def test_refused_before_anything_is_touched(family: str, method: vtc.Method, words: str) -> None:
    model = get_model(family)
    with pytest.raises(ValueError, match=words):
        vtc.patch(model, method)
    vtc.patch(model, "grid").unpatch()  # it is not patched


def test_images_encoded_before_are_refused() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    encoded = model.model.get_image_features(batch["pixel_values"])
    inputs = {k: v for k, v in batch.items() if k != "pixel_values"}
    if OLD:
        pytest.skip("before 5.23, models take no features encoded ahead")
    with (
        vtc.patch(model, vtc.InTower(keep=0.5, after=1)),
        pytest.raises(ValueError, match="before the model was patched"),
    ):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_tower_that_nobody_hears_runs_whole() -> None:
    """Encoding by the tower alone: nobody would know what left."""
    model, batch = get_model("llava"), make_batch("llava")
    before = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
    with vtc.patch(model, vtc.InTower(keep=0.5, after=1)):
        assert torch.equal(model.model.vision_tower(batch["pixel_values"]).last_hidden_state, before)


def test_zeros_are_not_projected() -> None:
    model, batch, rows = get_model("llava"), make_batch("llava"), []
    hook = model.model.multi_modal_projector.linear_1.register_forward_hook(
        lambda m, args, out: rows.append(args[0].shape[1])
    )
    with vtc.patch(model, vtc.InTower(keep=0.25, after=1)):
        model.generate(**batch, **GREEDY)
    hook.remove()
    assert set(rows) == {4}


def test_what_works_elsewhere_is_said() -> None:
    model, batch = get_model("llava"), make_batch("llava")
    method = vtc.InTower(keep=0.5, after=1)
    with pytest.raises(NotImplementedError, match=r"use vtc\.patch" if OLD else "which takes hooks"):
        vtc.compress_inputs(model, batch, method)
    with pytest.raises(ValueError, match="the whole tower"):
        vtc.verify(model, batch, method)


def test_stages_of_the_tower_are_the_hooks_of_nobody_else() -> None:
    """A method without such a stage hangs nothing on the tower."""
    model = get_model("llava")
    adapter, parts = vtc.models.resolve(model)
    assert not list(TowerStages(adapter, parts, (), ()).hooks())
