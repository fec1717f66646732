"""Builders: one tiny, randomly initialised model per family.

Every model has a few layers of width 32 to 64, its own kind of vision tower, grouped-query attention where the
family has it, and the weights of weights.py.
"""

from __future__ import annotations

import transformers as tf

from vtc.modules.llava import LlavaMqtConfig, LlavaMqtForConditionalGeneration
from vtc.zoo.parts import (
    _QWEN_IDS,
    AUDIO,
    END,
    IMAGE,
    PINPOINTS,
    START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VOCAB,
    _clip,
    _mrope_text,
    _pixtral,
    _qwen_tower,
    _siglip,
    _text,
    _tower,
)
from vtc.zoo.weights import finish as _finish


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


def llava_mqt() -> tf.PreTrainedModel:
    config = LlavaMqtConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**_text()),
        image_token_index=IMAGE,
        image_seq_length=9,
        num_queries=9,
        query_heads=4,
    )
    return _finish(LlavaMqtForConditionalGeneration, config)


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
