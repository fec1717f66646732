"""Documents: lines of a key and a value on tilted, noisy paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .catalogue import FONTS
from .photos import SIZE, compressed

KEYS = (
    "total", "price", "date", "room", "seat", "code", "weight", "size", "page", "gate", "train", "table", "level",
    "phone", "order", "stock", "tax", "age", "year", "block", "zone", "score", "lane", "city",
)  # fmt: skip
WORDS = (
    "paris", "rome", "oslo", "lima", "cairo", "delhi", "tokyo", "quito", "berlin", "madrid", "dublin", "london",
    "open", "paid", "late", "full", "north", "south", "east", "west", "small", "large", "new", "old",
)  # fmt: skip
SIZES = (26, 31)
"""Font of a document; smaller where a line would not fit."""


@dataclass(frozen=True)
class Line:
    """A key and its value, and where they stand: the middle of each on the paper before it is tilted."""

    key: str
    value: str
    key_x: int
    value_x: int
    y: int


@dataclass(frozen=True)
class Document:
    """One page; ``seed`` is of the noise."""

    lines: tuple[Line, ...]
    font: str
    size: int
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    colon: bool
    ruled: bool
    angle: float
    noise: float
    seed: int
    quality: int


def sample(split: str, rng: np.random.Generator, assets: Any) -> Document:
    """Draw a page of a split; arguments as of :func:`vtc_photovlm.photos.sample`."""
    fonts = FONTS[split]
    name, size = fonts[rng.integers(len(fonts))], int(rng.integers(SIZES[0], SIZES[1] + 1))
    keys = [str(k) for k in rng.choice(KEYS, int(rng.integers(3, 6)), replace=False)]
    values = [str(rng.integers(100, 1000)) if rng.random() < 0.75 else str(rng.choice(WORDS)) for _ in keys]
    colon, aligned = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    while max(_widths(assets.font(name, size), keys, values, colon)) > SIZE - 44:
        size -= 1
    font = assets.font(name, size)
    pitch = min(int(rng.integers(size + 8, size + 16)), (SIZE - 24) // len(keys))
    top = int(rng.integers(14, max(15, SIZE - 14 - pitch * len(keys)) + 1)) + size // 2
    left, right = int(rng.integers(8, 16)), SIZE - int(rng.integers(8, 16))
    lines = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        key_width, value_width = (font.getlength(text) for text in (key + ":" * colon, value))
        begin = right - value_width if aligned else min(left + key_width + 14, right - value_width)
        lines.append(Line(key, value, round(left + key_width / 2), round(begin + value_width / 2), top + i * pitch))
    paper = int(rng.integers(205, 256))
    return Document(
        lines=tuple(lines),
        font=name,
        size=size,
        paper=tuple(int(v) for v in np.clip(paper - rng.integers(0, 22, 3), 0, 255)),  # type: ignore[arg-type]
        ink=tuple(int(v) for v in rng.integers(0, 80, 3)),  # type: ignore[arg-type]
        colon=colon,
        ruled=bool(rng.random() < 0.4),
        angle=float(rng.uniform(-3, 3)),
        noise=float(rng.uniform(2, 9)),
        seed=int(rng.integers(2**31)),
        quality=int(rng.integers(60, 93)),
    )


def _widths(font: Any, keys: list[str], values: list[str], colon: bool) -> list[float]:
    """How many px each line's two texts take together."""
    return [font.getlength(key + ":" * colon) + font.getlength(value) for key, value in zip(keys, values, strict=True)]


def render(scene: Document, assets: Any) -> Image.Image:
    """Draw it: RGB, :data:`~vtc_photovlm.photos.SIZE` px square."""
    page = Image.new("RGB", (SIZE, SIZE), scene.paper)
    draw, font = ImageDraw.Draw(page), assets.font(scene.font, scene.size)
    for line in scene.lines:
        if scene.ruled:
            below = line.y + scene.size * 0.72
            draw.line(
                (6, below, SIZE - 6, below),
                fill=tuple((p + i) // 2 for p, i in zip(scene.paper, scene.ink, strict=True)),
            )
        draw.text((line.key_x, line.y), line.key + ":" * scene.colon, font=font, fill=scene.ink, anchor="mm")
        draw.text((line.value_x, line.y), line.value, font=font, fill=scene.ink, anchor="mm")
    page = page.rotate(scene.angle, Image.Resampling.BICUBIC, fillcolor=tuple(v * 3 // 4 for v in scene.paper))
    grain = np.random.default_rng(scene.seed).standard_normal((SIZE, SIZE, 1), np.float32) * scene.noise
    page = Image.fromarray((np.asarray(page, np.float32) + grain).clip(0, 255).astype(np.uint8))
    return compressed(page, scene.quality)
