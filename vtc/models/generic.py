"""Families that need next to nothing: they are listed because they are tested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.dialect.towers import Tower
from vtc.feed import Feed, Picture
from vtc.models import clip, units
from vtc.models import pictures as sizes
from vtc.models.base import Adapter, Parts, register_model, square
from vtc.tokens import Layout

SOFT_TOKENS, FEWER_SOFT_TOKENS = 280, (140, 70)
"""Gemma 4's budget as published, and the smaller ones that its processor takes."""


@register_model
class Plain(Adapter):
    """One entry per image, no structure that a method could use."""

    families = {"mistral3": ("image",)}

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        image_sizes = arguments.get("image_sizes")
        if image_sizes is None:
            return [Layout.plain(n) for n in lengths]
        cell = base.config.vision_config.patch_size * base.config.spatial_merge_size
        grids = [(int(h) // cell, int(w) // cell) for h, w in torch.as_tensor(image_sizes).tolist()]
        return [Layout.plain(n, g if g[0] * g[1] == n else None) for n, g in zip(lengths, grids, strict=True)]

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower)

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """Pixtral sees all pictures in one row; a token is made of a square of patches."""
        patch, unit = base.config.vision_config.patch_size, base.config.spatial_merge_size
        grids = [(int(h) // patch, int(w) // patch) for h, w in torch.as_tensor(arguments["image_sizes"]).tolist()]
        pictures = units.split(values, [rows * columns for rows, columns in grids])
        return [units.pooled(one[None], grid, unit)[0] for one, grid in zip(pictures, grids, strict=True)]

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        return sizes.pixtral(parts, picture, settings)

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        return sizes.pixtral_budgets(parts, picture, settings)


@register_model
class Tiles(Adapter):
    """The processor writes text around every tile of a split image; the encoder returns a sample's tiles in one go."""

    families = {"idefics3": ("image",), "smolvlm": ("image",)}
    notes = "every tile of a split image counts as an image of its own"

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        each = base.image_seq_len
        return [Layout.plain(each, square(each)) for _ in range(sum(lengths) // each)]

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_model)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        return "restore"  # pixel shuffle

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        side = square(values.shape[1])
        if side is None:
            raise ValueError(f"{values.shape[1]} patches per tile are no square grid to shuffle")
        return list(units.pooled(values, side, base.config.scale_factor))

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

        side = sizes.side(parts) // parts.config.scale_factor
        tile = _tile(parts, settings)
        if not settings.get("do_image_splitting", True):
            return sizes.squares(parts, picture, 1, side**2, "one picture", lengths=(side**2,))
        longest = settings.get("size", {}).get("longest_edge", 4 * tile)
        blank: Any = torch.empty(3, picture.height, picture.width, device="meta")
        height, width = get_resize_output_image_size(blank, longest)
        across, down = -(-width // tile), -(-height // tile)
        if width >= height:  # the longer side goes up to whole tiles first, the other follows
            down = -(-int(across * tile / (width / height)) // tile)
        else:
            across = -(-int(down * tile * (width / height)) // tile)
        count = across * down + 1 if across * down > 1 else 1
        words = f"{across}x{down} tiles and a thumbnail" if count > 1 else "one picture"
        return sizes.squares(parts, picture, count, side**2, words, lengths=(count * side**2,))

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Fewer tiles along the longer side."""
        if settings.get("do_image_splitting", True):
            tile = _tile(parts, settings)
            longest = settings.get("size", {}).get("longest_edge", 4 * tile)
            for most in range((longest - 1) // tile * tile, 0, -tile):
                size = {"longest_edge": most}
                yield f"size={size}", {"size": size}


def _tile(parts: Parts, settings: Mapping[str, Any]) -> int:
    """Side of a tile in pixels."""
    native = sizes.one(parts.config.vision_config.image_size)
    return int(settings.get("max_image_size", {}).get("longest_edge", native))


@register_model
class PrefixLM(Adapter):
    """Image tokens see each other in both directions; the engine prunes the masks that the base model prepares."""

    families = {"gemma3": ("image",), "paligemma": ("image",)}
    notes = "image tokens attend in both directions; kept ones still do"

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore", "units"] | None:
        return "restore" if base.config.model_type == "gemma3" else "drop"  # Gemma3 pools

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """One to one in PaliGemma; Gemma3 pools squares of patches."""
        length = layouts[0].length
        grid, tokens = square(values.shape[1]), square(length)
        if length == values.shape[1] or grid is None or tokens is None:
            return clip.one_to_one(values, layouts)
        return list(units.pooled(values, grid, grid[0] // tokens[0]))

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        side = sizes.side(parts)
        each = parts.config.mm_tokens_per_image if parts.config.model_type == "gemma3" else side**2
        return sizes.squares(parts, picture, 1, each, "one picture")


@register_model
class Gemma4(PrefixLM):
    """Pictures of any shape: a square number of tokens is no square."""

    families = {"gemma4": ("image",)}
    reduces = Adapter.reduces
    tower = Adapter.tower  # it turns places in two dimensions, and pads: not matched yet

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        return [Layout.plain(n) for n in lengths]

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        vision = parts.config.vision_config
        pool, patch = vision.pooling_kernel_size, vision.patch_size
        most = settings.get("max_soft_tokens", SOFT_TOKENS) * pool**2
        height, width = get_aspect_ratio_preserving_size(picture.height, picture.width, patch, most, pool)
        rows, columns = height // (patch * pool), width // (patch * pool)
        return Feed(
            sequences=(most,),  # the processor pads to it, and the tower runs on padding too
            patches=most,
            projected=rows * columns,
            lengths=(rows * columns,),
            words=f"resized to {width}x{height}: {columns}x{rows} tokens",
        )

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Smaller numbers of soft tokens."""
        now = settings.get("max_soft_tokens", SOFT_TOKENS)
        return [(f"max_soft_tokens={n}", {"max_soft_tokens": n}) for n in FEWER_SOFT_TOKENS if n < now]
