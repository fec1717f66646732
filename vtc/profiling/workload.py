"""Something to measure on: inputs of a given image size made from a config alone, and models with random weights.

Latency does not depend on what a picture shows or what weights have learned, so neither a processor nor a checkpoint is
needed. Where there is a processor, it cuts the picture; else what enters has the shapes that it would produce, by the
rule of the family's adapter (:meth:`vtc.models.Adapter.feed`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.feed import Feed, Picture
from vtc.models import Parts, resolve
from vtc.profiling.configs import config_of
from vtc.profiling.feed import feed_of

TILED = {
    *("llava", "llava_mqt", "vipllava", "llava_next", "llava_next_video", "llava_onevision"),
    *("gemma3", "paligemma", "internvl"),
}
"""Families whose pictures enter the tower as one or several of its own size."""
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
        settings: where there is no processor, entries of its ``preprocessor_config.json``; ``None``: as published with
            the family's checkpoints.

    Raises:
        ValueError: a size or count below 1.
    """

    image: tuple[int, int] | None = None
    text: int = 64
    seed: int = 0
    settings: Mapping[str, Any] | None = None

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
        feed = None
        if processor is None:
            feed = feed_of(parts, Picture(*(self.image or _native(parts))), self.settings)
        samples = [self._one_sample(parts, rng, processor, feed) for _ in range(batch)]
        inputs = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in inputs.items()}

    def _one_sample(self, parts: Parts, rng: torch.Generator, processor: Any, feed: Feed | None) -> dict[str, Tensor]:
        if feed is not None:
            visual = _pixels(parts, feed, rng)
            ids = [*_words(parts, 1, rng), *[parts.placeholders["image"]] * sum(feed.lengths)]
        else:
            visual, ids = self._processed(parts, rng, processor)
        there = sum(token not in parts.placeholders.values() for token in ids)  # text tokens around the image
        prompt = torch.tensor([ids + _words(parts, max(1, self.text - there), rng)])
        visual |= {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        known = inspect.signature(parts.base.forward).parameters
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in known:  # prefix-LM families: images are the prefix; M-RoPE ones: 1 is an image
                visual[name] = (prompt == parts.placeholders["image"]).long()
        if getattr(parts.config, "model_type", None) == "paligemma":
            visual["token_type_ids"] = torch.zeros_like(prompt)
        return visual

    def _processed(self, parts: Parts, rng: torch.Generator, processor: Any) -> tuple[dict[str, Tensor], list[int]]:
        from PIL import Image

        width, height = self.image or _native(parts)
        picture = Image.fromarray(torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy())
        token = getattr(processor, "image_token", "<image>")
        try:
            processed = dict(processor(images=[picture], text=[token], return_tensors="pt"))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"the processor refuses a picture of {width}x{height}: {error}") from error
        ids = processed.pop("input_ids")[0].tolist()
        return {n: x for n, x in processed.items() if isinstance(x, Tensor) and not n.endswith(("_mask", "_ids"))}, ids


def _native(parts: Parts) -> tuple[int, int]:
    side = getattr(parts.config.vision_config, "image_size", None)
    if hasattr(parts.config, "image_grid_pinpoints"):
        height, width = max(parts.config.image_grid_pinpoints, key=lambda sides: sides[0] * sides[1])
        return width, height
    if hasattr(parts.config.vision_config, "temporal_patch_size") or not isinstance(side, int):
        return 672, 672  # any size
    return side, side


def _pixels(parts: Parts, feed: Feed, rng: torch.Generator) -> dict[str, Tensor]:
    """What the family's processor makes of one picture, normalised."""
    family, vision = parts.config.model_type, parts.config.vision_config
    arguments = {name: torch.as_tensor(value) for name, value in feed.arguments.items()}

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    if "image_grid_thw" in arguments:
        values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": noise(feed.patches, values), **arguments}
    if vision.model_type == "pixtral":
        return {"pixel_values": noise(1, 3, *arguments["image_sizes"][0].tolist()), **arguments}
    if family not in TILED:
        raise ValueError(
            f"what the processor of model_type {family!r} makes of a picture is not known here; profile a checkpoint "
            "that has its processor with it"
        )
    sides = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
    pixels = noise(len(feed.sequences), 3, *sides)
    if "image_sizes" not in arguments:
        return {"pixel_values": pixels}
    if family == "llava_onevision":
        arguments["batch_num_images"] = torch.tensor([1])
    return {"pixel_values": pixels[None], **arguments}


def special_ids(parts: Parts) -> set[int]:
    """Ids that a model's configs give a meaning of their own: begin, end, padding, placeholders and their like."""
    values = [
        value
        for config in (parts.root.config, parts.config, parts.decoder.config)
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index"))
    ]
    return {i for value in values for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}


def _words(parts: Parts, count: int, rng: torch.Generator) -> list[int]:
    """Random ids that mean nothing special."""
    special = special_ids(parts)
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
        ValueError: what :func:`vtc.profiling.configs.config_of` refuses.
        OSError: there is no such config on the hub.
    """
    from transformers import AutoModelForImageTextToText

    config = config_of(config)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval()
