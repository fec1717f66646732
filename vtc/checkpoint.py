"""Load any image-text-to-text checkpoint and ask it one question about one image: what `vtc run` does."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.config import CompressionConfig
from vtc.patching import Patch, patch
from vtc.tokens import Layout, Segment
from vtc.values import shown

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class View:
    """One image as the model got it, and what stayed of it. One picture may become several images: tiles.

    Attributes:
        keep: kept indices among its tokens, ascending.
        layout: the structure of its tokens.
        pictures: the processor's pixels of each segment, back in colour; empty where they do not tell (flattened
            patches, padded crops), and the picture as a whole has to do.
    """

    keep: Tensor
    layout: Layout
    pictures: tuple[Image, ...] = ()

    @property
    def segments(self) -> list[Segment]:
        """Those that can be drawn."""
        return [segment for segment in self.layout.segments if segment.kind != "newline"]


@dataclass(frozen=True)
class Answer:
    """What the model said, how many visual tokens its prompt had, and what stayed of them (unpruned: no views)."""

    text: str
    total: int
    views: tuple[View, ...] = ()

    @property
    def kept(self) -> int:
        """Visual tokens that reached the language model."""
        return sum(len(view.keep) for view in self.views) if self.views else self.total

    def draw(self, picture: Image) -> Image:
        """The kept tokens over ``picture`` as the processor cut it, tiles side by side.

        Raises:
            ValueError: the answer was not pruned, or the model does not tell its grid.
        """
        from vtc.viz import overlay

        if not self.views:
            raise ValueError("nothing was pruned, so there is nothing to draw")
        segments: list[Segment] = []
        picks: list[int] = []
        pictures: list[Image] = []
        start = 0
        for view in self.views:
            segments += [dataclasses.replace(part, start=start + part.start) for part in view.layout.segments]
            picks += [start + i for i in view.keep.tolist()]
            pictures += view.pictures or [picture] * len(view.segments)
            start += view.layout.length
        return overlay(pictures, picks, Layout(start, tuple(segments)))


def open_image(path: Path) -> Image:
    """The picture as RGB, upright as its EXIF orientation says: as transformers' ``load_image`` opens it.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not os.path.isfile(path):
        raise ValueError(f"there is no image file {shown(str(path))}")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{shown(str(path))} is not an image that Pillow can read") from None


@dataclass(frozen=True)
class Checkpoint:
    """A model and its processor."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu", dtype: str = "auto") -> Checkpoint:
        """From a local folder or the hub.

        Raises:
            ValueError: ``dtype`` is none of :data:`DTYPES`.
            OSError: there is no such checkpoint.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if dtype not in DTYPES:
            raise ValueError(f"dtype={shown(dtype)} is none of {', '.join(DTYPES)}")
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        return cls(model.to(device).eval(), processor)

    def ask(
        self,
        image: Image,
        question: str,
        config: CompressionConfig | None = None,
        *,
        max_new_tokens: int = 64,
    ) -> Answer:
        """Answer greedily, pruned as ``config`` says or, without one, as the model is."""
        inputs = self.encode(image, question)
        total = int((inputs["input_ids"] == getattr(self.model.config, "image_token_id", -1)).sum())
        if config is None:
            return Answer(self._generate(inputs, max_new_tokens), total)
        with patch(self.model, config) as handle:
            text = self._generate(inputs, max_new_tokens)
            return Answer(text, total, self._views(handle, inputs.get("pixel_values")))

    def _views(self, handle: Patch, pixels: Tensor | None) -> tuple[View, ...]:
        if handle.last_keep is None or handle.last_layouts is None:
            return ()
        views = [View(keep, layout) for keep, layout in zip(handle.last_keep[0], handle.last_layouts[0], strict=True)]
        tiles = [] if pixels is None or pixels.dim() < 4 else list(pixels.flatten(0, -4))
        if len(tiles) != sum(len(view.segments) for view in views):
            return tuple(views)
        pictures = (to_picture(tile, self.processor.image_processor) for tile in tiles)
        return tuple(
            dataclasses.replace(view, pictures=tuple(itertools.islice(pictures, len(view.segments)))) for view in views
        )

    def encode(self, image: Image, question: str) -> Any:
        """The prompt as tensors: through the processor's chat template where it has one, else image token and text."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            token = getattr(self.processor, "image_token", "<image>")
            inputs = self.processor(images=image, text=f"{token}\n{question}", return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def _generate(self, inputs: Any, max_new_tokens: int) -> str:
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def to_picture(pixels: Tensor, image_processor: Any) -> Image:
    """Undo the normalisation of a processor's float pixels [3, H, W]."""
    from PIL import Image

    for name, undo in (("image_std", torch.mul), ("image_mean", torch.add)):
        if (value := getattr(image_processor, name, None)) is not None:
            pixels = undo(pixels, torch.tensor(value, device=pixels.device).view(-1, 1, 1))
    bytes_ = (pixels.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy(), "RGB")
