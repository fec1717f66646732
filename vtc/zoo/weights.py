"""Weights that depend on their names alone, and that make the logits depend on the picture.

transformers' default init (std 0.02) gives attention so flat that a pruned and an unpruned model agree to three
digits, and a test on such a model proves little.
"""

from __future__ import annotations

import math
import zlib

import torch
import transformers as tf
from torch import nn

from vtc.zoo.parts import EOS, PAD


def finish(model_class: type[tf.PreTrainedModel], config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    """Build without touching the global random state, then give every parameter a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                _fill(module, f"{model_class.__name__}.{prefix}.{name}", parameter)
    if model.can_generate():
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
