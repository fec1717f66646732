"""CLIP's text model, and what makes its vision tower's patches comparable to it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.values import shown


@dataclass(frozen=True, eq=False)
class Clip:
    """What is needed of a CLIP: its text model with projection and tokenizer, norm and projection behind its tower."""

    text: Any
    text_projection: nn.Module
    tokenizer: Any
    norm: Any
    projection: Any

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def encoded(self, question: str) -> Tensor:
        """Float32 [M, e]: one row for each piece, the last one filled up with token 0."""
        longest = self.text.config.max_position_embeddings
        found = self.tokenizer(question, return_tensors="pt")
        ids, mask = (
            nn.functional.pad(found[key], (0, -found[key].shape[1] % longest)).reshape(-1, longest)
            for key in ("input_ids", "attention_mask")
        )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            embeds: Tensor = self.text_projection(self.text(input_ids=ids, attention_mask=mask).pooler_output)
        return embeds


@functools.lru_cache(maxsize=2)
def load_clip(path: str, times: tuple[int, ...]) -> Clip:
    """On the CPU, in float32; ``times`` make a changed file another one."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        said = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        if said.get("model_type") != "clip":
            raise ValueError(f"its config.json says model_type={shown(said.get('model_type'))}, not 'clip'")
        clip: Any = CLIPModel.from_pretrained(path, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise ValueError(f"ClipText({shown(path)}) cannot be loaded: {error}") from error
    clip.eval()
    return Clip(
        clip.text_model, clip.text_projection, tokenizer, clip.vision_model.post_layernorm, clip.visual_projection
    )
