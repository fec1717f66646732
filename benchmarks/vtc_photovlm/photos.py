"""Photographs: cut-outs, and in most of them a sign with a number, pasted onto a background.

A scene is plain data that says all that is drawn; what is random was drawn before. Objects are fitted to the ground
they stand on (luminance, edges), and the whole is saved once as JPEG, so that pasting leaves fewer traces.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .catalogue import BACKGROUNDS, CLASSES, FONTS, STRANGERS

SIZE = 224
"""Width and height of every picture in px."""
SIDES = (48, 92)
"""Longest side of an object, from and to."""
OVERLAP = 0.08
"""Share of the smaller box that two boxes may have in common."""
SIGN_SIZES = (28, 36)
"""Font of a sign."""


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        word: its class; ``None``: a stranger.
        source: of the cut-out.
        held: training never shows this cut-out.
        x, y: its centre.
        side: longest side before it is turned.
        angle: in degrees.
        mirrored: left and right changed.
        fit: how far its luminance is pulled towards that of the ground, 0 to 1.
    """

    word: str | None
    source: str
    held: bool
    x: int
    y: int
    side: int
    angle: float
    mirrored: bool
    fit: float


@dataclass(frozen=True)
class Sign:
    """A board with a number of three digits; its centre and its size."""

    number: str
    x: int
    y: int
    width: int
    height: int
    font: str
    size: int
    angle: float
    hue: float


@dataclass(frozen=True)
class Photo:
    """One scene; ``crop`` is the background's left, top and side as shares, ``light`` a factor,
    ``mirrored`` of the background alone.

    The first object's class is the one that is counted; all other classes stand there once.
    """

    background: str
    crop: tuple[float, float, float]
    light: float
    mirrored: bool
    things: tuple[Thing, ...]
    sign: Sign | None
    quality: int


def sample(split: str, rng: np.random.Generator, assets: Any) -> Photo:
    """Draw a scene of a split.

    Args:
        split: which backgrounds, cut-outs and fonts may be used.
        rng: what is random.
        assets: as :class:`~vtc_photovlm.assets.Assets`, asked for shapes.
    """
    boxes: list[tuple[float, float, float, float]] = []
    sign = _sample_sign(split, rng, boxes) if rng.random() < 0.65 else None
    words = [str(w) for w in rng.choice(list(CLASSES), 5, replace=False)]
    planned: list[str | None] = [words[0]] * int(rng.integers(1, 4))
    planned += words[1 : 1 + int(rng.integers(1, 5 - len(planned) + 1))]
    if split == "evaluation" and rng.random() < 0.3:
        planned.append(None)
    things = [thing for word in planned if (thing := _sample_thing(word, split, rng, assets, boxes))]
    backgrounds = BACKGROUNDS[split]
    share = rng.uniform(0.6, 1.0)
    return Photo(
        background=backgrounds[rng.integers(len(backgrounds))],
        crop=(float(rng.random()), float(rng.random()), float(share)),
        light=float(rng.uniform(0.8, 1.15)),
        mirrored=bool(rng.random() < 0.5),
        things=tuple(things),
        sign=sign,
        quality=int(rng.integers(60, 93)),
    )


