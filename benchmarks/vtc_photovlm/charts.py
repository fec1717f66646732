"""Bar charts: a month under each bar, its value above it; values are any number of two digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .catalogue import FONTS
from .photos import SIZE, compressed

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
COLORS = {
    "red": (206, 45, 45),
    "green": (52, 148, 66),
    "blue": (50, 88, 190),
    "yellow": (232, 202, 50),
    "purple": (128, 58, 158),
    "pink": (240, 140, 180),
    "gray": (128, 128, 128),
    "brown": (122, 78, 40),
}
SIZES = (24, 28)
"""Font of a chart; months are written a little smaller where they must."""
GAP = 8
"""Least difference of the highest and the lowest value from all others."""


@dataclass(frozen=True)
class Bar:
    """One bar: what it says, and where: middle, top and half its width in px."""

    month: str
    color: str
    value: int
    x: int
    top: int
    half: int


@dataclass(frozen=True)
class Chart:
    """One chart; ``shade`` is added to every colour."""

    bars: tuple[Bar, ...]
    font: str
    size: int
    paper: tuple[int, int, int]
    grid: bool
    base: int
    shade: int
    quality: int


def sample(split: str, rng: np.random.Generator, assets: Any) -> Chart:
    """Draw a chart of a split; arguments as of :func:`vtc_photovlm.photos.sample`."""
    fonts = FONTS[split]
    count = int(rng.integers(3, 6))
    first = int(rng.integers(len(MONTHS)))
    months = [MONTHS[(first + i) % len(MONTHS)] for i in range(count)]
    colors = [str(c) for c in rng.choice(list(COLORS), count, replace=False)]
    values = _values(count, rng)
    size = int(rng.integers(SIZES[0], SIZES[1] + 1))
    base, room = SIZE - size - 12, SIZE - 2 * size - 30
    step = (SIZE - 12) / count
    half = int(step * rng.uniform(0.28, 0.42))
    bars = [
        Bar(month, color, value, round(6 + step * (i + 0.5)), base - round(room * value / 100), half)
        for i, (month, color, value) in enumerate(zip(months, colors, values, strict=True))
    ]
    return Chart(
        bars=tuple(bars),
        font=fonts[rng.integers(len(fonts))],
        size=size,
        paper=tuple(int(v) for v in rng.integers(225, 256, 3)),  # type: ignore[arg-type]
        grid=bool(rng.random() < 0.5),
        base=base,
        shade=int(rng.integers(-14, 15)),
        quality=int(rng.integers(70, 95)),
    )


def _values(count: int, rng: np.random.Generator) -> list[int]:
    """Two-digit numbers, of which the highest and the lowest stand clear of the others."""
    while True:
        values = [int(v) for v in rng.integers(10, 100, count)]
        ordered = sorted(values)
        if ordered[1] - ordered[0] >= GAP and ordered[-1] - ordered[-2] >= GAP:
            return values


def render(scene: Chart, assets: Any) -> Image.Image:
    """Draw it: RGB, :data:`~vtc_photovlm.photos.SIZE` px square."""
    page = Image.new("RGB", (SIZE, SIZE), scene.paper)
    draw, font = ImageDraw.Draw(page), assets.font(scene.font, scene.size)
    ink = (30, 30, 34)
    if scene.grid:
        for share in range(1, 5):
            y = scene.base - (scene.base - scene.size - 8) * share // 4
            draw.line((6, y, SIZE - 6, y), fill=(205, 205, 205))
    draw.line((4, scene.base, SIZE - 4, scene.base), fill=ink)
    for bar in scene.bars:
        color = tuple(max(0, min(255, v + scene.shade)) for v in COLORS[bar.color])
        draw.rectangle((bar.x - bar.half, bar.top, bar.x + bar.half, scene.base), fill=color)
        draw.text((bar.x, bar.top - 2), str(bar.value), font=font, fill=ink, anchor="ms")
        under, step = scene.size, (SIZE - 12) / len(scene.bars)
        while assets.font(scene.font, under).getlength(bar.month) > step - 3:
            under -= 1
        draw.text((bar.x, scene.base + 5), bar.month, font=assets.font(scene.font, under), fill=ink, anchor="ma")
    return compressed(page, scene.quality)
