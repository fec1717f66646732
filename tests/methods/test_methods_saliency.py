"""What the methods share that ask what the vision tower looks at: which layer, which signal, and who is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import decoder_call
from test_contract import batch_of, by_sample, check, continued, reached, run, tower_pass, zipped
from test_methods_scope import by_hand as scoped
from torch import Tensor, nn
from tower_reference import scores_by_hand
from zoo import get_model

import vtc
from vtc.dialect.towers import Tower
from vtc.methods import Method, ModelFacts
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.hiprune import HiPrune
from vtc.methods.holov import HoloV
from vtc.methods.saliency import Salient, highest_of_groups, tiered
from vtc.methods.scope import SCOPE
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vscan import VScan
from vtc.models import resolve
from vtc.signals import Cls, Received, TowerFeatures
from vtc.tokens import Layout, VisualTokens

METHODS = [FasterVLM(), HiPrune(), HoloV(), HoloV(variant="paper"), SCOPE(), VisPruner(), VScan(), VisionZip()]


def looked(family: str, kind: str, layer: int) -> list[Tensor]:
    """What an eager pass of the tower says, for each token of each image."""
    attention = tower_pass(get_model(family), batch_of(family)).attentions[layer].mean(1)
    rows = attention[:, 0, 1:] if kind == "cls" else attention.mean(1)[:, 1:]
    return [scores_by_hand(rows, image) for image in reached(family)]


def places(family: str) -> list[list[tuple[int, int, int] | None]]:
    """(picture, row, column) of each token of each image, by the patches it depends on; ``None``: a newline."""
    found = []
    for image in reached(family):
        side = math.isqrt(image.shape[2] - 1)
        behind = [(token[:, 1:].nonzero()).tolist() for token in image]
        found.append([(own[0][0], *divmod(own[0][1], side)) if own else None for own in behind])
    return found


def regions(family: str) -> list[list[tuple[list[int], int]]]:
    """Of each image its pictures: the tokens in raster order, and how many columns they have."""
    found = []
    for image in places(family):
        pictures = sorted({place[0] for place in image if place})
        of = [[i for i, place in enumerate(image) if place and place[0] == picture] for picture in pictures]
        found.append([(own, len({image[i][2] for i in own})) for own in of])
    return found


def embeddings(family: str) -> list[Tensor]:
    """What enters the language model at the tokens of each image."""
    model, batch = get_model(family), batch_of(family)
    return [
        decoder_call(model, sample)["inputs_embeds"][0, columns]
        for sample, images in zip(batch.samples, batch.images, strict=True)
        for columns in images
    ]


def compare(family: str, method: Method, keep: list[Any], values: list[Tensor] | None = None) -> None:
    """Places of each image, and then the logits, in the batch and alone."""
    model, batch = get_model(family), batch_of(family)
    ours = by_sample(batch, [torch.tensor(sorted(own)) for own in keep])
    _, _, handle = run(model, batch, method)
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in ours]
    check(model, batch, method, continued(model, batch, ours, None if values is None else by_sample(batch, values)))


# ----------------------------------------------------------------------------------------------------- layers of towers


def tower(depth: int) -> Tower:
    return Tower(tuple(nn.Module() for _ in range(depth)), special=1)


@pytest.mark.parametrize(
    ("layer", "depth", "index"),
    [
        (1 / 3, 24, 8),
        (5 / 24, 24, 5),
        (1 / 3, 3, 1),
        (5 / 24, 3, 0),
        (0.0, 7, 0),
        (0.999, 7, 6),
        (0.1 + 0.2, 10, 3),
        (0.29, 100, 29),  # 28.999999999999996
        (2, 7, 2),
        (-2, 7, 5),
    ],
)
def test_a_share_of_the_depth_is_a_layer_of_every_tower(layer: float, depth: int, index: int) -> None:
    layers = tower(depth)
    assert TowerFeatures(layer=layer).of(layers) is layers.layers[index]


@pytest.mark.parametrize("layer", [7, -8])
def test_a_layer_that_the_tower_lacks_is_none(layer: int) -> None:
    assert TowerFeatures(layer=layer).of(tower(7)) is None


@pytest.mark.parametrize(
    ("layer", "error"),
    [(1.0, ValueError), (-0.5, ValueError), (math.nan, ValueError), (True, TypeError), ("8", TypeError)],
)
def test_what_is_no_layer_is_named(layer: Any, error: type[Exception]) -> None:
    for make in (lambda: Cls(layer=layer), lambda: Received(layer=layer)):
        with pytest.raises(error, match=rf"layer={layer!r}.*\[0, 1\)"):
            make()
    for method in (HiPrune, VScan):
        with pytest.raises(error, match=f"shallow={layer!r}"):
            method(shallow=layer)


def test_layers_are_plain_numbers_and_signals_values() -> None:
    assert type(Cls(layer=torch.iinfo(torch.int8).max).layer) is int
    assert Cls(layer=0.25) == Cls(layer=0.25) != Cls(layer=0.5)
    assert Cls(layer=0.25).layer == 0.25


# --------------------------------------------------------------------------------------------------------- which signal


def facts(*signals: str) -> ModelFacts:
    return ModelFacts(model_type="toy", width=8, depth=8, signals=frozenset(signals))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_published_signal_where_the_model_gives_it_else_the_other(method: Salient) -> None:
    published = "received" if method.name == "hiprune" else "cls"
    for given, chosen in ((("cls", "received"), published), (("cls",), "cls"), (("received",), "received")):
        settled = method.settle(facts(*given))
        assert settled.saliency == chosen
        (stage,) = settled.stages(facts(*given))
        assert stage.needs[0].kind == chosen
        assert {signal.kind for signal in stage.needs} - {"keys"} == {chosen}
    assert method.settle(facts()).saliency == published
    own = type(method)(saliency="received")
    assert own.settle(facts("cls", "received")).saliency == "received"


def test_layers_are_the_published_ones() -> None:
    def layers(method: Method, *signals: str) -> list[float]:
        return [signal.layer for signal in method.settle(facts(*signals)).stages(facts(*signals))[0].needs]

    for method in (FasterVLM(), HoloV(), SCOPE(), VisPruner()):
        assert layers(method, "cls", "received") == [-2]
        assert layers(method, "received") == [-1]
    assert layers(VisionZip(), "cls") == [-2, -2]
    assert layers(VisionZip(), "received") == [-1, -1]
    assert layers(VScan(), "cls") == [-2, 5 / 24]
    assert layers(VScan(), "received") == [-1, 5 / 24]
    assert layers(HiPrune(), "cls", "received") == [-2, 1 / 3]
    assert layers(HiPrune(), "received") == [-1, 1 / 2]
    assert layers(HiPrune(shallow=3, deep=0.5), "received") == [0.5, 3]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_model_that_gives_neither_is_refused(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model("llava")
    monkeypatch.setattr(type(resolve(model)[0]), "tower", lambda *args: None)
    with pytest.raises(ValueError, match=f"'{method.name}'"):
        vtc.patch(model, method)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "visionzip"], ids=lambda method: method.name)
def test_a_tower_without_a_cls_token_is_looked_at_by_what_patches_receive(method: Method) -> None:
    model, batch = get_model("llava_onevision"), batch_of("llava_onevision")
    with vtc.patch(model, method) as handle:
        assert handle.config.build().settle(resolve(model)[0].facts(resolve(model)[1])).saliency == "received"
        model.generate(**batch, max_new_tokens=2)
        kept = [len(own) for images in handle.last_keep for own in images]
    assert all(kept)


@pytest.mark.parametrize("method", [SCOPE, VisionZip], ids=lambda method: method.name)
def test_a_signal_that_is_none_is_named(method: type[Method]) -> None:
    with pytest.raises(ValueError, match=r"saliency='attention'.*'cls', 'received'"):
        method(saliency="attention")


def test_scores_are_float32_or_better_and_finite() -> None:
    row = torch.tensor([[0.5, math.nan, 1e-9]])
    for dtype, found in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        tokens = VisualTokens(torch.zeros(1, 3, 2), (Layout.plain(3),), (0,), {"cls": row.to(dtype)})
        scores = SCOPE().scores(tokens)
        assert scores.dtype == found
        assert scores[0, 1] == 0


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_scope_by_what_patches_receive(family: str) -> None:
    keep = [
        scoped(x, row, max(1, round(0.3 * len(x))))
        for x, row in zip(embeddings(family), looked(family, "received", -1), strict=True)
    ]
    compare(family, SCOPE(keep=0.3, saliency="received"), keep)


def test_visionzip_by_what_patches_receive() -> None:
    """Keys of the same layer."""
    model, batch = get_model("llava"), batch_of("llava")
    output, layer = tower_pass(model, batch), model.model.vision_tower
    layer = getattr(layer, "vision_model", layer).encoder.layers[-1]
    with torch.no_grad():
        key = layer.self_attn.k_proj(layer.layer_norm1(output.hidden_states[-2]))
        key = key.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(2)[:, 1:]
        features = output.hidden_states[model.config.vision_feature_layer][:, 1:]
        found = [
            zipped(x, row, keys, 5, 2)
            for x, row, keys in zip(features, looked("llava", "received", -1), key, strict=True)
        ]
        values = [model.model.multi_modal_projector(now) for _, now in found]
    compare("llava", VisionZip(keep=5, contextual=2, saliency="received"), [at.tolist() for at, _ in found], values)


# ------------------------------------------------------------------------------------------------------ what they share


def test_tiers_come_first_then_scores_then_places() -> None:
    tier = torch.tensor([[0, 2, 0, 2, 1, 0]])
    score = torch.tensor([[9.0, 1.0, 9.0, 1.0, 0.0, 10.0]])
    assert tiered(tier, score, 6).tolist() == [[1, 3, 4, 5, 0, 2]]


def test_each_group_has_its_own_highest() -> None:
    score = torch.tensor([[1.0, 2.0, 2.0, 9.0, 3.0, -math.inf], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    group = torch.tensor([[0, 1, 1, 2, 1, 2], [1, 1, 1, 0, 2, 2]])  # 2 is none
    found = highest_of_groups(score, group, torch.tensor([[1, 2], [3, 0]]))
    assert found.tolist() == [[True, True, False, False, True, False], [False, False, False, True, False, False]]
