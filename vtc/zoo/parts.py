"""What the tiny models are made of: one vocabulary, language models and vision towers as configurations."""

from __future__ import annotations

from typing import Any

import transformers as tf

# One vocabulary for all families: ids below FIRST_TEXT are special and never generated.
PAD, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, FAKE, ROW, STAMP, AUDIO = 0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12
VIDEO_START, VIDEO_END = 13, 14
FIRST_TEXT, VOCAB = 20, 240

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


# ----------------------------------------------------------------------------------------------------- language models


def _text(**changes: Any) -> dict[str, Any]:
    """The part of a text configuration that all families share (4 query heads, 2 key-value heads of width 8)."""
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        **_IDS,
    }
    return base | changes


def _mrope_text(sections: list[int], head_dim: int | None = 16, **changes: Any) -> dict[str, Any]:
    """Text configuration with multi-axis rotary positions; `sections` splits half of a head's rotary width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    rope |= changes.pop("rope", {})
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1} | ({"head_dim": head_dim} if head_dim else {})
    return _text(**sizes, rope_parameters=rope, **changes)


# ------------------------------------------------------------------------------------------------------- vision towers


def _tower(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    }
    return base | changes


def _clip(**changes: Any) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(projection_dim=32, **_tower(**changes))


def _siglip(**changes: Any) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(vision_use_head=False, **_tower(**changes))


def _pixtral() -> tf.PixtralVisionConfig:
    return tf.PixtralVisionConfig(**_tower(image_size=32))


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    """Naive-resolution tower of the Qwen and GLM families: patches of 2 pixels, merged two by two."""
    base: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
    }
    return base | changes


_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

# Crops are 8 pixels square; inputs.ANYRES lists how many tokens each picture size costs under these.
PINPOINTS = [[8, 8], [8, 16], [16, 8]]
