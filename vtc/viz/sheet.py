"""Several drawings on one sheet: in rows, each under its title; a caption and the colour bar of the pick order."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtc.viz.picture import GAP, colour, import_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 1640
"""Drawings go on in the next row before a sheet grows wider than this."""
_INK, _PAPER = (34, 38, 46), (255, 255, 255)


def flow(drawings: Sequence[Image], width: int = WIDTH, gap: int = GAP) -> Image:
    """Drawings from left to right in rows at most ``width`` pixels wide (but for a single one that is wider)."""
    places: list[tuple[int, int]] = []
    x = y = high = wide = 0
    for drawing in drawings:
        if x and x + drawing.width > width:
            x, y, high = 0, y + high + gap, 0
        places.append((x, y))
        wide, high, x = max(wide, x + drawing.width), max(high, drawing.height), x + drawing.width + gap
    sheet = import_pillow().new("RGB", (wide, y + high), _PAPER)
    for drawing, place in zip(drawings, places, strict=True):
        sheet.paste(drawing, place)
    return sheet


def titled(drawing: Image, title: str, size: int = 14) -> Image:
    """A drawing under its title, wide enough for both."""
    font = _font(size)
    left, _, right, _ = font.getbbox(title)
    high = round(size * 1.5)
    out = import_pillow().new("RGB", (max(drawing.width, int(right - left) + 1), drawing.height + high), _PAPER)
    out.paste(drawing, (0, high))
    _pen(out).text((0, 0), title, fill=_INK, font=font)
    return out


def finished(drawing: Image, caption: str = "", bar: bool = False, margin: int = GAP) -> Image:
    """A sheet with a margin, below it the colour bar and the caption, broken into lines."""
    size = 13
    high = round(size * 1.5)
    width = max(drawing.width, 360)
    lines = [
        line for part in caption.split("\n") for line in textwrap.wrap(part, max(20, round(width / (size * 0.52))))
    ]
    foot = high * (len(lines) + bar) + (GAP if lines or bar else 0)
    out = import_pillow().new("RGB", (width + 2 * margin, drawing.height + foot + 2 * margin), _PAPER)
    out.paste(drawing, (margin, margin))
    pen, font = _pen(out), _font(size)
    y = margin + drawing.height + GAP
    if bar:
        x = margin
        for word in ("first pick", None, "last pick"):
            if word is None:
                for i in range(120):
                    pen.rectangle((x + i, y + 2, x + i, y + size), fill=colour(i / 119))
                x += 128
            else:
                pen.text((x, y), word, fill=_INK, font=font)
                x += int(font.getlength(word)) + 8
        y += high
    for line in lines:
        pen.text((margin, y), line, fill=_INK, font=font)
        y += high
    return out


def _pen(image: Image) -> Any:
    from PIL import ImageDraw

    return ImageDraw.Draw(image)


def _font(size: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError, TypeError):  # a Pillow without FreeType, or older than 10.1: one small font
        return ImageFont.load_default()