def _sample_sign(split: str, rng: np.random.Generator, boxes: list[tuple[float, float, float, float]]) -> Sign:
    size = int(rng.integers(SIGN_SIZES[0], SIGN_SIZES[1] + 1))
    width, height = round(size * 2.3), round(size * 1.45)
    x, y = (int(rng.integers(side // 2 + 6, SIZE - side // 2 - 6)) for side in (width, height))
    boxes.append((x - width / 2 - 3, y - height / 2 - 3, x + width / 2 + 3, y + height / 2 + 3))
    fonts = FONTS[split]
    return Sign(
        number=str(rng.integers(100, 1000)),
        x=x,
        y=y,
        width=width,
        height=height,
        font=fonts[rng.integers(len(fonts))],
        size=size,
        angle=float(rng.uniform(-6, 6)),
        hue=float(rng.random()),
    )


def _sample_thing(
    word: str | None,
    split: str,
    rng: np.random.Generator,
    assets: Any,
    boxes: list[tuple[float, float, float, float]],
) -> Thing | None:
    """An object where there is room, or ``None`` where there is none."""
    held = word is None
    if word is None:
        sources = STRANGERS
    else:
        kind = CLASSES[word]
        held = split == "evaluation" and bool(kind.held) and rng.random() < 0.5
        sources = kind.held if held else kind.trained
    source = sources[rng.integers(len(sources))]
    side, angle = int(rng.integers(SIDES[0], SIDES[1] + 1)), float(rng.uniform(-12, 12))
    mirrored, fit = bool(rng.random() < 0.5), float(rng.uniform(0.1, 0.35))
    for _ in range(30):
        width, height = extent(assets.cutout(source).size, side, angle)
        x = int(rng.integers(math.ceil(width / 2), SIZE - math.ceil(width / 2) + 1))
        y = int(rng.integers(math.ceil(height / 2), SIZE - math.ceil(height / 2) + 1))
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if all(_shared(box, other) <= OVERLAP for other in boxes):
            boxes.append(box)
            return Thing(word, source, held, x, y, side, angle, mirrored, fit)
        side = max(SIDES[0], side - 3)
    return None


def extent(size: tuple[int, int], side: int, angle: float) -> tuple[float, float]:
    """Width and height of the box around a turned picture whose longest side is ``side``."""
    width, height = (side * each / max(size) for each in size)
    c, s = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return width * c + height * s, width * s + height * c


def _shared(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """What two boxes have in common, as a share of the smaller one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))


def render(scene: Photo, assets: Any) -> Image.Image:
    """Draw it: RGB, :data:`SIZE` px square."""
    ground = assets.background(scene.background)
    side = scene.crop[2] * min(ground.size)
    left, top = (share * (length - side) for share, length in zip(scene.crop, ground.size, strict=False))
    canvas = ground.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if scene.mirrored:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = canvas.point(lambda v: min(255, int(v * scene.light)))
    for thing in scene.things:
        _paste(canvas, thing, assets)
    if scene.sign is not None:
        _draw_sign(canvas, scene.sign, assets)
    return compressed(canvas, scene.quality)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """The picture as JPEG gives it back."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def _paste(canvas: Image.Image, thing: Thing, assets: Any) -> None:
    cutout = assets.cutout(thing.source)
    scale = thing.side / max(cutout.size)
    sprite = cutout.resize(tuple(max(1, round(scale * n)) for n in cutout.size), Image.Resampling.BILINEAR)
    if thing.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.convert("RGBa").rotate(thing.angle, Image.Resampling.BILINEAR, expand=True).convert("RGBA")
    alpha = sprite.getchannel("A").filter(ImageFilter.GaussianBlur(0.7))
    left, top = thing.x - sprite.width // 2, thing.y - sprite.height // 2
    behind = (
        canvas.crop((left, top, left + sprite.width, top + sprite.height))
        .convert("L")
        .resize((1, 1), Image.Resampling.BOX)
    )
    weight = np.asarray(alpha, np.float32)
    own = np.asarray(sprite.convert("L"), np.float32)
    shift = thing.fit * (behind.getpixel((0, 0)) - float((own * weight).sum() / max(weight.sum(), 1.0)))
    canvas.paste(sprite.convert("RGB").point(lambda v: max(0, min(255, int(v + shift)))), (left, top), alpha)


def _draw_sign(canvas: Image.Image, sign: Sign, assets: Any) -> None:
    board = Image.new("RGBA", (sign.width + 4, sign.height + 4), (0, 0, 0, 0))
    draw = ImageDraw.Draw(board)
    box = (2, 2, sign.width + 1, sign.height + 1)
    around = (sign.x - sign.width, sign.y - sign.height, sign.x + sign.width, sign.y + sign.height)
    bright = canvas.convert("L").crop(around).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) > 127
    board_color, ink = _tint(sign.hue, 0.25 if bright else 0.92), _tint(sign.hue + 0.5, 0.97 if bright else 0.1)
    draw.rounded_rectangle(box, radius=4, fill=board_color, outline=ink)
    draw.text(
        (sign.width / 2 + 2, sign.height / 2 + 2),
        sign.number,
        font=assets.font(sign.font, sign.size),
        fill=ink,
        anchor="mm",
    )
    board = board.rotate(sign.angle, Image.Resampling.BICUBIC, expand=True)
    canvas.paste(board, (sign.x - board.width // 2, sign.y - board.height // 2), board)


def _tint(hue: float, value: float) -> tuple[int, int, int]:
    """A weakly coloured grey of this brightness."""
    swing = 0.18 * min(value, 1 - value) + 0.04
    return tuple(  # type: ignore[return-value]
        int(255 * max(0.0, min(1.0, value + swing * math.cos(2 * math.pi * (hue + i / 3))))) for i in range(3)
    )
