"""The two ways in which a model is run to be measured: a whole prompt, and its image encoder alone."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtc.engine.context import bypassed
from vtc.models import resolve
from vtc.models.base import MODALITIES

Inputs = Mapping[str, Any]
"""Keyword arguments of ``model()``."""


@torch.inference_mode()
def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Prefill: a prompt with its cache, up to the logits of the last position."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def encode(model: nn.Module, inputs: Inputs, patched: bool = False) -> None:
    """Run the image encoder alone, as the model would; a patch takes no notice of it, or (``patched``) acts inside."""
    _, parts = resolve(model)
    for modality in MODALITIES:
        pixels = [
            name for name in inputs if name.startswith("pixel_values") and ("video" in name) == (modality == "video")
        ]
        if not pixels or inputs[pixels[0]] is None:
            continue
        function = getattr(parts.base, f"get_{modality}_features")
        names = inspect.signature(function).parameters
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None and name not in pixels}
        key = pixels[0] if pixels[0] in names else "pixel_values"  # releases name it differently
        with contextlib.nullcontext() if patched else bypassed():
            function(**(arguments | {key: inputs[pixels[0]]}), return_dict=True)
