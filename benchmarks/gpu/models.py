"""Random models of real shape, and of the same shape made small, with prompts for them. No checkpoint, no processor.

Weights are drawn wide enough that attention is not flat: in transformers' own narrow initialisation a small model
hardly looks at its picture, and a check on it would prove little. Nothing is zero but biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as tf
from torch import Tensor

TEXT = 64
"""Prompt tokens that are not visual; of these, the opening stands before the image."""
OPENING = 35


@dataclass(frozen=True)
class Size:
    """Widths and depths; ``side`` in pixels, or for Qwen in patches."""

    width: int
    mlp: int
    layers: int
    heads: int
    groups: int
    vocab: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    side: int
    patch: int
    text: int = TEXT


@dataclass(frozen=True)
class Spec:
    """One model and its input.

    Attributes:
        name: in the table.
        size: of the real thing.
        keep: visual tokens kept of each image.
        config: of a model of some size.
        pixels: (size, batch) to the vision inputs and the visual tokens of an image.
        picture: side of the (square) image, in pixels.
    """

    name: str
    size: Size
    keep: int
    config: Callable[[Size], Any]
    pixels: Callable[[Size, int, torch.device], tuple[dict[str, Tensor], int]]
    picture: Callable[[Size], int]

    def tiny(self) -> Spec:
        """The same with widths that a CPU runs in an instant: 4 layers, 16 visual tokens a picture."""
        qwen = self.config is _qwen_config
        small = Size(32, 64, 4, 4, 2 if qwen else 4, 128, 32, 48, 3, 2, 8, 2, text=12)
        return replace(self, name=f"{self.name} tiny", size=small, keep=6)

    def reduced(self) -> Spec:
        """The same with a few narrow layers, and the heads and the number of tokens of the real thing."""
        s = self.size
        less = replace(
            s, width=1024, mlp=2048, layers=8, heads=8, groups=8 if s.groups == s.heads else 2, vocab=4096,
            vision_width=s.vision_width // s.vision_heads * 4, vision_mlp=512, vision_layers=4, vision_heads=4,
        )  # fmt: skip
        return replace(self, name=f"{self.name} reduced", size=less)


def build(spec: Spec, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made on the device, attending with torch's SDPA.

    Args:
        spec: which.
        device: where it is made.
        dtype: of the weights.
    """
    config = spec.config(spec.size)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    with torch.device(device):
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    assert torch.get_default_dtype() == before
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            # what a token attends to must be visible in the logits, at any width
            gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "o_proj", "qkv")) else 1.0
            deviation = 1.0 if "embed_tokens" in name else gain * fan_in**-0.5
            parameter.data.normal_(0.0, deviation, generator=generator)
    return model.eval()


def prompts(spec: Spec, model: Any, batch: int, seed: int = 0) -> tuple[dict[str, Tensor], int]:
    """Model inputs for prompts of one image each, equally long, so that no mask is needed.

    Returns:
        The inputs, and the visual tokens of an image.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    vision, tokens = spec.pixels(spec.size, batch, device)
    dtype = next(model.parameters()).dtype
    image = model.config.image_token_id
    first = 20  # the ids below are special
    text = torch.randint(first, spec.size.vocab, (batch, spec.size.text), device=device)
    opening = min(OPENING, spec.size.text // 2)
    run = torch.full((batch, tokens), image, device=device)
    ids = torch.cat([text[:, :opening], run, text[:, opening:]], 1)
    inputs = {"input_ids": ids} | {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in vision.items()
    }
    if spec.config is _qwen_config:
        inputs["mm_token_type_ids"] = (ids == image).long()
    return inputs, tokens


_IMAGE = 4
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _text(size: Size, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **_IDS,
        **changes,
    }


def _clip(size: Size) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.side,
        patch_size=size.patch,
        projection_dim=size.vision_width,
    )


def _llava_config(size: Size) -> tf.LlavaConfig:
    return tf.LlavaConfig(
        vision_config=_clip(size),
        text_config=tf.LlamaConfig(**_text(size)),
        image_token_index=_IMAGE,
        image_seq_length=(size.side // size.patch) ** 2,
    )


def _next_config(size: Size) -> tf.LlavaNextConfig:
    s = size.side
    return tf.LlavaNextConfig(
        vision_config=_clip(size),
        text_config=tf.LlamaConfig(**_text(size)),
        image_token_index=_IMAGE,
        image_grid_pinpoints=[[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]],
        image_seq_length=(s // size.patch) ** 2,
    )


def _qwen_config(size: Size) -> tf.Qwen2_5_VLConfig:
    pairs = size.width // size.heads // 2
    sections = [pairs // 4, (pairs - pairs // 4) // 2, pairs - pairs // 4 - (pairs - pairs // 4) // 2]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    full = range(size.vision_layers // 4 - 1, size.vision_layers, max(1, size.vision_layers // 4))
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_heads": size.vision_heads,
        "in_channels": 3,
        "patch_size": size.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 8 * size.patch,
        "fullatt_block_indexes": [max(0, at) for at in full],
        "out_hidden_size": size.width,
    }
    return tf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_text(size, rope_parameters=rope),
        image_token_id=_IMAGE,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )


def _one_crop(size: Size, batch: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    pixels = torch.randn(batch, 3, size.side, size.side, device=device)
    return {"pixel_values": pixels}, (size.side // size.patch) ** 2


def _five_crops(size: Size, batch: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """A square picture of two by two crops and a thumbnail; every row of the mosaic ends with a newline token."""
    pixels = torch.randn(batch, 5, 3, size.side, size.side, device=device)
    sizes = torch.tensor([[2 * size.side, 2 * size.side]] * batch, device=device)
    grid = size.side // size.patch
    return {"pixel_values": pixels, "image_sizes": sizes}, grid**2 + 2 * grid * (2 * grid + 1)


def _patches(size: Size, batch: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    patches = torch.randn(batch * size.side**2, 3 * 2 * size.patch**2, device=device)
    grid = torch.tensor([[1, size.side, size.side]] * batch, device=device)
    return {"pixel_values": patches, "image_grid_thw": grid}, size.side**2 // 4


_LLAVA = Size(4096, 11008, 32, 32, 32, 32064, 1024, 4096, 24, 16, 336, 14)
_QWEN = Size(3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16, 74, 14)

SPECS = (
    Spec("LLaVA-NeXT-7B", _LLAVA, 320, _next_config, _five_crops, lambda size: 2 * size.side),
    Spec("Qwen2.5-VL-7B", _QWEN, 342, _qwen_config, _patches, lambda size: size.side * size.patch),
    Spec("LLaVA-1.5-7B", _LLAVA, 64, _llava_config, _one_crop, lambda size: size.side),
)
