"""InternVL: tiles of a picture follow one another without text in between, the thumbnail last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vtc.dialect.towers import Tower
from vtc.feed import Feed, Picture
from vtc.models import clip
from vtc.models import pictures as sizes
from vtc.models.base import Adapter, Parts, register_model, square
from vtc.tokens import Kind, Layout, Segment


@register_model
class InternVL(Adapter):
    """Square tiles, pixel-shuffled."""

    families = {"internvl": ("image",)}
    has_cls = True
    notes = "tiles of a split image make one image; cls is averaged over the 2x2 patches behind a token"

    def merge(self, tiles: Sequence[Layout]) -> Layout:
        """The processor puts a thumbnail behind the tiles of a split image."""
        if len(tiles) == 1:
            return tiles[0]
        segments: list[Segment] = []
        for index, tile in enumerate(tiles):
            kind: Kind = "thumbnail" if index == len(tiles) - 1 else "crops"
            segments.append(Segment(kind, sum(t.length for t in tiles[:index]), tile.length, square(tile.length)))
        return Layout(sum(t.length for t in tiles), tuple(segments))

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        return "restore"  # pixel shuffle

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        side = square(values.shape[1])
        if side is None or clip.keeps_cls(base, arguments):
            raise ValueError(f"{values.shape[1]} patches per tile are no square grid to shuffle")
        # the model's own shuffle gathers the patches behind a token into channels; every channel of ours goes alone
        channels = (values if values.dim() > 2 else values[..., None]).movedim(-1, 1)
        shuffled = base.pixel_shuffle(channels.reshape(-1, *side, 1), scale_factor=base.config.downsample_ratio)
        tokens = shuffled.mean(-1).flatten(1).unflatten(0, (len(values), -1)).movedim(1, -1)
        return list(tokens if values.dim() > 2 else tokens[..., 0])

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        columns, rows = _canvas(parts, picture, settings)
        tiles = columns * rows
        count = tiles + (tiles > 1)
        each = int(sizes.side(parts) * parts.config.downsample_ratio) ** 2
        words = f"{columns}x{rows} tiles and a thumbnail" if tiles > 1 else "one tile"
        return sizes.squares(parts, picture, count, each, words)

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Fewer tiles than the picture has now."""
        columns, rows = _canvas(parts, picture, settings)
        for most in range(columns * rows - 1, settings.get("min_patches", 1) - 1, -1):
            yield f"max_patches={most}", {"max_patches": most}


def _canvas(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Columns and rows of tiles."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    size = sizes.one(parts.config.vision_config.image_size)
    bounds = settings.get("min_patches", 1), settings.get("max_patches", 12)
    columns, rows = get_optimal_tiled_canvas((picture.height, picture.width), (size, size), *bounds)
    return columns, rows
