"""Tiny models of the original LLaVA code (llava-torch), random weights and a CLIP tower, and prompts for them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

SIDE, TILE, PATCHES = 4, 16, 16
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
PICTURE, PAD = -200, 0
NEW_TOKENS = 6

IDS = ([1, 5, 6, PICTURE, 7, 8, 9, 10], [1, 11, PICTURE, 12, 13, 14], [1, PICTURE, PICTURE, 15, 16, 17, 18])
TEXT = [1, 20, 21, 22]
SIZES = ((30, 20), (16, 16), (40, 22), (20, 47))
"""(width, height) of the pictures, in the order of the prompts."""
MOSAICS = ((2, 2), None, (2, 2), (1, 3))
"""(columns, rows) of crops that they are cut into, by :data:`PINPOINTS`; of the second only the thumbnail is given."""

_TOWER: list[str] = []


def tower() -> str:
    """A folder with a CLIP tower of four layers, made once."""
    if not _TOWER:
        torch.manual_seed(1)
        folder = tempfile.mkdtemp()
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=TILE // SIDE,
            projection_dim=32,
        )
        CLIPVisionModel(config).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=TILE).save_pretrained(folder)
        _TOWER.append(folder)
    return _TOWER[0]


def make(kind: str = "flat", family: str = "llama", **options: Any) -> Any:
    """A model, always with the same weights. ``kind``: ``flat``, or ``anyres`` with unpadding and newlines."""
    config_class, model_class = {
        "llama": (LlavaConfig, LlavaLlamaForCausalLM),
        "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    }[family]
    anyres = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if kind == "anyres" else {}
    settings = {
        "vocab_size": 120,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "mm_vision_tower": tower(),
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_grid_pinpoints": PINPOINTS,
        "tokenizer_padding_side": "left",
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    torch.manual_seed(2)
    model = model_class(config_class(**settings | anyres | options)).eval()
    if options.get("load", True):
        model.get_vision_tower().load_model()
    if anyres:
        torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = None
    return model


def pictures(kind: str) -> list[torch.Tensor]:
    """Tiles [n, 3, 16, 16] of the four pictures: a thumbnail, and crops where the model takes them."""
    random = torch.Generator().manual_seed(3)
    tiles = [1 if kind == "flat" or mosaic is None else 1 + mosaic[0] * mosaic[1] for mosaic in MOSAICS]
    return [torch.randn(n, 3, TILE, TILE, generator=random) for n in tiles]


OWN = ((0,), (1,), (2, 3))
"""Which pictures each prompt has."""


def call(rows: list[int], kind: str) -> dict[str, Any]:
    """What ``generate`` is given for some of the prompts, padded on the left; 3 is the text."""
    prompts = [[*IDS, TEXT][row] for row in rows]
    width = max(map(len, prompts))
    every = pictures(kind)
    # the original code takes a picture for a prompt without one, too, and uses none of it
    own = [g for row in rows for g in (OWN[row] if row < len(OWN) else (0,))]
    return {
        "inputs": torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "images": [every[g] for g in own],
        "image_sizes": [SIZES[g] for g in own],
    }


GREEDY = {
    "do_sample": False,
    "max_new_tokens": NEW_TOKENS,
    "return_dict_in_generate": True,
    "output_logits": True,
}
