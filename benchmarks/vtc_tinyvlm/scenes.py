"""Scenes: coloured shapes with a printed digit on a textured background, drawn from a seed alone.

Numpy and Pillow only. A scene is the ground truth (a list of objects); `render` draws it. Nothing here knows about
questions or models. Two choices exist to make a two-core training run possible, and neither hides a shortcut: object
centres lie on a 4-pixel lattice, and digits have one size (a 5x7 bitmap of our own, so no font file is needed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96
PATCH = 8
GRID = SIZE // PATCH
LATTICE = 4
RADII = (9, 12, 15)
GAP = 3  # least free pixels between the bounding circles of two objects

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLORS = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 220, 45),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
    "cyan": (60, 215, 225),
    "white": (242, 242, 242),
}
COLOR_NAMES = tuple(COLORS)

_GLYPHS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. ..#.. .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)
GLYPHS = np.array([[[c == "#" for c in row] for row in glyph.split()] for glyph in _GLYPHS])  # [10, 7, 5]


@dataclass(frozen=True)
class Object:
    """One object: indices into SHAPES and COLOR_NAMES, the printed digit, the centre and radius in pixels."""

    shape: int
    color: int
    digit: int
    x: int
    y: int
    radius: int

    @property
    def shape_name(self) -> str:
        """The word for the shape."""
        return SHAPES[self.shape]

    @property
    def color_name(self) -> str:
        """The word for the colour."""
        return COLOR_NAMES[self.color]


@dataclass(frozen=True)
class Scene:
    """Objects in drawing order (they never overlap), the seed of the background, and the size in pixels."""

    objects: tuple[Object, ...]
    background_seed: int
    width: int = SIZE
    height: int = SIZE


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw 2 to 5 objects; colours repeat with probability 0.4 and shapes with 0.25, so that questions need both."""
    while True:
        objects = try_objects(rng, int(rng.choice((2, 3, 4, 5), p=(0.1, 0.3, 0.3, 0.3))), lambda r: _spot(rng, r))
        if objects is not None:
            return Scene(objects, int(rng.integers(2**31)))


