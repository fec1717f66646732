"""The architecture, the processor, and loading the shipped checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .building import (
    SPECIAL,
    fast_tokenizer,
    generation_config,
    llama_config,
    llava_options,
    processor_options,
    square_images,
)
from .questions import DIRECTIONS
from .scenes import COLOR_NAMES, PATCH, SHAPES, SIZE

CHECKPOINT = Path(__file__).parent / "checkpoint"
IMAGE_MEAN, IMAGE_STD = 0.45, 0.25
IMAGE_TOKENS = (SIZE // PATCH) ** 2

_PLAIN = (
    "what", "color", "shape", "digit", "is", "are", "the", "a", "on", "object", "objects", "how", "many", "there", "?",
    "nothing", "yes", "no",
)  # fmt: skip
_RELATION = sorted({word for name in DIRECTIONS for word in name.split()})
VOCABULARY = {
    word: index
    for index, word in enumerate((*SPECIAL, *_PLAIN, *_RELATION, *COLOR_NAMES, *SHAPES, *(str(d) for d in range(10))))
}


def build_config() -> Any:
    """A LlavaConfig: CLIP ViT (5 layers, width 128) -> projector -> Llama (5 layers, width 192); 144 visual tokens."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = llama_config(len(VOCABULARY), width=192, inner=512, layers=5)
    return LlavaConfig(**llava_options(vision, text, IMAGE_TOKENS))


def build_model() -> Any:
    """A freshly initialised LlavaForConditionalGeneration (seed torch first)."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(build_config())
    model.generation_config = generation_config(max_new_tokens=3)
    return model


def build_processor() -> Any:
    """A LlavaProcessor of a word-level tokenizer and CLIP's Pillow image processor."""
    from tokenizers import models
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = fast_tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    images = CLIPImageProcessorPil(**square_images(SIZE, [IMAGE_MEAN] * 3, [IMAGE_STD] * 3))
    return LlavaProcessor(image_processor=images, tokenizer=tokenizer, **processor_options(PATCH))


def save(model: Any, directory: str | Path = CHECKPOINT, processor: Any = None) -> None:
    """Write model and processor (default: this model's). Weights are rounded to fp16, config says float32: a plain load
    computes in fp32.
    """
    import copy
    import json

    directory = Path(directory)
    copy.deepcopy(model).half().save_pretrained(directory)
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (processor or build_processor()).save_pretrained(directory)
    for file in directory.iterdir():  # safetensors writes 0600
        file.chmod(0o644)


def load(directory: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """The shipped model (eval mode, fp32) and its processor, through plain `from_pretrained`."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    return model, AutoProcessor.from_pretrained(directory)
