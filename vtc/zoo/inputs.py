"""Hand-made inputs: what a processor would hand to the model, without processors, tokenisers or the hub.

A prompt is text ids and *items* (images or videos). An item knows the ids it puts into the prompt (wrappers and
placeholders), how its placeholders divide into the entries of `last_keep`, and its pixels. A family's *camera* takes
the pictures of a sample and packs the pictures of several samples into one set of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vtc.zoo.parts import BREAK, END, FAKE, IMAGE, ROW, STAMP, START, VIDEO, VIDEO_END, VIDEO_START

TEXT, IMAGE_KIND, VIDEO_KIND = 0, 1, 2  # the values of mm_token_type_ids


@dataclass(frozen=True)
class Item:
    """One image or video of a prompt.

    ids: the ids it puts into the prompt.
    blocks: how many placeholders belong to each of its entries of `last_keep`, in prompt order. Usually one entry;
        tiles and frames that stand apart in the prompt have one each.
    pixels: what the camera needs to pack it.
    """

    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    pixels: dict[str, Any]
    kind: int = IMAGE_KIND


class Camera(Protocol):
    """Takes and packs pictures for one family."""

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        """The `count` items of one sample; `start` counts the items of the samples before, to vary sizes."""

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """The visual model inputs of a batch."""


def _noise(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def _flat(samples: Sequence[Sequence[Item]], kind: int = IMAGE_KIND) -> list[Item]:
    return [item for items in samples for item in items if item.kind == kind]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different sizes, zero-padded at the end of every dimension."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    out = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(out, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def _wrapped(tokens: int, token: int = IMAGE, before: Sequence[int] = (), after: Sequence[int] = ()) -> tuple[int, ...]:
    return (*before, *[token] * tokens, *after)


# ----------------------------------------------------------------------------------------------------- fixed resolution


@dataclass(frozen=True)
class Fixed:
    """One square picture, a fixed number of tokens: LLaVA-1.5, VipLLaVA, InternVL, Gemma3, PaliGemma."""

    side: int
    tokens: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    tiles: tuple[int, ...] = (1,)
    """How many tiles, one behind the other, the pictures have in turn."""

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        return [self._item(self.tiles[(start + index) % len(self.tiles)], rng) for index in range(count)]

    def _item(self, tiles: int, rng: torch.Generator) -> Item:
        ids = _wrapped(self.tokens * tiles, before=self.before, after=self.after)
        return Item(ids, (self.tokens * tiles,), {"picture": _noise(rng, tiles, 3, self.side, self.side)})

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        items = _flat(samples)
        return {"pixel_values": torch.cat([item.pixels["picture"] for item in items])} if items else {}


# ----------------------------------------------------------------------------------------------------------- any aspect

# (height, width) of a picture -> (crops with the thumbnail, tokens) for crops of 4 by 4 tokens under models.PINPOINTS:
# thumbnail 16, then rows of the stitched and un-padded grid, each closed by a newline.
ANYRES = {(8, 16): (3, 16 + 4 * 9), (4, 16): (3, 16 + 2 * 9), (16, 8): (3, 16 + 8 * 5), (8, 8): (2, 16 + 4 * 5)}
# The same where the stitched grid is scaled down to one crop's worth of tokens (OneVision with anyres_max_1).
ANYRES_MAX_1 = ANYRES | {(8, 16): (3, 16 + 2 * 6), (16, 8): (3, 16 + 5 * 3)}


@dataclass(frozen=True)
class AnyRes:
    """Thumbnail plus crops with newline tokens: LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision.

    single_crop_if_several: OneVision gives the pictures of a multi-image sample one crop and one newline each.
    video_tokens: placeholders of a video of two frames; then the first item of every sample is a video.
    """

    sizes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=lambda: ANYRES)
    single_crop_if_several: bool = False
    video_tokens: int = 0

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        videos = [self._video(rng)] if self.video_tokens and count else []
        images = count - len(videos)
        return videos + [self._image(start + index, images, rng) for index in range(images)]

    def _image(self, index: int, images: int, rng: torch.Generator) -> Item:
        size = list(self.sizes)[index % len(self.sizes)]
        crops, tokens = self.sizes[size]
        if self.single_crop_if_several and images > 1:
            crops, tokens = 1, 17
        pixels = {"crops": _noise(rng, crops, 3, 8, 8), "size": torch.tensor(size)}
        return Item(_wrapped(tokens), (tokens,), pixels)

    def _video(self, rng: torch.Generator) -> Item:
        pixels = {"frames": _noise(rng, 2, 3, 8, 8)}
        return Item(_wrapped(self.video_tokens, VIDEO), (self.video_tokens,), pixels, VIDEO_KIND)

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        images, videos, packed = _flat(samples), _flat(samples, VIDEO_KIND), {}
        if images:
            packed["pixel_values"] = _stack([item.pixels["crops"] for item in images])
            packed["image_sizes"] = torch.stack([item.pixels["size"] for item in images])
            if self.single_crop_if_several:
                packed["batch_num_images"] = torch.tensor([len(_flat([items])) for items in samples])
        if videos:
            packed["pixel_values_videos"] = torch.stack([item.pixels["frames"] for item in videos])
        return packed


@dataclass(frozen=True)
class VideoLlava:
    """Video-LLaVA: the first item of a sample is a video of two frames, CLS tokens included; then images."""

    image_key: str

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        video = Item(_wrapped(34, VIDEO), (34,), {"frames": _noise(rng, 2, 3, 8, 8)}, VIDEO_KIND)
        images = [Item(_wrapped(16), (16,), {"picture": _noise(rng, 3, 8, 8)}) for _ in range(count - 1)]
        return [video, *images] if count else []

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        images, videos, packed = _flat(samples), _flat(samples, VIDEO_KIND), {}
        if images:
            packed[self.image_key] = torch.stack([item.pixels["picture"] for item in images])
        if videos:
            packed["pixel_values_videos"] = torch.stack([item.pixels["frames"] for item in videos])
        return packed


# ---------------------------------------------------------------------------------------------------- native resolution


@dataclass(frozen=True)
class PixtralRows:
    """Pixtral: any size, a break token (text) after every row and an end token after the last; one entry per image."""

    cell: int  # pixels per token side

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        return [self._image(start + index, rng) for index in range(count)]

    def _image(self, index: int, rng: torch.Generator) -> Item:
        rows, columns = [(2, 4), (4, 3), (3, 3)][index % 3]
        size = (rows * self.cell, columns * self.cell)
        row = _wrapped(columns, after=(BREAK,))
        ids = (*(row * rows)[:-1], END)
        return Item(ids, (rows * columns,), {"picture": _noise(rng, 3, *size), "size": torch.tensor(size)})

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        items = _flat(samples)
        if not items:
            return {}
        pictures = _stack([item.pixels["picture"] for item in items])
        return {"pixel_values": pictures, "image_sizes": torch.stack([item.pixels["size"] for item in items])}


@dataclass(frozen=True)
class Grid:
    """Flattened patches and a (time, height, width) grid: the Qwen and GLM families.

    video: None, or the layout of the video that opens every sample: "block" is one run of placeholders (Qwen2-VL,
        Qwen2.5-VL), "frames" puts a time stamp before every frame (Qwen3-VL), "glm" does so with image placeholders.
    """

    video: str | None = None

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        # GLM finds image and video slots by the same id, so upstream cannot mix the two in one batch.
        videos = 0 if self.video is None else count if self.video == "glm" else min(count, 1)
        return [self._item(start + index, index < videos, rng) for index in range(count)]

    def _item(self, index: int, is_video: bool, rng: torch.Generator) -> Item:
        height, width = [(4, 8), (6, 6), (8, 4)][index % 3]
        times = 2 if is_video else 1
        pixels = {"patches": _noise(rng, times * height * width, 24), "grid": torch.tensor([times, height, width])}
        tokens = height * width // 4
        if not is_video:
            return Item(_wrapped(tokens, before=(START,), after=(END,)), (tokens,), pixels)
        if self.video == "block":
            ids = _wrapped(2 * tokens, VIDEO, (START,), (END,))
            return Item(ids, (2 * tokens,), pixels, VIDEO_KIND)
        if self.video == "frames":
            frame = _wrapped(tokens, VIDEO, (STAMP, START), (END,))
            return Item(frame * 2, (2 * tokens,), pixels, VIDEO_KIND)
        frame = _wrapped(tokens, IMAGE, (START,), (END, STAMP))
        return Item((VIDEO_START, *frame * 2, VIDEO_END), (2 * tokens,), pixels, VIDEO_KIND)

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        packed = {}
        for kind, pixels, grid in (
            (IMAGE_KIND, "pixel_values", "image_grid_thw"),
            (VIDEO_KIND, "pixel_values_videos", "video_grid_thw"),
        ):
            if items := _flat(samples, kind):
                packed[pixels] = torch.cat([item.pixels["patches"] for item in items])
                packed[grid] = torch.stack([item.pixels["grid"] for item in items])
        return packed


@dataclass(frozen=True)
class Tiles:
    """Idefics3 and SmolVLM: tiles with text between them, pixel tensors padded to the longest sample's tile count."""

    tokens: int = 9
    side: int = 12

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        return [self._image(start + index, rng) for index in range(count)]

    def _image(self, index: int, rng: torch.Generator) -> Item:
        tiles = [2, 1, 2][index % 3]  # the last one is the thumbnail
        ids = _wrapped(self.tokens, before=(FAKE, ROW)) * tiles
        pixels = {"tiles": _noise(rng, tiles, 3, self.side, self.side)}
        return Item((*ids, FAKE), (self.tokens,) * tiles, pixels)

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        if not _flat(samples):
            return {}
        empty = torch.zeros(0, 3, self.side, self.side)
        tiles = [torch.cat([empty, *(item.pixels["tiles"] for item in items)]) for items in samples]
        seen = [torch.ones(len(tile), self.side, self.side, dtype=torch.long) for tile in tiles]
        return {"pixel_values": _stack(tiles), "pixel_attention_mask": _stack(seen)}


@dataclass(frozen=True)
class Gemma4Patches:
    """Gemma4: patches with their (x, y), padded to a fixed number, pooled two by two."""

    limit: int = 48

    def shoot(self, count: int, start: int, rng: torch.Generator) -> list[Item]:
        return [self._image(start + index, rng) for index in range(count)]

    def _image(self, index: int, rng: torch.Generator) -> Item:
        height, width = [(4, 6), (6, 8), (6, 4)][index % 3]
        patches = torch.zeros(self.limit, 12)
        patches[: height * width] = torch.rand(height * width, 12, generator=rng)
        places = torch.full((self.limit, 2), -1)
        places[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        tokens = height * width // 4
        pixels = {"patches": patches, "places": places}
        return Item(_wrapped(tokens, before=(START,), after=(END,)), (tokens,), pixels)

    def pack(self, samples: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        items = _flat(samples)
        if not items:
            return {}
        patches, places = (torch.stack([item.pixels[key] for item in items]) for key in ("patches", "places"))
        return {"pixel_values": patches, "image_position_ids": places}
