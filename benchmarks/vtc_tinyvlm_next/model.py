"""The architecture, the processor, and loading the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vtc_tinyvlm.model as first
from vtc_tinyvlm.model import BOS, EOS, IMAGE, IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS, PAD
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
    return LlavaNextConfig(
        vision_config=base.vision_config,
        text_config=base.text_config,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def build_model(warm: bool = True) -> Any:
    """A LlavaNextForConditionalGeneration; with `warm`, all but image_newline is the first checkpoint's."""
    from transformers import GenerationConfig, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration(build_config())
    if warm:
        missing, unexpected = model.load_state_dict(first.load()[0].state_dict(), strict=False)
        assert missing == ["model.image_newline"], missing
        assert not unexpected, unexpected
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=3, do_sample=False
    )
    return model


def build_processor() -> Any:
    """A LlavaNextProcessor of the first checkpoint's tokenizer and LLaVA-NeXT's Pillow image processor."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = first.build_processor().tokenizer
    tokenizer.model_max_length = MAX_POSITIONS
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save(model: Any, directory: str | Path = CHECKPOINT) -> None:
    """Write model and processor, weights rounded to fp16."""
    first.save(model, directory, build_processor())


def load(directory: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """The shipped model (eval mode, fp32) and its processor, through plain `from_pretrained`."""
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(directory).eval()
    return model, AutoProcessor.from_pretrained(directory)
