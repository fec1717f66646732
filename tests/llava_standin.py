"""A stand-in for LLaVA-NeXT's `llava`, which no released transformers 5 can import: its seam, in forty lines.

What differs from the first LLaVA: `modalities`, which also cuts a batch to as many rows as it has entries; frames that
are pooled two by two, with newlines in four places; a forward pass that takes `modalities`. Nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from release import CACHE  # what this transformers calls the cache
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaModel

PICTURE, TILE = -200, 16


class Tower(nn.Module):
    """A wrapper, as CLIPVisionTower is one."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=TILE, patch_size=4))
        self.is_loaded, self.cls = True, 1

    def forward(self, tiles):
        return self.vision_tower(tiles, output_hidden_states=True).hidden_states[-2][:, self.cls :]


class Base(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.vision_tower, self.mm_projector = Tower(), nn.Linear(32, config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size))


class Next(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = Base(config)
        self.post_init()

    def get_vision_tower(self):
        return self.model.vision_tower

    def encode_images(self, tiles):
        return self.model.mm_projector(self.get_vision_tower()(tiles))

    def of_video(self, frames):
        """[frames, 16, d] -> [n, d]: each frame's means of two by two, and newlines."""
        count, newline = len(frames), self.model.image_newline[None]
        pooled = frames.view(count, 2, 2, 2, 2, -1).mean((2, 4))
        where = self.config.mm_newline_position
        if where == "grid":
            rows = pooled.flatten(0, 1)
            return torch.cat([rows, newline[None].expand(len(rows), 1, -1)], 1).flatten(0, 1)
        if where == "frame":
            return torch.cat([pooled.flatten(1, 2), newline[None].expand(count, 1, -1)], 1).flatten(0, 1)
        return torch.cat([pooled.flatten(0, 2), newline] if where == "one_token" else [pooled.flatten(0, 2)])

    def of_image(self, tiles):
        return torch.cat([tiles.flatten(0, 1), self.model.image_newline[None]])

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=("image",),
        image_sizes=None,
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        parts = self.encode_images(torch.cat(images)).split([len(one) for one in images])
        kinds = [*modalities, *["image"] * len(parts)]
        features = [self.of_video(p) if k == "video" else self.of_image(p) for p, k in zip(parts, kinds, strict=False)]
        there = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        wanted, at, rows = torch.full_like(input_ids, -100) if labels is None else labels, 0, []
        for ids, mask, own in zip(input_ids, there, wanted, strict=True):
            pieces = []
            for token, label in zip(ids[mask], own[mask], strict=True):
                if token == PICTURE:  # when there are no more pictures, the last one again
                    shown = features[min(at, len(features) - 1)]
                    pieces.append((shown, label.new_full((len(shown),), -100)))
                    at += 1
                else:
                    pieces.append((self.model.embed_tokens(token)[None], label[None]))
            rows.append([torch.cat(part) for part in zip(*pieces, strict=True)])
        rows = [row for row, _ in zip(rows, modalities, strict=False)]
        width = max(len(embeds) for embeds, _ in rows)
        pad = [width - len(embeds) for embeds, _ in rows]
        embeds = torch.stack([nn.functional.pad(e, (0, 0, n, 0)) for n, (e, _) in zip(pad, rows, strict=True)])
        label = torch.stack([nn.functional.pad(x, (n, 0), value=-100) for n, (_, x) in zip(pad, rows, strict=True)])
        mask = torch.arange(width) >= torch.tensor(pad)[:, None]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        return (
            None,
            None if position_ids is None else position,
            None if attention_mask is None else mask.to(attention_mask.dtype),
            past_key_values,
            embeds,
            None if labels is None else label,
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        images=None,
        image_sizes=None,
        modalities=("image",),
        return_dict=None,
    ):
        if inputs_embeds is None:
            made = self.prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes
            )
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = made
        names: Any = {} if past_key_values is None else {CACHE: past_key_values}
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **names,
        )

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, modalities=("image",), **kwargs):
        position, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        _, position, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, position, mask, None, None, images, modalities, image_sizes=image_sizes
        )
        return super().generate(position_ids=position, attention_mask=mask, inputs_embeds=embeds, **kwargs)


def make(model_class: type = Next, newline: str = "one_token", **options: Any) -> Any:
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=99, pad_token_id=0, eos_token_id=None)
    settings = {"mm_newline_position": newline, "mm_patch_merge_type": "spatial_unpad"} | options
    for name, value in settings.items():
        setattr(config, name, value)
    return model_class(config).eval()
