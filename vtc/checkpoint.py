"""Load any image-text-to-text checkpoint and ask it one question about one image: what `vtc run` does."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.config import CompressionConfig
from vtc.handle import Patch
from vtc.names import at_hand, folder_of
from vtc.patching import patch
from vtc.tokens import Layout, Segment
from vtc.values import shown
from vtc.viz import overlay
from vtc.viz.pixels import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PrunedImage:
    """One image as the model got it, and what stayed of it. One picture may become several images: tiles.

    Attributes:
        keep: kept indices among its tokens, ascending.
        layout: the structure of its tokens.
        pictures: the processor's pixels of each segment, back in colour; empty where they cannot be told apart
            (flattened patches, padded crops), and the tokens are drawn over the whole picture.
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
    """What the model said, and what stayed of its prompt.

    Attributes:
        text: the answer.
        total: visual tokens that the prompt had.
        images: what stayed of each; unpruned: none.
        verdict: with ``when="worthwhile"``, whether it was pruned, and why.
    """

    text: str
    total: int
    images: tuple[PrunedImage, ...] = ()
    verdict: str = ""

    @property
    def kept(self) -> int:
        """Visual tokens that reached the language model."""
        return sum(len(image.keep) for image in self.images) if self.images else self.total

    def draw(self, picture: Image) -> Image:
        """The kept tokens over ``picture`` as the processor cut it, tiles side by side.

        Raises:
            ValueError: the answer was not pruned, or the model does not tell its grid.
        """
        if not self.images:
            raise ValueError("nothing was pruned, so there is nothing to draw")
        segments: list[Segment] = []
        picks: list[int] = []
        pictures: list[Image] = []
        start = 0
        for image in self.images:
            segments += [dataclasses.replace(part, start=start + part.start) for part in image.layout.segments]
            picks += [start + i for i in image.keep.tolist()]
            pictures += image.pictures or [picture] * len(image.segments)
            start += image.layout.length
        return overlay(pictures, picks, Layout(start, tuple(segments)))


@dataclass(frozen=True)
class Checkpoint:
    """A model and its processor."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu", dtype: str = "auto") -> Checkpoint:
        """From a local folder, the hub, or of a model that comes with vtc.

        Raises:
            ValueError: ``dtype`` is none of :data:`DTYPES`.
            ImportError: a model that comes with vtc is not installed.
            OSError: there is no such checkpoint, or it cannot be had now: said within seconds, with what would work.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if dtype not in DTYPES:
            raise ValueError(f"dtype={shown(dtype)} is none of {', '.join(DTYPES)}")
        name = folder_of(name)
        with at_hand(name):
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
            found = None if handle.last_keep is None else handle.report().verdict
            images = self._pruned_images(handle, inputs.get("pixel_values"))
            return Answer(text, total, images, "" if found is None else str(found))

    def _pruned_images(self, handle: Patch, pixels: Tensor | None) -> tuple[PrunedImage, ...]:
        if handle.last_keep is None or handle.last_layouts is None:
            return ()
        kept = zip(handle.last_keep[0], handle.last_layouts[0], strict=True)
        images = [PrunedImage(keep, layout) for keep, layout in kept]
        tiles = [] if pixels is None or pixels.dim() < 4 else list(pixels.flatten(0, -4))
        if len(tiles) != sum(len(image.segments) for image in images):
            return tuple(images)
        pictures = (to_picture(tile, self.processor.image_processor) for tile in tiles)
        return tuple(
            dataclasses.replace(image, pictures=tuple(itertools.islice(pictures, len(image.segments))))
            for image in images
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
