"""Model families: what is listed, what adapters say of an image's tokens, and how a user adds a family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from reference import continue_by_hand
from torch import Tensor
from zoo import FAMILIES, GREEDY, NEW_TOKENS, SPECIAL_IDS, Batch, Family, get_model, make_batch
from zoo import models as zoo_models
from zoo.inputs import ANYRES, ANYRES_MAX_1, AnyRes, Fixed

import vtc
from vtc.dialect.towers import Tower
from vtc.models import base as registry
from vtc.models import families, resolve
from vtc.signals import Cls, ClsLogits
from vtc.tokens import Layout, Segment

# ------------------------------------------------------------------------------------------------------------- the list

BOTH = ("image", "video")
PROMISED = {  # the families that the project sets out to support, by their name in transformers
    "llava": ("image",),  # LLaVA-1.5, and Pixtral's transformers checkpoints
    "llava_mqt": ("image",),
    "vipllava": ("image",),
    "llava_next": ("image",),
    "llava_onevision": BOTH,
    "llava_next_video": BOTH,
    "video_llava": BOTH,
    "qwen2_vl": BOTH,
    "qwen2_5_vl": BOTH,
    "qwen3_vl": BOTH,
    "qwen3_vl_moe": BOTH,
    "qwen3_5": BOTH,
    "internvl": ("image",),
    "smolvlm": ("image",),
    "idefics3": ("image",),
    "mistral3": ("image",),
    "gemma3": ("image",),
    "gemma4": ("image",),
    "paligemma": ("image",),
    "glm46v": BOTH,
}
WITH_CLS = {"llava", "vipllava", "llava_next", "llava_next_video", "video_llava", "internvl"}


def test_every_promised_family_is_listed() -> None:
    listed = {family.model_type: family for family in families()}
    assert "llava" in vtc.list_models()  # names, like list_methods()
    assert PROMISED.keys() <= listed.keys()
    for model_type, modalities in PROMISED.items():
        assert set(modalities) <= set(listed[model_type].modalities), model_type
        assert ("cls" in listed[model_type].signals) == (model_type in WITH_CLS), model_type
    assert list(listed) == sorted(listed)


def test_what_is_listed_as_tested_is_in_the_zoo() -> None:
    tested = {get_model(name).config.model_type for name in FAMILIES}
    assert set(vtc.list_models()) <= tested


@pytest.mark.parametrize("family", FAMILIES)
def test_cls_is_offered_exactly_where_a_tower_has_one(family: str) -> None:
    model = get_model(family)
    has_cls = any(name.endswith(("class_embedding", "cls_token")) for name, _ in model.named_parameters())
    adapter, parts = resolve(model)
    has_cls = has_cls and not adapter.matryoshka  # there no token has a patch of its own
    assert [adapter.gives(parts, signal) for signal in (Cls(), ClsLogits())] == [has_cls] * 2
    assert {"cls", "cls_logits"} <= adapter.facts(parts).signals or not has_cls
    assert not adapter.gives(parts, Cls(layer=-99))


# -------------------------------------------------------------------------------------------------------------- layouts


@torch.no_grad()
def layouts_in(model: Any, batch: Batch) -> list[list[Layout]]:
    """The layouts that a method would see, by sample and image."""
    with vtc.patch(model, "grid", keep=0.5) as patch:
        model(**batch)
        return patch.last_layouts


def picture(rows: int, columns: int) -> Layout:
    return Layout.plain(rows * columns, (rows, columns))


def frames(count: int, rows: int, columns: int, newline: bool = False) -> Layout:
    each = rows * columns
    segments = [Segment("frame", f * each, each, (rows, columns)) for f in range(count)]
    if newline:
        segments.append(Segment("newline", count * each, 1))
    return Layout(count * each + newline, tuple(segments))


def thumbnail_and_crops(rows: int, columns: int, crops: tuple[int, int], shrunk: bool = False) -> Layout:
    """Crops are 4 x 4 patches; padding is cut off both sides alike. A shrunk token belongs where its centre is."""

    def owners(tokens: int, parts: int, unpadded: int) -> tuple[int, ...]:
        margin = (4 * parts - unpadded) // 2
        return tuple(math.ceil((margin + (i + 0.5) * unpadded / tokens) / 4 - 1e-9) - 1 for i in range(tokens))

    full = (rows, columns) if not shrunk else tuple(4 * n for n in crops)  # no test shrinks what was padded
    where = [owners(n, parts, u) for n, parts, u in zip((rows, columns), crops, full, strict=True)]
    mosaic = Segment("crops", 16, rows * (columns + 1), (rows, columns), True, crops, *where)
    return Layout(16 + mosaic.length, (Segment("thumbnail", 0, 16, (4, 4)), mosaic))


def thumbnail_alone() -> Layout:
    return Layout(17, (Segment("image", 0, 16, (4, 4)), Segment("newline", 16, 1)))


def pictures_of(rows_and_columns: list[tuple[int, int]]) -> list[Layout]:
    return [picture(rows, columns) for rows, columns in rows_and_columns]


# What the zoo's cameras took for the prompts with one, two and no images; sizes in tokens.
QWEN = pictures_of([(2, 4), (3, 3), (4, 2)])
WIDE, TALL = (1, 2), (2, 1)  # crops
ANY = [thumbnail_and_crops(4, 8, WIDE), thumbnail_and_crops(2, 8, WIDE), thumbnail_and_crops(8, 4, TALL)]
TWO_FRAMES = Layout(34, (Segment("frame", 0, 17), Segment("frame", 17, 17)))  # 16 patches and CLS: no grid
TILES = Layout(  # InternVL's second picture: two tiles and the thumbnail behind them
    27, (*(Segment("crops", 9 * tile, 9, (3, 3)) for tile in (0, 1)), Segment("thumbnail", 18, 9, (3, 3)))
)
EXPECTED: dict[str, list[Layout]] = {
    "llava": pictures_of([(4, 4)] * 3),
    "llava_adjacent": pictures_of([(4, 4)] * 3),
    "llava_pixtral": pictures_of([(2, 4), (4, 3), (3, 3)]),
    "llava_mqt": [Layout.plain(9)] * 3,  # no token has a place
    "vipllava": pictures_of([(4, 4)] * 3),
    "llava_next": ANY,
    "llava_next_video_image": ANY,
    "llava_next_video": [frames(2, 2, 2), frames(2, 2, 2), thumbnail_and_crops(2, 8, WIDE)],
    # 4 x 8 patches are over the limit of one crop's 16 and shrink by sqrt(2); several images have one crop each
    "llava_onevision": [thumbnail_and_crops(2, 5, WIDE, shrunk=True), thumbnail_alone(), thumbnail_alone()],
    "llava_onevision_video": [frames(2, 2, 2, True), frames(2, 2, 2, True), thumbnail_and_crops(2, 8, WIDE)],
    "video_llava": [TWO_FRAMES, TWO_FRAMES, picture(4, 4)],
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen2_5_vl_video": [frames(2, 2, 4), frames(2, 3, 3), picture(4, 2)],
    "qwen3_vl": QWEN,
    "qwen3_vl_video": [frames(2, 2, 4), frames(2, 3, 3), picture(4, 2)],
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "glm46v": QWEN,
    "glm46v_video": [frames(2, 2, 4), frames(2, 3, 3), frames(2, 4, 2)],
    "internvl": [picture(3, 3), TILES, picture(3, 3)],
    "idefics3": pictures_of([(3, 3)] * 5),
    "smolvlm": pictures_of([(3, 3)] * 5),
    "mistral3": pictures_of([(2, 4), (4, 3), (3, 3)]),
    "ministral3": pictures_of([(2, 4), (4, 3), (3, 3)]),
    "gemma3": pictures_of([(4, 4)] * 3),
    "gemma3_window8": pictures_of([(4, 4)] * 3),
    "gemma4": pictures_of([(2, 3), (3, 4), (3, 2)]),
    "gemma4_bidirectional": pictures_of([(2, 3), (3, 4), (3, 2)]),
    "paligemma": pictures_of([(4, 4)] * 3),
}
UNTOLD = {"mistral3", "ministral3", "gemma4", "gemma4_bidirectional"}
"""Families whose adapter may leave the grid out (None), but must not make one up."""


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_the_geometry_of_the_pictures(family: str) -> None:
    batch = make_batch(family)
    found, expected = layouts_in(get_model(family), batch), EXPECTED[family]
    flat = [layout for images in found for layout in images]
    assert [[layout.length for layout in images] for images in found] == [
        [len(columns) for columns in images] for images in batch.images
    ]
    for ours, theirs in zip(flat, expected, strict=True):
        assert ours.length == theirs.length
        assert ours == theirs or (family in UNTOLD and ours == Layout.plain(ours.length)), family


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("mistral3", {"image_sizes": torch.tensor([[8, 32]])}),  # pixels; a token is two patches of two on each side
        ("gemma4", {"image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(16)).flip(-1)[None]}),
        ("llava_pixtral", {"image_sizes": torch.tensor([[4, 16]])}),
        ("qwen2_vl", {"image_grid_thw": torch.tensor([[1, 4, 16]])}),
    ],
)
def test_a_square_number_of_tokens_is_no_square_picture(family: str, arguments: dict[str, Tensor]) -> None:
    """A picture of 2 x 8 tokens has 16 of them, as a square of 4 x 4 would. Not telling is fine, making up is not."""
    adapter, parts = resolve(get_model(family))
    (layout,) = adapter.layouts(parts.base, "image", [16], arguments)
    assert layout.length == 16
    assert layout.segments[0].grid in (None, (2, 8))


# Wide, tall, nearly square; sizes in pixels, two of them to a patch, eight to a crop.
ASPECTS = [(8, 16), (16, 8), (8, 8), (4, 16), (16, 4), (6, 16), (8, 12), (12, 8), (5, 7), (20, 9), (4, 24), (64, 64)]


def mosaic(height: int, width: int, most: int | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Crops (rows, columns) and tokens (rows, columns) after un-padding, from the papers and not from transformers.

    LLaVA-NeXT fits the picture into the allowed resolution that keeps most of it, without distortion, pads what is
    left over, and drops the rows or columns of tokens that are padding. LLaVA-OneVision then shrinks the mosaic when
    it has more tokens than `most` crops.
    """

    def fit(resolution: list[int]) -> tuple[int, int]:
        scale = min(resolution[0] / height, resolution[1] / width)
        effective = min(int(height * scale) * int(width * scale), height * width)
        return effective, -(resolution[0] * resolution[1] - effective)

    best = max(zoo_models.PINPOINTS, key=fit)
    rows, columns = best[0] // 2, best[1] // 2
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    shrink = 1.0 if most is None else math.sqrt(rows * columns / (most * 16))
    if shrink > 1.1:
        rows, columns = int(rows // shrink), int(columns // shrink)
    return (best[0] // 8, best[1] // 8), (rows, columns)


def test_the_papers_geometry_is_the_zoos() -> None:
    for sizes, most in ((ANYRES, None), (ANYRES_MAX_1, 1)):
        for (height, width), (pictures, tokens) in sizes.items():
            crops, (rows, columns) = mosaic(height, width, most)
            assert (1 + math.prod(crops), 16 + rows * (columns + 1)) == (pictures, tokens)


def with_pictures(family: str, sizes: list[tuple[int, int]], most: int | None) -> Family:
    table = {}
    for height, width in sizes:
        crops, (rows, columns) = mosaic(height, width, most)
        table[height, width] = (1 + math.prod(crops), 16 + rows * (columns + 1))
    return dataclasses.replace(FAMILIES[family], camera=AnyRes(table, family == "llava_onevision"))


ANYRES_FAMILIES = {"llava_next": None, "llava_next_video_image": None, "llava_onevision": 1}


@torch.no_grad()
@pytest.mark.parametrize(("family", "most"), ANYRES_FAMILIES.items())
def test_any_resolution_layouts_for_many_aspect_ratios(family: str, most: int | None) -> None:
    batch = make_batch(with_pictures(family, ASPECTS, most), (1,) * len(ASPECTS))
    found = layouts_in(get_model(family), batch)
    for size, (layout,) in zip(ASPECTS, found, strict=True):
        crops, tokens = mosaic(*size, most)
        shrunk = tokens != mosaic(*size)[1]
        if shrunk and mosaic(*size)[1] != (4 * crops[0], 4 * crops[1]):
            (bare,) = thumbnail_and_crops(*tokens, crops, shrunk=True).of_kind("crops")
            (segment,) = layout.of_kind("crops")
            assert (segment.grid, segment.crops) == (bare.grid, bare.crops)  # whose tokens these are, nobody can say
        else:
            assert layout == thumbnail_and_crops(*tokens, crops, shrunk), size


@torch.no_grad()
@pytest.mark.parametrize(("family", "most"), ANYRES_FAMILIES.items())
def test_newlines_are_where_the_model_put_them(family: str, most: int | None) -> None:
    """Ask the features themselves: a newline token is the learned embedding, and nothing else is."""
    model, batch = get_model(family), make_batch(with_pictures(family, ASPECTS, most), (1,) * len(ASPECTS))
    newline = model.model.image_newline
    for sample, (layout,) in zip(batch.samples, layouts_in(model, batch), strict=True):
        arguments = {key: value for key, value in sample.items() if key in ("pixel_values", "image_sizes")}
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
        is_newline = torch.isclose(features[0], newline, rtol=0, atol=1e-6).all(-1)
        assert is_newline.nonzero()[:, 0].tolist() == layout.newlines()


# ---------------------------------------------------------------------------------------------- a family of one's own


@pytest.fixture
def empty_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class ToyConfig(tf.LlavaConfig):
    model_type = "toy_vlm"


@functools.cache
def toy() -> Any:
    text = tf.LlamaConfig(**zoo_models._text())
    sizes = {"image_token_index": zoo_models.IMAGE, "image_seq_length": 16}
    config = ToyConfig(vision_config=zoo_models._clip(), text_config=text, **sizes)
    return zoo_models._finish(tf.LlavaForConditionalGeneration, config)


@pytest.mark.usefixtures("empty_shelf")
def test_a_users_own_adapter() -> None:
    """The one of the README, for a family whose pictures are wide."""
    assert toy().config.model_type == "toy_vlm"
    batch = make_batch("llava")
    assert layouts_in(toy(), batch)[0] == [picture(4, 4)]  # what the default adapter makes of it

    @vtc.register_model
    class Toy(vtc.Adapter):
        families: ClassVar = {"toy_vlm": ("image",)}

        def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Any) -> list[Layout]:
            return [Layout.plain(n, grid=(n // 8, 8)) for n in lengths]

    assert "toy_vlm" in vtc.list_models()
    assert layouts_in(toy(), batch)[0] == [picture(2, 8)]


@pytest.mark.usefixtures("empty_shelf")
def test_a_users_own_signal() -> None:
    """An adapter that offers a CLS row makes the methods that need one available."""
    model = toy()
    with pytest.raises(ValueError, match="needs 'cls'"):
        vtc.patch(model, "todre")

    @vtc.register_model
    class Toy(vtc.Adapter):
        families: ClassVar = {"toy_vlm": ("image",)}
        has_cls = True

        def tower(self, base: Any, modality: str) -> Any:
            return Tower.of(base.vision_tower)

    with torch.no_grad(), vtc.patch(model, "todre", keep=3) as patch:
        model(**make_batch("llava"))
        assert [len(kept) for images in patch.last_keep for kept in images] == [3, 3, 3]


@pytest.mark.usefixtures("empty_shelf")
def test_an_adapter_knows_the_placeholders_better_than_the_config() -> None:
    model = zoo_models._finish(tf.LlavaForConditionalGeneration, toy().config.__class__(**toy().config.to_dict()))
    model.config.image_token_id = None

    @vtc.register_model
    class Toy(vtc.Adapter):
        families: ClassVar = {"toy_vlm": ("image",)}

        def placeholders(self, config: Any) -> dict[str, int]:
            return {"image": 77}

    assert resolve(model)[1].placeholders == {"image": 77}


def adapter(**attributes: Any) -> type[vtc.Adapter]:
    return type("Mine", (vtc.Adapter,), {"__qualname__": "mine.Mine", **attributes})


@pytest.mark.usefixtures("empty_shelf")
def test_a_family_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"'llava' is registered already, by Llava"):
        vtc.register_model(adapter(families={"llava": ("image",)}))
    first = vtc.register_model(adapter(families={"new_vlm": ("image",)}))
    assert vtc.register_model(first) is first  # a reloaded module registers again
    with pytest.raises(ValueError, match=r"'new_vlm' is registered already, by Mine"):
        vtc.register_model(adapter(families={"new_vlm": ("image",)}, __qualname__="other.Mine"))


@pytest.mark.usefixtures("empty_shelf")
def test_a_refused_adapter_registers_nothing() -> None:
    before = vtc.list_models()
    with pytest.raises(ValueError, match="'llava' is registered already"):
        vtc.register_model(adapter(families={"brand_new": ("image",), "llava": ("image",)}))
    assert vtc.list_models() == before


@pytest.mark.usefixtures("empty_shelf")
def test_an_adapter_without_families_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Mine.families is empty; name at least one model_type"):
        vtc.register_model(adapter())


# --------------------------------------------------------------------------------------- families nobody registered


def aya_vision() -> Any:
    config = tf.AyaVisionConfig(
        vision_config=zoo_models._siglip(),
        text_config=tf.CohereConfig(**zoo_models._text()),
        image_token_index=zoo_models.IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    return zoo_models._finish(tf.AyaVisionForConditionalGeneration, config)


def got_ocr2() -> Any:
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 4, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]}
    text = tf.Qwen2Config(**zoo_models._text())
    config = tf.GotOcr2Config(vision_config=vision, text_config=text, image_token_index=zoo_models.IMAGE)
    return zoo_models._finish(tf.GotOcr2ForConditionalGeneration, config)


UNREGISTERED: dict[str, tuple[Callable[[], Any], Fixed]] = {
    "aya_vision": (aya_vision, Fixed(8, 4)),
    "got_ocr2": (got_ocr2, Fixed(64, 16)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNREGISTERED)
def test_an_unregistered_family_of_the_same_build(name: str) -> None:
    """The default adapter takes it, and it is pruned as the hand-written reference says."""
    build, camera = UNREGISTERED[name]
    model = build()
    assert name == model.config.model_type
    assert name not in vtc.list_models()
    batch = make_batch(Family(name, build, camera))
    with vtc.patch(model, "divprune", keep=0.5) as patch:
        tokens = model.generate(**batch, **GREEDY)[:, -NEW_TOKENS:]
        sets = patch.last_keep
    assert [[len(kept) for kept in images] for images in sets] == [[camera.tokens // 2] * n for n in (1, 2, 0)]
    for row, sample, images, keep in zip(tokens, batch.samples, batch.images, sets, strict=True):
        by_hand = continue_by_hand(model, sample, images, keep, new_tokens=NEW_TOKENS, suppress=SPECIAL_IDS)
        assert row.tolist() == by_hand.tokens.tolist()


def test_what_follows_the_patches_needs_no_projector() -> None:
    """In vLLM a base model has a tower and no projector beside it."""
    from types import SimpleNamespace

    model = get_model("llava")
    adapter, parts = vtc.models.resolve(model)
    bare = SimpleNamespace(vision_tower=parts.base.vision_tower, config=parts.config)
    rows = torch.rand(2, 16)
    found = adapter.per_token(bare, "image", rows, [Layout.plain(16)] * 2, {})
    assert torch.equal(torch.stack(found), rows)
