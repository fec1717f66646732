"""What a patch receives, keys and features: in every tower those of an eager pass of the unpatched model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from eager_tower import encoders, features_of, keys_of, made_of, received_of, tower_of
from flash import NAME as FLASH
from torch import Tensor
from zoo import FAMILIES, Batch, get_model, make_batch

import vtc
from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.methods import ModelFacts, Stage, registry
from vtc.models import families, resolve
from vtc.models import qwen as qwen_models
from vtc.places import Entry
from vtc.signals import Received, Signal, TowerFeatures, TowerKeys, received
from vtc.tokens import VisualTokens

PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "qwen3_vl_video", "qwen3_vl_moe", "qwen3_5"]
PACKED += ["glm46v", "glm46v_video", "mistral3", "llava_pixtral"]
PLAIN = ["llava", "llava_onevision", "llava_onevision_video", "idefics3", "smolvlm", "gemma3", "paligemma"]
SIGNALS = (
    *(Received(layer=layer, name=f"layer{layer}") for layer in (0, 1, -1)),
    TowerKeys(layer=0),
    TowerFeatures(layer=1),
)
BY_HAND = {Received: received_of, TowerKeys: keys_of, TowerFeatures: features_of}


@functools.cache
def batch_of(name: str) -> Batch:
    return make_batch(name)


@functools.cache
def by_hand(name: str) -> dict[str, tuple[dict[Signal, Tensor], list[Tensor]]]:
    """By modality: every signal of the tower's tokens, and of which of them each visual token is made."""
    model = get_model(name)
    return {
        modality: ({s: BY_HAND[type(s)](model, encode, s.layer) for s in SIGNALS}, made_of(model, encode))
        for modality, encode in encoders(model, batch_of(name)).items()
    }


@torch.no_grad()
def seen_by_methods(model: Any, batch: Batch, signals: Sequence[Signal] = SIGNALS) -> VisualTokens:
    """What a method is given in a forward pass of the whole patched model."""
    seen: list[VisualTokens] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(vtc.Scorer):
        name: ClassVar[str] = "look"

        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (Stage(Entry(), needs=tuple(signals)),)

        def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
            seen.append(tokens)
            return torch.zeros(tokens.features.shape[:2])

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"look": Look})
        with vtc.patch(model, Look(keep=0.5)):
            model(**batch)
    (tokens,) = seen
    return tokens


def check(name: str, tokens: VisualTokens) -> None:
    """Every signal of every image is the eager one, sent where autograd says."""
    kinds = ["video" if layout.of_kind("frame") else "image" for layout in tokens.layouts]
    assert set(kinds) == set(by_hand(name))
    for modality, (values, shares) in by_hand(name).items():
        numbers = [g for g, kind in enumerate(kinds) if kind == modality]
        if len(shares) != len(numbers):  # tiles come sample by sample
            shares = list(torch.cat(shares).split([tokens.layouts[g].length for g in numbers]))
        for g, share in zip(numbers, shares, strict=True):
            for signal in SIGNALS:
                value = values[signal] if values[signal].dim() == 3 else values[signal][..., None]
                expected = torch.einsum("npt,ptc->nc", share, value)
                ours = tokens.signals[signal.key][g]
                ours = ours if ours.dim() == 2 else ours[:, None]
                torch.testing.assert_close(ours[: len(share)], expected, rtol=0, atol=5e-5)
                assert not ours[len(share) :].any(), "newlines and padding have 0"


# ---------------------------------------------------------------------------------------------------------- every tower


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_signals_are_those_of_an_eager_pass(name: str) -> None:
    check(name, seen_by_methods(get_model(name), batch_of(name)))


