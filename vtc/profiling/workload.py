"""Something to measure on: inputs of a given image size made from a config alone, and models with random weights.

Latency does not depend on what a picture shows or what weights have learned, so neither a processor nor a checkpoint is
needed. Where there is a processor, it cuts the picture; else the shapes that it would produce are made here.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.engine.encode import feature_lengths
from vtc.models import Parts, resolve

LONGEST_ASPECT = 200
"""Processors of the Qwen-VL line refuse pictures that are longer than this times their width."""


@dataclass(frozen=True)
class Workload:
    """What every sample of a batch consists of.

    Attributes:
        image: (width, height) of its one picture, in pixels; ``None``: what the vision tower takes in one piece, or
            672x672 where the size decides about the number of tokens.
        text: text tokens, the processor's own (begin of sequence, wrappers) counted.
        seed: of pixels and words.

    Raises:
        ValueError: a size or count below 1.
    """

    image: tuple[int, int] | None = None
    text: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image is not None and min(self.image) < 1:
            raise ValueError(f"image={self.image[0]}x{self.image[1]} has no pixels")
        if self.image is not None and max(self.image) > LONGEST_ASPECT * min(self.image):
            raise ValueError(
                f"image={self.image[0]}x{self.image[1]} is more than {LONGEST_ASPECT} times as long as it is wide, "
                "which processors refuse"
            )
        if self.text < 1:
            raise ValueError(f"text={self.text} must be at least 1: a prompt ends with a text token")

    def inputs(self, model: Any, batch: int, processor: Any = None) -> dict[str, Tensor]:
        """A batch of prompts as ``model(**inputs)`` takes them: one picture, then the text; no padding.

        Args:
            model: a transformers model.
            batch: samples; each has pixels of its own.
            processor: of the model, if there is one.

        Raises:
            ValueError: the processor refuses the picture; or there is none, and what it would do is not known here.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        _, parts = resolve(model)
        rng = torch.Generator().manual_seed(self.seed)
        samples = [self._sample(parts, rng, processor) for _ in range(batch)]
        inputs = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}

    def _sample(self, parts: Parts, rng: torch.Generator, processor: Any) -> dict[str, Tensor]:
        if processor is None:
            visual = _pixels(parts, self.image, rng)
            ids = [*_words(parts, 1, rng), *[parts.placeholders["image"]] * _tokens(parts, visual)]
        else:
            visual, ids = self._processed(parts, rng, processor)
        own = sum(token not in parts.placeholders.values() for token in ids)
        ids = torch.tensor([ids + _words(parts, max(1, self.text - own), rng)])
        visual |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        known = inspect.signature(parts.base.forward).parameters
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in known:  # prefix-LM families: images are the prefix; M-RoPE ones: 1 is an image
                visual[name] = (ids == parts.placeholders["image"]).long()
        if getattr(parts.config, "model_type", None) == "paligemma":
            visual["token_type_ids"] = torch.zeros_like(ids)
        return visual

    def _processed(self, parts: Parts, rng: torch.Generator, processor: Any) -> tuple[dict[str, Tensor], list[int]]:
        from PIL import Image

        width, height = self.image or _native(parts)
        picture = Image.fromarray(torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy())
        token = getattr(processor, "image_token", "<image>")
        try:
            made = dict(processor(images=[picture], text=[token], return_tensors="pt"))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"the processor refuses a picture of {width}x{height}: {error}") from error
        ids = made.pop("input_ids")[0].tolist()
        return {n: x for n, x in made.items() if isinstance(x, Tensor) and not n.endswith(("_mask", "_ids"))}, ids


def _native(parts: Parts) -> tuple[int, int]:
    side = getattr(parts.config.vision_config, "image_size", None)
    if hasattr(parts.config, "image_grid_pinpoints"):
        height, width = max(parts.config.image_grid_pinpoints, key=lambda sides: sides[0] * sides[1])
        return width, height
    return (672, 672) if _is_grid(parts) or not isinstance(side, int) else (side, side)


def _is_grid(parts: Parts) -> bool:
    return hasattr(parts.config.vision_config, "temporal_patch_size")


