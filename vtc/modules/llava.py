"""A LLaVA whose projector is a Matryoshka Query Transformer, as a model of transformers with a type of its own.

``import vtc`` makes it known to ``AutoConfig`` and ``AutoModelForImageTextToText``. The type is not ``llava``: releases
of transformers without vtc then refuse such a checkpoint, instead of filling a projector with random numbers.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from vtc.modules.mqt import MatryoshkaQueryTransformer
from vtc.values import shown


class LlavaMqtConfig(LlavaConfig):
    """A LLaVA's, with ``num_queries`` and ``query_heads`` of the resampler; ``image_seq_length`` is ``num_queries``."""

    model_type = "llava_mqt"
    num_queries: int = 256
    query_heads: int = 16


class LlavaMqtForConditionalGeneration(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with a :class:`MatryoshkaQueryTransformer` in the projector's place."""

    config_class = LlavaMqtConfig
    config: LlavaMqtConfig
    _no_split_modules = ["MatryoshkaQueryTransformer"]  # noqa: RUF012

    def __init__(self, config: LlavaMqtConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.model.multi_modal_projector = MatryoshkaQueryTransformer(
            config.num_queries, vision.hidden_size, text.hidden_size, config.query_heads
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MatryoshkaQueryTransformer):
            module.reset_parameters()
        else:
            super()._init_weights(module)


AutoConfig.register(LlavaMqtConfig.model_type, LlavaMqtConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaMqtConfig, LlavaMqtForConditionalGeneration, exist_ok=True)


def load_mqt(folder: str | os.PathLike[str], **options: Any) -> LlavaMqtForConditionalGeneration:
    """Load what ``vtc convert mqt`` wrote, in ``eval()`` mode; every parameter must be there, and no other.

    Args:
        folder: local, with ``config.json`` and safetensors.
        options: of transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``.

    Returns:
        A model that ``vtc.patch(model, "mqt", keep=16)`` takes.

    Raises:
        FileNotFoundError: no such checkpoint there.
        ValueError: it is of another type, or parameters are missing, unknown, or of another shape.
    """
    path = os.fspath(folder)
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"no config.json in {shown(path)}; `vtc convert mqt` writes such a folder")
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, LlavaMqtConfig):
        raise ValueError(
            f"{shown(path)} is a checkpoint of model_type {config.model_type!r}, not {LlavaMqtConfig.model_type!r}. "
            "Published MQT-LLaVA checkpoints say 'llava' or 'llava_llama': `vtc convert mqt` first"
        )
    loaded: Any = LlavaMqtForConditionalGeneration.from_pretrained(
        path, config=config, use_safetensors=True, output_loading_info=True, **options
    )
    model, said = loaded
    if wrong := {kind: sorted(map(str, names)) for kind, names in said.items() if names and kind != "error_msgs"}:
        raise ValueError(f"{shown(path)} is not whole: {shown(wrong)}")
    return model.eval()
