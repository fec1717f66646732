"""The architecture, the processor, and loading the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vtc_tinyvlm.model as first
from vtc_tinyvlm.building import generation_config, llava_options, processor_options, square_images
from vtc_tinyvlm.model import IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS
from vtc_tinyvlm.scenes import PATCH, SIZE

from .scenes import FULL

CHECKPOINT = Path(__file__).parent / "checkpoint"
PINPOINTS = [[FULL, FULL], [SIZE, FULL], [FULL, SIZE]]  # (height, width)
MAX_POSITIONS = 1024


def build_config() -> Any:
    """A LlavaNextConfig around the first checkpoint's vision tower and language model."""
    from transformers import LlavaNextConfig

    base = first.build_config()
    base.text_config.max_position_embeddings = MAX_POSITIONS
    options = llava_options(base.vision_config, base.text_config, IMAGE_TOKENS)
    return LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **options)


def build_model(warm: bool = True) -> Any:
    """A LlavaNextForConditionalGeneration; with `warm`, all but image_newline is the first checkpoint's."""
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration(build_config())
    if warm:
        missing, unexpected = model.load_state_dict(first.load()[0].state_dict(), strict=False)
        assert missing == ["model.image_newline"], missing
        assert not unexpected, unexpected
    model.generation_config = generation_config(max_new_tokens=3)
    return model


def build_processor() -> Any:
    """A LlavaNextProcessor of the first checkpoint's tokenizer and LLaVA-NeXT's Pillow image processor."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = first.build_processor().tokenizer
    tokenizer.model_max_length = MAX_POSITIONS
    square = square_images(SIZE, [IMAGE_MEAN] * 3, [IMAGE_STD] * 3)
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **square)
    return LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, **processor_options(PATCH))


def save(model: Any, directory: str | Path = CHECKPOINT) -> None:
    """Write model and processor, weights rounded to fp16."""
    first.save(model, directory, build_processor())


def load(directory: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """The shipped model (eval mode, fp32) and its processor, through plain `from_pretrained`."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(directory).eval()
    return model, AutoProcessor.from_pretrained(directory)