def _spot(rng: np.random.Generator, radius: int) -> tuple[int, int]:
    """Draw a lattice point from which an object of this radius does not leave the picture."""
    low, high = -(-radius // LATTICE), (SIZE - radius) // LATTICE
    x, y = (int(v) * LATTICE for v in rng.integers(low, high + 1, size=2))
    return x, y


def try_objects(
    rng: np.random.Generator, count: int, spot: Callable[[int], tuple[int, int]]
) -> tuple[Object, ...] | None:
    """Draw objects that keep their distance; ``None`` if one finds no room.

    ``spot`` draws a place (x, y) for an object of a given radius.
    """
    objects: list[Object] = []
    for _ in range(count):
        radius = int(rng.choice(RADII))
        for _ in range(25):
            x, y = spot(radius)
            if all((x - o.x) ** 2 + (y - o.y) ** 2 >= (radius + o.radius + GAP) ** 2 for o in objects):
                break
        else:
            return None
        repeat_color = objects and rng.random() < 0.4
        repeat_shape = objects and rng.random() < 0.25
        color = objects[rng.integers(len(objects))].color if repeat_color else int(rng.integers(len(COLORS)))
        shape = objects[rng.integers(len(objects))].shape if repeat_shape else int(rng.integers(len(SHAPES)))
        objects.append(Object(shape, color, int(rng.integers(10)), x, y, radius))
    return tuple(objects)


def render(scene: Scene) -> np.ndarray:
    """Draw the scene as a uint8 array [height, width, 3]."""
    rng = np.random.default_rng(scene.background_seed)
    canvas = _background(rng, scene.height, scene.width)
    for obj in scene.objects:
        alpha = _sprite(obj.shape, obj.radius)
        r = alpha.shape[0] // 2
        box = np.s_[obj.y - r : obj.y + r, obj.x - r : obj.x + r]
        color = np.array(COLORS[obj.color_name], np.float32) + rng.integers(-12, 13, 3)
        canvas[box] += alpha[..., None] * (color - canvas[box])
        ink = 15.0 if color @ (0.299, 0.587, 0.114) > 120 else 245.0
        top, left = obj.y - 3, obj.x - 2
        canvas[top : top + 7, left : left + 5][GLYPHS[obj.digit]] = ink
    return np.clip(canvas, 0, 255).astype(np.uint8)


def to_image(pixels: np.ndarray) -> Image.Image:
    """The PIL image a processor takes."""
    return Image.fromarray(pixels)


def patch_owner(scene: Scene) -> np.ndarray:
    """Index of the object that covers most of each patch, -1 for background: int array [height / 8, width / 8].

    A patch counts as an object's when the object's silhouette fills at least a quarter of it.
    """
    rows, columns = scene.height // PATCH, scene.width // PATCH
    best = np.full((rows, columns), PATCH * PATCH / 4, np.float32)
    owner = np.full((rows, columns), -1, np.int64)
    mask = np.zeros((scene.height, scene.width), np.float32)
    for index, obj in enumerate(scene.objects):
        alpha = _sprite(obj.shape, obj.radius)
        r = alpha.shape[0] // 2
        mask[:] = 0
        mask[obj.y - r : obj.y + r, obj.x - r : obj.x + r] = alpha
        area = mask.reshape(rows, PATCH, columns, PATCH).sum((1, 3))
        owner[area >= best] = index
        best = np.maximum(best, area)
    return owner


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A muted smooth texture in three octaves plus pixel noise, so that empty patches differ from each other."""
    canvas = np.full((height, width, 3), 112.0, np.float32) + rng.normal(0, 18, 3).astype(np.float32)
    for cells, strength in ((3, 24.0), (6, 14.0), (12, 8.0)):  # cells per 96 pixels
        down, across = cells * height // SIZE, cells * width // SIZE
        coarse = rng.normal(0, strength, (3, down, across)).astype(np.float32)
        canvas += (_upsample(down, height) @ coarse @ _upsample(across, width).T).transpose(1, 2, 0)
    noise = np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape)
    return canvas + (noise.astype(np.float32) - 127.5) * 0.08


@cache
def _upsample(cells: int, size: int) -> np.ndarray:
    """Smooth interpolation matrix [size, cells] (cosine between neighbouring cells)."""
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    part = (1 - np.cos(np.pi * (at - low))) / 2
    weights = np.zeros((size, cells), np.float32)
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] = part
    return weights


@cache
def _sprite(shape: int, radius: int) -> np.ndarray:
    """Antialiased silhouette in [0, 1], a square of side 2 * radius, drawn at 8x and averaged down."""
    scale = 8
    big = Image.new("L", (2 * radius * scale,) * 2)
    r = radius * scale
    ImageDraw.Draw(big).polygon([(r + r * u, r + r * v) for u, v in _outline(SHAPES[shape])], fill=255)
    area = np.asarray(big, np.float32).reshape(2 * radius, scale, 2 * radius, scale).mean((1, 3)) / 255
    return area


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points of a shape inside the unit circle (y grows downward)."""
    if shape == "circle":
        return _ring(64, (1.0,), 0.0)
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.98, 0.85), (-0.98, 0.85)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.85, 0.0), (0.0, 1.0), (-0.85, 0.0)]
    if shape == "cross":
        a = 0.4
        arm = [(-a, -1.0), (a, -1.0), (a, -a)]  # turned by four quarter turns
        corners = []
        for _ in range(4):
            corners += arm
            arm = [(-y, x) for x, y in arm]
        return corners
    return _ring(5, (1.0, 0.5), -np.pi / 2)  # star


def _ring(points: int, radii: tuple[float, ...], start: float) -> list[tuple[float, float]]:
    total = points * len(radii)
    angles = start + 2 * np.pi * np.arange(total) / total
    return [
        (float(radii[i % len(radii)] * np.cos(a)), float(radii[i % len(radii)] * np.sin(a)))
        for i, a in enumerate(angles)
    ]
