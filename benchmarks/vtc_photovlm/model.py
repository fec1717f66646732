"""The architecture, the processor, and loading the trained language model with the encoder it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vtc_tinyvlm.building import generation_config, llama_config, llava_options, processor_options, square_images

from . import encoder
from .cache import Unavailable, folder, sha256
from .photos import SIZE
from .sources import FONTS, PICTURES
from .vocabulary import VOCABULARY, build_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
FEATURE_LAYERS = (6, 12)
"""Hidden states that the projector is given side by side: the first knows what is written, the second what is there."""
IMAGE_TOKENS = (SIZE // encoder.PATCH) ** 2
FEATURES = encoder.WIDTH * len(FEATURE_LAYERS)
MAX_NEW_TOKENS = 4
TOWER = "model.vision_tower."
WIDTH, LAYERS = 256, 6


def build_config(width: int = WIDTH, layers: int = LAYERS, vision: Any = None) -> Any:
    """A ``LlavaConfig``: DINOv2 ViT-S/14 -> projector -> Llama; 256 visual tokens."""
    from transformers import LlavaConfig

    text = llama_config(len(VOCABULARY), width, width * 11 // 4, layers)
    vision = vision or encoder.build_config(SIZE)
    return LlavaConfig(**llava_options(vision, text, IMAGE_TOKENS, list(FEATURE_LAYERS)))


def assemble(config: Any) -> Any:
    """A freshly initialised model of this config (seed torch first); its tower is not yet the encoder."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(config)
    model.generation_config = generation_config(MAX_NEW_TOKENS)
    return model


def build_processor() -> Any:
    """A ``LlavaProcessor``: Pillow's image processor with DINOv2's mean and deviation, 224 px."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(**square_images(SIZE, encoder.IMAGE_MEAN, encoder.IMAGE_STD))
    return LlavaProcessor(image_processor=images, tokenizer=build_tokenizer(), **processor_options(encoder.PATCH))


def fold(state: dict[str, Tensor], mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Parameters that take features as they are, from those that were trained on standardised ones.

    Args:
        state: with the projector's first layer.
        mean: [features], what was subtracted.
        deviation: [features], what it was divided by.
    """
    weight, bias = (f"model.multi_modal_projector.linear_1.{each}" for each in ("weight", "bias"))
    scaled = state[weight] / deviation
    return state | {weight: scaled, bias: state[bias] - scaled @ mean}


def save(model: Any, directory: str | Path, mean: Tensor, deviation: Tensor) -> None:
    """Write projector, language model and processor; not the tower. Weights are rounded to fp16."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().float() for name, x in model.state_dict().items() if not name.startswith(TOWER)}
    state = {name: x.half().contiguous() for name, x in fold(state, mean, deviation).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = build_config(model.config.text_config.hidden_size, model.config.text_config.num_hidden_layers)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    build_processor().save_pretrained(directory)
    for file in directory.iterdir():  # safetensors writes 0600
        file.chmod(0o644)


def load(directory: str | Path = CHECKPOINT, tower: Any = None) -> tuple[Any, Any]:
    """The trained model with its encoder (eval mode, fp32) and its processor.

    Args:
        directory: of the trained part.
        tower: the vision tower; default: the encoder from the cache, fetched if it is not there.

    Raises:
        Unavailable: there is no trained part, or the encoder cannot be had; says what would work.
    """
    from safetensors.torch import load_file
    from transformers import AutoProcessor, LlavaConfig

    directory = Path(directory)
    if not (directory / "model.safetensors").exists():
        raise Unavailable(_untrained(directory))
    tower = tower or encoder.load(SIZE)
    model = assemble(LlavaConfig.from_pretrained(directory))
    state = {name: x.float() for name, x in load_file(directory / "model.safetensors").items()}
    state |= {TOWER + name: x for name, x in tower.state_dict().items()}
    model.load_state_dict(state)
    return model.eval(), AutoProcessor.from_pretrained(directory)


def ready() -> bool:
    """Whether trained part, encoder, pictures and fonts are all on this machine: then nothing has to be fetched."""
    pictures = all(package.folder.exists() for package in (*PICTURES, *FONTS.values()))
    return pictures and (folder() / encoder.CACHED).exists() and (CHECKPOINT / "model.safetensors").exists()


def whole(directory: str | Path = CHECKPOINT) -> Path:
    """A checkpoint folder with the encoder in it, which plain ``from_pretrained`` reads; made in the cache once.

    Raises:
        Unavailable: as :func:`load`.
    """
    trained = Path(directory) / "model.safetensors"
    if not trained.exists():
        raise Unavailable(_untrained(directory))
    place = folder() / f"photovlm-{sha256(trained)[:12]}"
    if not place.exists():
        model, processor = load(directory)
        part = place.with_suffix(".part")
        model.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(place)
    return place


def _untrained(directory: str | Path) -> str:
    return f"no trained model in {directory}: `python -m vtc_photovlm.train --state DIR` makes one"
