"""The images of a prompt as the model got them: a processor's pixels, back into pictures, one for each panel.

Every family cuts pictures in its own way: LLaVA's processor takes the centre, any-resolution models a thumbnail and
padded crops, Qwen-VL whole patches in merge order. Drawn on the original picture, tokens would sit beside what they
show. So pictures are put together again from the very tensors that the model got.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.tokens import Layout, Segment
from vtc.values import shown
from vtc.viz.handle import Handle
from vtc.viz.panels import Panel, joined, panels
from vtc.viz.pixels import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.engine.locate import Located
    from vtc.models import Parts

View = tuple[Panel, "Image | None"]


@dataclass(frozen=True)
class PromptImage:
    """One image of a prompt.

    Attributes:
        layout: the structure of its tokens.
        views: its panels, each with the picture that the model got of it: ``None`` where the model does not tell its
            grid, or where its pixels are no picture that is known here.
    """

    layout: Layout
    views: tuple[View, ...]


_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def prompt_images(
    handle: Handle, inputs: Mapping[str, Any], processor: Any = None, sample: int = 0
) -> list[PromptImage]:
    """The images of a sample, as the model got them.

    Args:
        handle: of the patched model that the prompt went through.
        inputs: what the model was called with.
        processor: with ``image_mean`` and ``image_std``, itself or in its ``image_processor`` (``video_processor``);
            without one colours are stretched to the full range.
        sample: of the batch.

    Raises:
        ValueError: no prompt with images was run, there is no such sample, or ``inputs`` belong to another prompt.
    """
    last = handle.stage.last
    if last is None:
        raise ValueError("nothing to show: run a prompt with an image through the patched model first")
    if not 0 <= sample < len(last.lengths):
        raise ValueError(f"sample={shown(sample)}: the last prompt had {len(last.lengths)} samples")
    images = [image for image in last.plan.images if image.row == sample]
    found = [PromptImage(i.layout, tuple(_views(handle.stage.parts, i, inputs, processor))) for i in images]
    if not found:
        raise ValueError(f"sample {sample} of the last prompt has no image")
    return found


def _views(parts: Parts, image: Located, inputs: Mapping[str, Any], processor: Any) -> list[View]:
    drawn = panels(image.layout)
    try:
        tiles = _tiles(parts, image, inputs)
        if tiles is not None:
            drawn, tiles = _matched(parts, image, inputs, drawn, tiles)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"these inputs do not fit the images of the last prompt: {error}") from error
    if tiles is None:
        return [(panel, None) for panel in drawn]
    paint = _painter(processor, image.modality, tiles)
    return [(panel, paint(tile) if panel.placed else None) for panel, tile in zip(drawn, tiles, strict=True)]


def _tiles(parts: Parts, image: Located, inputs: Mapping[str, Any]) -> Sequence[Tensor] | None:
    """The pictures [3, H, W] behind one image, in encoder order; ``None`` where they cannot be told."""
    pixels = next((inputs[name] for name in _PIXELS[image.modality] if inputs.get(name) is not None), None)
    if pixels is None or not image.sources:
        return None
    grids = inputs.get(f"{image.modality}_grid_thw")
    if grids is not None and pixels.dim() == 2 and len(image.sources) == 1:
        return _unpatched(parts.config.vision_config, pixels, grids.tolist(), image.sources[0])
    if pixels.dim() == 5 and image.modality == "image" and inputs.get("image_sizes") is None:
        pixels = pixels.flatten(0, 1)  # tiles of a sample, padded with black ones, which the model skips
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    if pixels.dim() == 5:
        return list(pixels[image.sources[0]])
    if pixels.dim() != 4:
        return None
    return [_unpadded(parts.config, pixels[source], inputs, source) for source in image.sources]


def _unpatched(config: Any, pixels: Tensor, grids: list[list[int]], source: int) -> Sequence[Tensor] | None:
    """Patches in merge order, [n, 3 * times * side * side], as one picture for each step of time (its first frame)."""
    times, high, wide = grids[source]
    start = sum(t * h * w for t, h, w in grids[:source])
    merge, side = config.spatial_merge_size, config.patch_size
    patches = pixels[start : start + times * high * wide]
    patches = patches.reshape(times, high // merge, wide // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
    return list(patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(times, 3, high * side, wide * side))


def _unpadded(config: Any, picture: Tensor, inputs: Mapping[str, Any], source: int) -> Tensor:
    """Pictures of any shape come padded to the largest: the part that became tokens."""
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return picture
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    high, wide = (int(n) // cell * cell for n in sizes[source])
    return picture[:, :high, :wide]


def _matched(
    parts: Parts, image: Located, inputs: Mapping[str, Any], drawn: list[Panel], tiles: Sequence[Tensor]
) -> tuple[list[Panel], Sequence[Tensor] | None]:
    """Panels and one picture for each: crops become the mosaic that they were cut from."""
    segments = [s for s in image.layout.segments if s.kind != "newline" and s.length]
    if any(s.crops for s in segments):
        pairs = zip(drawn, segments, strict=True)
        views = [(p, tiles[0]) if s.crops is None else _mosaic(parts, p, s, tiles, inputs, image) for p, s in pairs]
        return [panel for panel, _ in views], [tile for _, tile in views]
    if len(segments) > 2 and segments[0].kind == "crops" and segments[-1].kind == "thumbnail":
        shape = _arrangement(tiles[:-1], tiles[-1])
        return [joined(drawn[:-1], shape), drawn[-1]], [_assembled(tiles[:-1], shape), tiles[-1]]
    if len(tiles) < len(drawn):
        return drawn, None
    return drawn, tiles[: len(drawn)]  # a picture that was not cut may be padded with empty tiles


def _mosaic(
    parts: Parts, panel: Panel, segment: Segment, tiles: Sequence[Tensor], inputs: Mapping[str, Any], image: Located
) -> tuple[Panel, Tensor]:
    """The crops side by side, without the padding whose tokens the model cuts off (by its own ``unpad_image``)."""
    assert segment.crops is not None
    rows, columns = segment.crops
    whole = _assembled(tiles[1 : 1 + rows * columns], segment.crops)
    vision = parts.config.vision_config
    side = vision.image_size // vision.patch_size
    cells = torch.arange(rows * side * columns * side).view(1, rows * side, columns * side)
    size = [int(n) for n in inputs["image_sizes"][image.sources[0]]]
    kept = sys.modules[type(parts.base).__module__].unpad_image(cells, size)
    (top, left), (high, wide) = divmod(int(kept[0, 0, 0]), columns * side), kept.shape[1:]
    # seams where they are in the picture: where tokens were scaled down, one may lie across a seam
    panel = replace(panel, row_seams=_seams(rows, side, top, high), column_seams=_seams(columns, side, left, wide))
    patch = whole.shape[1] // (rows * side)
    return panel, whole[:, top * patch : (top + high) * patch, left * patch : (left + wide) * patch]


def _seams(crops: int, side: int, first: int, length: int) -> tuple[float, ...]:
    places = ((crop * side - first) / length for crop in range(1, crops))
    return tuple(place for place in places if 0.0 < place < 1.0)


def _assembled(tiles: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    rows = [torch.cat(list(tiles[row * shape[1] : (row + 1) * shape[1]]), dim=2) for row in range(shape[0])]
    return torch.cat(rows, dim=1)


def _arrangement(tiles: Sequence[Tensor], thumbnail: Tensor) -> tuple[int, int]:
    """(rows, columns) of tiles that look most like the thumbnail when put together: no processor tells them."""

    def unlike(shape: tuple[int, int]) -> float:
        small = torch.nn.functional.adaptive_avg_pool2d(_assembled(tiles, shape)[None].float(), 32)
        return float((small - target).square().mean())

    target = torch.nn.functional.adaptive_avg_pool2d(thumbnail[None].float(), 32)
    n = len(tiles)
    shapes = sorted(((r, n // r) for r in range(1, n + 1) if n % r == 0), key=lambda s: abs(s[0] - s[1]))
    return min(shapes, key=unlike)


def _painter(processor: Any, modality: str, tiles: Sequence[Tensor]) -> Callable[[Tensor], Image]:
    """From a picture's pixels to the picture, in the colours that the processor was given."""
    if processor is not None:
        whole = getattr(processor, "image_processor", processor)
        maker = getattr(processor, f"{modality}_processor", None) or whole
        return lambda tile: to_picture(tile, maker)
    low = min(float(tile.min()) for tile in tiles)
    high = max(float(tile.max()) for tile in tiles)
    return lambda tile: to_picture((tile.float() - low) / max(high - low, 1e-6), None)