def _pixels(parts: Parts, image: tuple[int, int] | None, rng: torch.Generator) -> dict[str, Tensor]:
    """What the family's processor makes of one picture of (width, height), normalised."""
    config, vision = parts.config, parts.config.vision_config
    width, height = image or _native(parts)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    if _is_grid(parts):
        patch, merge, times = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        rows, columns = (max(1, round(side / (patch * merge))) * merge for side in (height, width))
        pixels = getattr(vision, "in_channels", 3) * times * patch * patch
        return {
            "pixel_values": noise(rows * columns, pixels),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
    if hasattr(config, "image_grid_pinpoints"):
        count = sys.modules[type(parts.base).__module__].image_size_to_num_patches(
            torch.tensor([height, width]), config.image_grid_pinpoints, vision.image_size
        )
        sizes = {"image_sizes": torch.tensor([[height, width]])}
        if config.model_type == "llava_onevision":
            sizes["batch_num_images"] = torch.tensor([1])
        return {"pixel_values": noise(1, count, 3, vision.image_size, vision.image_size), **sizes}
    if vision.model_type == "pixtral":
        cell = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        scale = min(1.0, vision.image_size / max(width, height))
        height, width = (max(1, math.ceil(side * scale / cell)) * cell for side in (height, width))
        return {"pixel_values": noise(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    if config.model_type in ("llava", "vipllava", "gemma3", "paligemma", "internvl"):
        sides = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
        tiles = _tiles(width, height, sides[0]) if config.model_type == "internvl" else 1
        return {"pixel_values": noise(tiles, 3, *sides)}
    raise ValueError(
        f"what the processor of model_type {config.model_type!r} makes of a picture is not known here; "
        "profile a checkpoint that has its processor with it"
    )


def _tiles(width: int, height: int, side: int, most: int = 12) -> int:
    """InternVL: tiles of the mosaic (at most 12) nearest to the picture's shape, and a thumbnail if there are several.

    Of equally good mosaics the larger one is taken if the picture fills half of it, as InternVL's processor does.
    """
    best, nearest = (1, 1), math.inf
    mosaics = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    for columns, rows in sorted(mosaics, key=lambda mosaic: mosaic[0] * mosaic[1]):
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * side * side * columns * rows):
            best, nearest = (columns, rows), distance
    count = best[0] * best[1]
    return count + (count > 1)


@torch.inference_mode()
def _tokens(parts: Parts, visual: Mapping[str, Tensor]) -> int:
    """How many features the encoder makes of one picture: it is asked."""
    weight = next(parts.root.parameters())
    given = {n: x.to(weight.device, weight.dtype if x.is_floating_point() else None) for n, x in visual.items()}
    names = inspect.signature(parts.base.get_image_features).parameters
    lengths = feature_lengths(
        parts.base.get_image_features(**{n: x for n, x in given.items() if n in names}, return_dict=True)
    )
    if not lengths:
        raise ValueError(f"the vision tower of this {type(parts.root).__name__} gives no list of features to count")
    return sum(lengths)


def _words(parts: Parts, count: int, rng: torch.Generator) -> list[int]:
    """Random ids that mean nothing special."""
    special = {
        value
        for config in (parts.root.config, parts.config, parts.decoder.config)
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    vocabulary = parts.decoder.config.vocab_size  # tokenizers put what is special at either end of it
    plain = [i for i in range(vocabulary // 4, vocabulary * 3 // 4) if i not in special] or [vocabulary // 2]
    return [plain[i] for i in torch.randint(len(plain), (count,), generator=rng).tolist()]


def random_model(config: Any, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, never zeros, made on ``device`` in ``dtype``: no copy of it passes through the host.

    Args:
        config: a config object, the name of a ``config.json`` or its folder, or a model's name on the hub.
        device: where it is made.
        dtype: of its weights.

    Raises:
        ValueError: the config has no vision tower, or is none that transformers builds such a model from.
        OSError: there is no such config.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if isinstance(config, (str, Path)):
        config = AutoConfig.from_pretrained(config)
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"the config of model_type {config.model_type!r} has no vision tower; a vision-language model is needed"
        )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval()
