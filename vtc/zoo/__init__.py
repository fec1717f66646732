"""The zoo: a tiny random model of every supported family, and prompts for it.

    from vtc.zoo import FAMILIES, get_model, make_batch, GREEDY
    batch = make_batch("llava_next", images_per_sample=(1, 2, 0), padding="left")
    get_model("llava_next").generate(**batch, **GREEDY)

`batch` is the dict of model inputs. It also carries what a test needs to check the result: `batch.samples`, every
sample alone and unpadded, and `batch.images`, where each image's visual tokens stand in its sample.
Works without the hub, torchvision or processors, in transformers 5.17 to 5.24.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from vtc.zoo import models
from vtc.zoo.inputs import (
    ANYRES_MAX_1,
    TEXT,
    AnyRes,
    Camera,
    Fixed,
    Gemma4Patches,
    Grid,
    Item,
    PixtralRows,
    Tiles,
    VideoLlava,
)
from vtc.zoo.parts import BOS, END, FIRST_TEXT, IMAGE, PAD, START, VIDEO, VOCAB

__all__ = ["FAMILIES", "GREEDY", "NEW_TOKENS", "SPECIAL_IDS", "Batch", "Family", "get_model", "make_batch"]

NEW_TOKENS = 8
PLACEHOLDERS = (IMAGE, VIDEO)
SPECIAL_IDS = list(range(FIRST_TEXT))

# Random models love to say "<image>", which no model can be asked to read back: special ids are suppressed. A static
# cache would compile the decoding step for minutes: compilation is off.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "min_new_tokens": NEW_TOKENS,
    "max_new_tokens": NEW_TOKENS,
    "suppress_tokens": SPECIAL_IDS,
    "disable_compile": True,
}


@dataclass(frozen=True)
class Family:
    """One entry of the zoo.

    name: also the test id.
    build: makes the model; `get_model` caches it.
    camera: makes its visual inputs.
    one_dim: positions are one row, so positions="compact" makes sense (False: m-rope).
    types: name of the token-type input that the model wants, if any.
    images_first: all images precede the text (PaliGemma).
    gap: text ids between two images; 0 puts their placeholders back to back.
    """

    name: str
    build: Callable[[], tf.PreTrainedModel]
    camera: Camera
    one_dim: bool = True
    types: str | None = None
    images_first: bool = False
    gap: int = 2

    def __str__(self) -> str:
        return self.name


class Batch(dict[str, Tensor]):
    """Model inputs, ready for `model(**batch)`.

    samples: the same prompts one by one, without padding.
    images: for every sample, for every entry of `last_keep`, the columns of its placeholders in the unpadded sample.
    offsets: the column of the batch at which each sample's first real token stands.
    """

    samples: list[dict[str, Tensor]]
    images: list[list[Tensor]]
    offsets: list[int]


def _image_key() -> str:
    """Video-LLaVA renamed its image input between 5.17 and 5.23."""
    model = getattr(tf, "VideoLlavaForConditionalGeneration", None)
    known = () if model is None else inspect.signature(model.get_image_features).parameters
    return "pixel_values_images" if "pixel_values_images" in known else "pixel_values"


def _families() -> list[Family]:
    square, gemma3 = Fixed(8, 16), Fixed(16, 16, (START,), (END,))
    mrope = functools.partial(Family, one_dim=False, types="mm_token_type_ids")
    part = functools.partial
    return [
        Family("llava", models.llava, square),
        Family("llava_adjacent", models.llava, square, gap=0),
        Family("llava_pixtral", models.llava_pixtral, PixtralRows(2)),
        Family("llava_mqt", models.llava_mqt, Fixed(8, 9)),
        Family("vipllava", models.vipllava, square),
        Family("llava_next", models.llava_next, AnyRes()),
        Family("llava_next_video_image", models.llava_next_video, AnyRes()),
        Family("llava_next_video", models.llava_next_video, AnyRes(video_tokens=8)),
        Family("llava_onevision", models.llava_onevision, AnyRes(ANYRES_MAX_1, single_crop_if_several=True)),
        Family("llava_onevision_video", models.llava_onevision, AnyRes(ANYRES_MAX_1, True, video_tokens=9)),
        Family("video_llava", models.video_llava, VideoLlava(_image_key())),
        mrope("qwen2_vl", models.qwen2_vl, Grid()),
        mrope("qwen2_5_vl", models.qwen2_5_vl, Grid()),
        mrope("qwen2_5_vl_video", models.qwen2_5_vl, Grid("block")),
        mrope("qwen3_vl", models.qwen3_vl, Grid()),
        mrope("qwen3_vl_video", models.qwen3_vl, Grid("frames")),
        mrope("qwen3_vl_moe", models.qwen3_vl_moe, Grid()),
        mrope("qwen3_5", models.qwen3_5, Grid()),
        mrope("glm46v", models.glm46v, Grid()),
        mrope("glm46v_video", models.glm46v, Grid("glm")),
        Family("internvl", models.internvl, Fixed(12, 9, (START,), (END,), tiles=(1, 3))),
        Family("idefics3", models.idefics3, Tiles()),
        Family("smolvlm", models.smolvlm, Tiles()),
        Family("mistral3", models.mistral3, PixtralRows(4)),
        Family("ministral3", models.ministral3, PixtralRows(4)),
        Family("gemma3", part(models.gemma3, 512), gemma3, types="token_type_ids"),
        Family("gemma3_window8", part(models.gemma3, 8), gemma3, types="token_type_ids"),
        Family("gemma4", part(models.gemma4, False, 8), Gemma4Patches(), types="mm_token_type_ids"),
        Family("gemma4_bidirectional", part(models.gemma4, True, 512), Gemma4Patches(), types="mm_token_type_ids"),
        Family("paligemma", models.paligemma, square, types="token_type_ids", images_first=True, gap=0),
    ]


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}


@functools.cache
def get_model(name: str) -> tf.PreTrainedModel:
    """The family's model, built once per session: leave it as you found it (`copy.deepcopy` it to change it)."""
    return FAMILIES[name].build()


