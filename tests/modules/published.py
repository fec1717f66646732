"""A tiny checkpoint as the authors of MQT publish theirs: the layout of the original LLaVA code, the tower apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

from vtc.modules import LlavaMqtConfig, LlavaMqtForConditionalGeneration
from vtc.modules.mqt import PUBLISHED
from vtc.zoo.parts import _clip, _text
from vtc.zoo.weights import finish

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "query_abstractor_type": "matry_query",
    "num_visual_tokens": 16,
    "mm_hidden_size": 32,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_use_im_start_end": False,
    "mm_projector_lr": None,
    "image_aspect_ratio": "pad",
    "torch_dtype": "float16",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LANGUAGE, PROJECTOR, TOWER = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."


def model() -> Any:
    """What the conversion has to come to, but for the row of the image token. Pictures have 8 x 8 patches."""
    text = _text()
    config = LlavaMqtConfig(
        vision_config=_clip(image_size=16),
        text_config=tf.LlamaConfig(**text),
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=16,
        num_queries=16,
        query_heads=4,
    )
    return in_dtype(finish(LlavaMqtForConditionalGeneration, config), torch.float16)


def in_dtype(built: Any, dtype: torch.dtype) -> Any:
    """Its parameters, not its rotary frequencies, which `half` would round."""
    for parameter in built.parameters():
        parameter.data = parameter.data.to(dtype)
    return built


def tensors(built: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Its parameters under the published names, and those of the tower under CLIP's."""
    own: dict[str, Tensor] = {}
    tower: dict[str, Tensor] = {}
    for name, value in built.state_dict().items():
        if name.startswith(TOWER):
            tower["vision_model." + name.removeprefix(TOWER)] = value
        elif name.startswith(PROJECTOR):
            own[PUBLISHED + name.removeprefix(PROJECTOR)] = value
        else:
            own[name.replace(LANGUAGE, "model.")] = value
    width = built.config.text_config.hidden_size // built.config.text_config.num_attention_heads
    own["model.layers.0.self_attn.rotary_emb.inv_freq"] = 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)
    tower["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    tower["text_model.final_layer_norm.weight"], tower["logit_scale"] = torch.ones(8), torch.tensor(1.0)
    return own, tower


def write(folder: Path, built: Any | None = None, config: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """The checkpoint in two files with an index, and CLIP's folder."""
    built = model() if built is None else built
    own, tower = tensors(built)
    checkpoint, clip = folder / "published", folder / "clip"
    checkpoint.mkdir(parents=True)
    clip.mkdir()
    fields = built.config.text_config.to_dict() | CONFIG | (config or {})
    del fields["rope_parameters"]  # of newer releases: theirs has rope_theta
    (checkpoint / "config.json").write_text(json.dumps(fields))
    names = list(own)
    where = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: own[n].clone() for n in names if where[n] == file}, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    vision = built.config.vision_config.to_dict()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}))
    save_file({n: t.clone() for n, t in tower.items()}, clip / "model.safetensors")
    return checkpoint, clip
