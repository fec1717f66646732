"""Builders: one tiny, randomly initialised model per family.

Every model has a few layers of width 32 to 64, its own kind of vision tower, grouped-query attention where the
family has it, and weights that make the logits depend on the picture: transformers' default init (std 0.02) gives
attention so flat that a pruned and an unpruned model agree to three digits, and a test on such a model proves little.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import transformers as tf
from torch import nn

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


# ------------------------------------------------------------------------------------------------------------ families


def llava() -> tf.PreTrainedModel:
    config = tf.LlavaConfig(
        vision_config=_clip(), text_config=tf.LlamaConfig(**_text()), image_token_index=IMAGE, image_seq_length=16
    )
    return _finish(tf.LlavaForConditionalGeneration, config)


def llava_pixtral() -> tf.PreTrainedModel:
    text = tf.MistralConfig(**_text(sliding_window=None, head_dim=8))
    config = tf.LlavaConfig(
        vision_config=_pixtral(),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _finish(tf.LlavaForConditionalGeneration, config)


def vipllava() -> tf.PreTrainedModel:
    # 5.17 knows the plural, 5.23 both, and 5.25 is to drop the plural where it is an argument.
    plural, singular = "vision_feature_layers", "vision_feature_layer"
    layers = singular if hasattr(tf.VipLlavaConfig(), singular) else plural
    config = tf.VipLlavaConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        **{layers: [-2, -3, 1]},
        image_seq_length=16,
    )
    return _finish(tf.VipLlavaForConditionalGeneration, config)


def llava_next() -> tf.PreTrainedModel:
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )
    return _finish(tf.LlavaNextForConditionalGeneration, config)


def llava_next_video() -> tf.PreTrainedModel:
    config = tf.LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        video_seq_length=8,
    )
    return _finish(tf.LlavaNextVideoForConditionalGeneration, config)


def llava_onevision() -> tf.PreTrainedModel:
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=tf.Qwen2Config(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        # A limit of one crop, so that wide pictures take the bilinear down-scaling path too.
        vision_aspect_ratio="anyres_max_1",
    )
    return _finish(tf.LlavaOnevisionForConditionalGeneration, config)


def video_llava() -> tf.PreTrainedModel:
    config = tf.VideoLlavaConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=34,
    )
    return _finish(tf.VideoLlavaForConditionalGeneration, config)


def qwen2_vl() -> tf.PreTrainedModel:
    vision = _qwen_tower(embed_dim=32, mlp_ratio=2)
    del vision["intermediate_size"], vision["out_hidden_size"]  # this tower's `hidden_size` is its output width
    text = _mrope_text([2, 3, 3], head_dim=None)
    config = tf.Qwen2VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    return _finish(tf.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl() -> tf.PreTrainedModel:
    # Windows of two merged patches, so that the tower really permutes its tokens.
    vision = _qwen_tower(window_size=8, fullatt_block_indexes=[1])
    text = _mrope_text([2, 3, 3], head_dim=None)
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    return _finish(tf.Qwen2_5_VLForConditionalGeneration, config)


_INTERLEAVED = {"mrope_interleaved": True}
_DEEPSTACK_TOWER = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def qwen3_vl() -> tf.PreTrainedModel:
    text = _mrope_text([4, 2, 2], rope=_INTERLEAVED)
    del text["bos_token_id"], text["eos_token_id"]
    config = tf.Qwen3VLConfig(vision_config=_qwen_tower(**_DEEPSTACK_TOWER), text_config=text, **_QWEN_IDS)
    return _finish(tf.Qwen3VLForConditionalGeneration, config)


def qwen3_vl_moe() -> tf.PreTrainedModel:
    text = _mrope_text([4, 2, 2], rope=_INTERLEAVED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = tf.Qwen3VLMoeConfig(vision_config=_qwen_tower(**_DEEPSTACK_TOWER), text_config=text, **_QWEN_IDS)
    return _finish(tf.Qwen3VLMoeForConditionalGeneration, config)


def qwen3_5() -> tf.PreTrainedModel:
    text = _mrope_text(
        [2, 1, 1],
        rope=_INTERLEAVED | {"partial_rotary_factor": 0.5},
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    vision = _qwen_tower(num_position_embeddings=64)
    config = tf.Qwen3_5Config(vision_config=vision, text_config=text, **_QWEN_IDS)
    return _finish(tf.Qwen3_5ForConditionalGeneration, config)


def glm46v() -> tf.PreTrainedModel:
    text = _mrope_text([2, 1, 1], head_dim=None, rope={"partial_rotary_factor": 0.5})
    del text["bos_token_id"], text["eos_token_id"]
    config = tf.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision", **_qwen_tower(image_size=16)},
        text_config={"model_type": "glm4v_text", **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    return _finish(tf.Glm46VForConditionalGeneration, config)


def internvl() -> tf.PreTrainedModel:
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**_tower(image_size=12)),
        text_config=tf.Qwen2Config(**_text()),
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    return _finish(tf.InternVLForConditionalGeneration, config)


def idefics3() -> tf.PreTrainedModel:
    config = tf.Idefics3Config(
        vision_config=_tower(image_size=12), text_config=tf.LlamaConfig(**_text()), image_token_id=IMAGE, scale_factor=2
    )
    return _finish(tf.Idefics3ForConditionalGeneration, config)


def smolvlm() -> tf.PreTrainedModel:
    config = tf.SmolVLMConfig(
        vision_config=_tower(image_size=12), text_config=tf.LlamaConfig(**_text()), image_token_id=IMAGE, scale_factor=2
    )
    return _finish(tf.SmolVLMForConditionalGeneration, config)


def mistral3() -> tf.PreTrainedModel:
    config = tf.Mistral3Config(
        vision_config=_pixtral(),
        text_config=tf.MistralConfig(**_text(sliding_window=None, head_dim=8)),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return _finish(tf.Mistral3ForConditionalGeneration, config)


def ministral3() -> tf.PreTrainedModel:
    """Layers that compute with position ids: queries are scaled, here from the eighth position on."""
    scaled = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.5}
    text = tf.Ministral3Config(**_text(head_dim=8), rope_parameters=scaled | {"original_max_position_embeddings": 8})
    config = tf.Mistral3Config(
        vision_config=_pixtral(),
        text_config=text,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return _finish(tf.Mistral3ForConditionalGeneration, config)


def gemma3(window: int) -> tf.PreTrainedModel:
    text = tf.Gemma3TextConfig(
        **_text(
            num_hidden_layers=4,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=window,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        )
    )
    config = tf.Gemma3Config(
        vision_config=_siglip(image_size=16),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return _finish(tf.Gemma3ForConditionalGeneration, config)


def gemma4(bidirectional: bool, window: int) -> tf.PreTrainedModel:
    text = tf.Gemma4TextConfig(
        **_text(
            num_hidden_layers=4,
            head_dim=8,
            global_head_dim=16,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            use_bidirectional_attention="vision" if bidirectional else None,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            final_logit_softcapping=30.0,
            tie_word_embeddings=True,
        )
    )
    vision = tf.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pooling_kernel_size=2,
        patch_size=2,
        position_embedding_size=16,
    )
    config = tf.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return _finish(tf.Gemma4ForConditionalGeneration, config)


def paligemma() -> tf.PreTrainedModel:
    config = tf.PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=tf.GemmaConfig(**_text(head_dim=8, tie_word_embeddings=True)),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
    )
    return _finish(tf.PaliGemmaForConditionalGeneration, config)


# -------------------------------------------------------------------------------------------------------------- weights


def _finish(model_class: type[tf.PreTrainedModel], config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    """Build without touching the global random state, then give every parameter a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                _fill(module, f"{model_class.__name__}.{prefix}.{name}", parameter)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.eval()


def _fill(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    # The seed is the name: weights do not move when a release of transformers adds a parameter elsewhere.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        parameter.copy_(torch.linspace(1.0, 8.0, parameter.numel()).log())
    elif leaf in ("image_newline", "class_embedding"):
        parameter.copy_(noise)
    elif parameter.dim() == 1:
        parameter.add_(0.1 * noise)  # norms, biases and layer scales keep their centre
    else:
        parameter.copy_(noise * _std(module, name, parameter))


def _std(module: nn.Module, name: str, parameter: nn.Parameter) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0 / float(getattr(module, "scalar_embed_scale", 1.0))
    if "position_embedding" in name or name.endswith("cls_token"):
        return 0.5
    fan_in = math.prod(parameter.shape[1:]) if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) else 32
    # Sharp queries and keys and strong attention outputs: what a token attends to must be visible in the logits.
    gains = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "out_proj": 2.0, "lm_head": 2.0}
    gain = next((value for key, value in gains.items() if f"{key}." in name), 1.0)
    return gain / math.sqrt(fan_in)
