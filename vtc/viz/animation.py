"""Drawings one after the other, as a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vtc.viz.picture import ACCENT, SHADE, colour, import_pillow
from vtc.viz.sheet import flow

if TYPE_CHECKING:
    from PIL.Image import Image


def save_animation(frames: Sequence[Image], file: Path | str | BinaryIO, seconds: float = 0.8) -> None:
    """Write drawings as a GIF that starts anew when it is over; the last one stays longer.

    Raises:
        ValueError: there is no drawing.
    """
    if not frames:
        raise ValueError("an animation needs at least one drawing")
    palette = _palette(frames)
    reduced = [frame.quantize(palette=palette, dither=import_pillow().Dither.NONE) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [2500]
    reduced[0].save(file, "gif", save_all=True, append_images=reduced[1:], duration=durations, loop=0)


def same_size(frames: Sequence[Image]) -> list[Image]:
    """Drawings at the upper left of paper that is large enough for each of them."""
    width, height = max(f.width for f in frames), max(f.height for f in frames)
    pages = [import_pillow().new("RGB", (width, height), (255, 255, 255)) for _ in frames]
    for page, frame in zip(pages, frames, strict=True):
        page.paste(frame, (0, 0))
    return pages


def _palette(frames: Sequence[Image]) -> Image:
    """256 colours for all drawings, those of the pick order among them: a GIF has no more."""
    fixed = [value for i in range(48) for value in colour(i / 47)] + [*ACCENT, *SHADE, 255, 255, 255, 0, 0, 0]
    found = flow([frames[0], frames[-1]]).quantize(256 - len(fixed) // 3).getpalette() or []
    palette = import_pillow().new("P", (1, 1))
    palette.putpalette((found + fixed)[:768])
    return palette