# -------------------------------------------------------------------------------------------------------------- batches


def make_batch(
    family: Family | str,
    images_per_sample: Sequence[int] = (1, 2, 0),
    padding: str = "left",
    seed: int = 0,
) -> Batch:
    """A batch of prompts with different numbers of images and different lengths.

    padding: "left", "right", or "none", which lengthens the texts until all prompts are equally long. Then no mask is
    needed and `generate` drops it, although pruning leaves the samples with different lengths.
    """
    if padding not in ("left", "right", "none"):
        raise ValueError(f"padding must be 'left', 'right' or 'none', got {padding!r}")
    family = FAMILIES[family] if isinstance(family, str) else family
    rng = torch.Generator().manual_seed(seed)
    items: list[list[Item]] = []
    for count in images_per_sample:
        items.append(family.camera.shoot(count, sum(map(len, items)), rng))
    prompts = [_prompt(family, sample, index, rng) for index, sample in enumerate(items)]
    longest = max(len(ids) for ids, _ in prompts)
    if padding == "none":
        prompts = [(ids + _text(longest - len(ids), rng), kinds) for ids, kinds in prompts]
    rows = [_row(family, ids, kinds) for ids, kinds in prompts]
    return _assemble(family, items, rows, "left" if padding == "none" else padding)


def _text(count: int, rng: torch.Generator) -> list[int]:
    return list(map(int, torch.randint(FIRST_TEXT, VOCAB, (count,), generator=rng)))


def _prompt(family: Family, items: list[Item], index: int, rng: torch.Generator) -> tuple[list[int], dict[int, int]]:
    """The ids of one sample, and the kind (image, video) of every visual column."""
    # The closing text is longer than the small sliding windows (8), so that the window of a generated token holds no
    # visual token: whether a window counts dropped tokens is then no question (transformers.md, 3.5).
    opening, closing = [3, 5, 4][index % 3], [11, 9, 14][index % 3]
    ids: list[int] = [] if family.images_first else [BOS, *_text(opening, rng)]
    kinds: dict[int, int] = {}
    for position, item in enumerate(items):
        if position:
            ids += _text(family.gap, rng)
        kinds |= {len(ids) + i: item.kind for i, token in enumerate(item.ids) if token in PLACEHOLDERS}
        ids += item.ids
    if family.images_first:
        ids += [BOS, *_text(opening, rng)]
    return ids + _text(closing, rng), kinds


def _row(family: Family, ids: list[int], kinds: dict[int, int]) -> dict[str, list[int]]:
    row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if family.types is not None:
        # PaliGemma's type 0 means "prefix", images included; everywhere else the type names the modality.
        row[family.types] = [0 if family.images_first else kinds.get(i, TEXT) for i in range(len(ids))]
    return row


def _assemble(family: Family, items: list[list[Item]], rows: list[dict[str, list[int]]], padding: str) -> Batch:
    width = max(len(row["input_ids"]) for row in rows)
    batch = Batch()
    for key in rows[0]:
        filler = PAD if key == "input_ids" else 0
        batch[key] = torch.tensor([_padded(row[key], width, filler, padding) for row in rows])
    batch.update(family.camera.pack(items))
    batch.samples = [
        {key: torch.tensor([value]) for key, value in row.items()} | family.camera.pack([sample])
        for row, sample in zip(rows, items, strict=True)
    ]
    batch.images = [_columns(row["input_ids"], sample) for row, sample in zip(rows, items, strict=True)]
    batch.offsets = [width - len(row["input_ids"]) if padding == "left" else 0 for row in rows]
    return batch


def _padded(values: list[int], width: int, filler: int, padding: str) -> list[int]:
    fill = [filler] * (width - len(values))
    return fill + values if padding == "left" else values + fill


def _columns(ids: list[int], items: list[Item]) -> list[Tensor]:
    visual = torch.tensor([i for i, token in enumerate(ids) if token in PLACEHOLDERS])
    blocks = [size for item in items for size in item.blocks]
    return list(visual.split(blocks)) if blocks else []
