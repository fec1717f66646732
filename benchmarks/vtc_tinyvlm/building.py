"""What all models made here have in common: special tokens, a Llama, the rest of a config, tokenizer, processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
"""The first words of every vocabulary, in this order."""
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL))
_ENDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
HEAD = 64
"""Width of an attention head."""


def llama_config(vocabulary: int, width: int, inner: int, layers: int, positions: int = 512) -> Any:
    """A ``LlamaConfig`` with heads of 64."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        head_dim=HEAD,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        **_ENDS,
    )


def llava_options(vision: Any, text: Any, image_tokens: int, feature_layer: int | list[int] = -2) -> dict[str, Any]:
    """What a ``LlavaConfig`` and a ``LlavaNextConfig`` are given: features without CLS, a GELU between projections."""
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": "default",
        "image_seq_length": image_tokens,
        "tie_word_embeddings": False,
        **_ENDS,
    }


def generation_config(max_new_tokens: int) -> Any:
    """Greedy, a few tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **_ENDS)


def fast_tokenizer(model: Any, decoder: Any = None, model_max_length: int = 512) -> Any:
    """A fast tokenizer of transformers around a model of ``tokenizers``: lower case, left padding, ``<bos>`` first."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def square_images(size: int, mean: Sequence[float], deviation: Sequence[float]) -> dict[str, Any]:
    """What an image processor is given: one square of ``size`` px, and the normalisation of its three channels."""
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(mean),
        "image_std": list(deviation),
    }


def processor_options(patch: int) -> dict[str, Any]:
    """What a ``LlavaProcessor`` is given for a tower whose CLS token is left out."""
    return {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