@pytest.mark.parametrize("name", ["qwen2_5_vl_video", "mistral3", "idefics3", "paligemma"])
def test_in_eager_models_too(name: str) -> None:
    model = get_model(name)
    model.set_attn_implementation("eager")
    try:
        check(name, seen_by_methods(model, batch_of(name)))
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_video", "mistral3"])
def test_with_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands on where sequences end instead of cutting the row."""
    model = get_model(name)
    tower = tower_of(model)
    monkeypatch.setattr(tower.config, "_attn_implementation_internal", FLASH)
    signal = Received(layer=0)
    told = "cu_seq" in inspect.getsource(type(tower).forward) or name != "mistral3"
    if not told:  # Pixtral in older releases
        with pytest.raises(NotImplementedError, match="nothing tells PixtralAttention where a picture ends"):
            seen_by_methods(model, batch_of(name), [signal])
        return
    tokens = seen_by_methods(model, batch_of(name), [signal])
    monkeypatch.undo()
    whole = seen_by_methods(model, batch_of(name), [signal])  # what enters the first layer is the same
    torch.testing.assert_close(tokens.signals["received"], whole.signals["received"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "mistral3", "llava"])
def test_blocks_of_queries_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "QUERIES", 3)
    check(name, seen_by_methods(get_model(name), batch_of(name)))


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_an_image_alone_has_what_it_has_beside_others(name: str) -> None:
    model, batch = get_model(name), batch_of(name)
    together = seen_by_methods(model, batch, SIGNALS[:3])
    for row, sample in enumerate(batch.samples):
        numbers = [g for g, own in enumerate(together.samples) if own == row]
        if numbers:
            alone = seen_by_methods(model, sample, SIGNALS[:3])
            for signal in SIGNALS[:3]:
                ours = together.signals[signal.key][numbers]
                torch.testing.assert_close(
                    ours[:, : alone.features.shape[1]], alone.signals[signal.key], rtol=0, atol=1e-5
                )


def test_the_zoo_has_something_to_undo() -> None:
    """Windows of one picture differ in size, full and windowed layers differ, and attention is not flat."""
    model = get_model("qwen2_5_vl")
    found = seen_by_methods(model, batch_of("qwen2_5_vl"), SIGNALS[:3]).signals
    assert not torch.allclose(found["layer0"], found["layer1"], atol=1e-2)
    for row in found.values():
        there = row[row > 0]
        assert there.max() / there.min() > 1.2


# ------------------------------------------------------------------------------------------------------------- controls


def unturned(real: Any) -> Any:
    return lambda attention, x, rotary: real(attention, x, ())


def turned_twice(real: Any) -> Any:
    return lambda attention, x, rotary: real(attention, x, [part * 2 for part in rotary])


@pytest.mark.parametrize("broken", [unturned, turned_twice], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["qwen2_vl", "glm46v", "mistral3"])
def test_control_other_rotations_are_refused(name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "attending_in_tower", broken(inner.attending_in_tower))
    with pytest.raises(vtc.UnsupportedModelError, match="is not what vtc recomputes: what tokens receive differs"):
        vtc.patch(get_model(name), "fastervlm", keep=0.5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_video"])
def test_control_window_order_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_models, "places", lambda tower, grids: None)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(name, seen_by_methods(get_model(name), batch_of(name)))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_control_a_row_that_is_not_cut_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = received.received
    monkeypatch.setattr(received, "received", lambda m, x, heard: real(m, x, Heard(heard.rotary)))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(name, seen_by_methods(get_model(name), batch_of(name)))


# --------------------------------------------------------------------------------------------------------- bare tensors


class Bare(torch.nn.Module):
    """An attention whose queries and keys are what enters it."""

    num_heads, scaling = 2, 0.7

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = self.k_proj = torch.nn.Identity()


def by_loops(x: Tensor, sees: Any) -> list[float]:
    """Column sums of head-averaged attention among tokens [T, d]; ``sees(row, column)``."""
    total = [0.0] * len(x)
    for head in x.unflatten(-1, (2, -1)).unbind(1):
        for row in range(len(x)):
            logits = {c: 0.7 * float(head[row] @ head[c]) for c in range(len(x)) if sees(row, c)}
            sums = sum(torch.tensor(list(logits.values())).exp().tolist())
            for column, logit in logits.items():
                total[column] += float(torch.tensor(logit).exp()) / sums / 2
    return total


@pytest.mark.parametrize("queries", [1, 4, 256])
def test_sequences_that_share_a_row(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "QUERIES", queries)
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0))
    part = [0, 0, 0, 1, 2, 2, 2, 3, 3]
    ends = torch.tensor([0, 3, 4, 4, 7, 9], dtype=torch.int32)  # an empty one among them
    found = received.received(Bare(), x, Heard(ends=ends))[0]
    assert found.tolist() == pytest.approx(by_loops(x[0], lambda r, c: part[r] == part[c]), abs=1e-5)
    assert float(found[3]) == pytest.approx(1.0)  # alone in its window
    assert float(found.sum()) == pytest.approx(9.0)


@pytest.mark.parametrize("queries", [2, 256])
@pytest.mark.parametrize("kind", ["bool", "float", "half", "two"])
def test_padding_neither_pays_nor_receives(kind: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idefics3 pads pictures, and its masks come in the shape that the attention wants."""
    monkeypatch.setattr(received, "QUERIES", queries)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    there = torch.tensor([[True] * 5, [True, True, False, True, False]])
    masks = {"two": there.long(), "bool": there[:, None, None].expand(2, 1, 5, 5)}
    for name, dtype in (("float", torch.float32), ("half", torch.float16)):
        masks[name] = torch.zeros(2, 1, 5, 5, dtype=dtype).masked_fill(~there[:, None, None], torch.finfo(dtype).min)
    found = received.received(Bare(), x, Heard(mask=masks[kind]))
    for row, real in zip(range(2), there.tolist(), strict=True):
        only = [i for i, is_there in enumerate(real) if is_there]
        expected = by_loops(x[row, only], lambda r, c: True)
        assert found[row, only].tolist() == pytest.approx(expected, abs=1e-5)
        assert float(found[row].sum()) == pytest.approx(len(only))


def test_ends_that_do_not_fit_are_an_error() -> None:
    x = torch.randn(1, 9, 8)
    for ends in ([0, 4], [1, 9], [0, 4, 10]):
        with pytest.raises(ValueError, match="do not fill a row of 9 patches"):
            received.received(Bare(), x, Heard(ends=torch.tensor(ends)))


def test_what_does_not_tell_where_pictures_end_is_refused() -> None:
    """Pixtral with flash attention in older releases; and masks that are no tensors."""
    tower, x = Tower((), 0, packed=True), torch.randn(1, 4, 8)
    for heard, word in ((Heard(), "where a picture ends"), (Heard(mask=object()), "its object")):
        with pytest.raises(NotImplementedError, match=word) as why:
            Received().read(tower, Bare(), x, heard)
        assert "attn_implementation='sdpa'" in str(why.value)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_listed_is_what_is_given(name: str) -> None:
    adapter, parts = resolve(get_model(name))
    listed = {family.model_type: family.signals for family in families()}[parts.config.model_type]
    assert ("received" in listed) is adapter.gives(parts, Received()) is ("received" in adapter.facts(parts).signals)
    assert ("received" in listed) is (parts.config.model_type not in ("gemma4", "llava_mqt"))
    assert not adapter.gives(parts, Received(layer=99))


def test_a_tower_that_is_not_matched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot give \(its vision tower is Gemma4VisionModel\)"):
        vtc.patch(get_model("gemma4"), "fastervlm", saliency="received")


def test_windows_without_the_towers_own_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.get_vision_window_index"
    with vtc.patch(get_model("qwen2_5_vl"), "fastervlm"):
        pass
    monkeypatch.delattr(source)
    with pytest.raises(ValueError, match=r"'fastervlm' needs 'cls', which this Qwen2_5_VL.* cannot give"):
        vtc.patch(get_model("qwen2_5_vl"), "fastervlm")
    vtc.patch(get_model("qwen2_vl"), "fastervlm").unpatch()


@pytest.mark.parametrize("name", ["qwen3_vl", "mistral3", "paligemma"])
def test_a_tower_that_attends_in_another_way_is_refused(name: str) -> None:
    model = copy.deepcopy(get_model(name))
    tower = resolve(model)[0].tower(model.model, "image")
    last = tower.attention(-1)

    class Colder(type(last)):
        @functools.wraps(type(last).forward)
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states / 2, *args, **kwargs)

    last.__class__ = Colder
    before = {id(module): dict(module.__dict__) for module in model.modules()}
    with pytest.raises(vtc.UnsupportedModelError, match="Colder is not what vtc recomputes"):
        vtc.patch(model, "fastervlm", keep=0.5)
    assert {id(module): dict(module.__dict__) for module in model.modules()} == before
