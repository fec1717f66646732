"""What stands under each patch of a picture, as words of the vocabulary: dense labels, for training only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .charts import Chart
from .documents import Document
from .encoder import PATCH
from .photos import SIZE, Photo, extent
from .scenes import Scene
from .vocabulary import pieces

Box = tuple[float, float, float, float]
GRID = SIZE // PATCH


def patch_labels(scene: Scene, assets: Any) -> np.ndarray:
    """Vocabulary ids [256] of what stands under the centre of each patch, 0 where nothing that has a name does."""
    found = np.zeros((GRID, GRID), np.int64)
    centres = (np.arange(GRID) + 0.5) * PATCH
    for token, (left, top, right, bottom) in marks(scene, assets):
        columns, rows = (centres >= left) & (centres <= right), (centres >= top) & (centres <= bottom)
        columns[_patch((left + right) / 2)] = rows[_patch((top + bottom) / 2)] = True  # a narrow letter has one, too
        found[np.ix_(rows, columns)] = token
    return found.ravel()


def _patch(at: float) -> int:
    return min(GRID - 1, max(0, int(at // PATCH)))


def marks(scene: Scene, assets: Any) -> list[tuple[int, Box]]:
    """Token and box of all that has a name: objects, digits, words, bars."""
    if isinstance(scene, Photo):
        return _of_photo(scene, assets)
    return _of_document(scene, assets) if isinstance(scene, Document) else _of_chart(scene, assets)


def _of_photo(scene: Photo, assets: Any) -> list[tuple[int, Box]]:
    found = []
    for thing in scene.things:
        if thing.word is not None:
            width, height = (0.4 * x for x in extent(assets.cutout(thing.source).size, thing.side, thing.angle))
            box = (thing.x - width, thing.y - height, thing.x + width, thing.y + height)
            found.append((pieces(thing.word)[0][0], box))
    if scene.sign is not None:
        sign = scene.sign
        font = assets.font(sign.font, sign.size)
        found += text_marks(sign.number, font, sign.x, sign.y, sign.size, (sign.x, sign.y), sign.angle)
    return found


def _of_document(scene: Document, assets: Any) -> list[tuple[int, Box]]:
    font, middle = assets.font(scene.font, scene.size), (SIZE / 2, SIZE / 2)
    found = []
    for line in scene.lines:
        found += text_marks(line.key, font, line.key_x, line.y, scene.size, middle, scene.angle)
        found += text_marks(line.value, font, line.value_x, line.y, scene.size, middle, scene.angle)
    return found


def _of_chart(scene: Chart, assets: Any) -> list[tuple[int, Box]]:
    font, middle = assets.font(scene.font, scene.size), (0.0, 0.0)
    found: list[tuple[int, Box]] = []
    for bar in scene.bars:
        found.append((pieces(bar.color)[0][0], (bar.x - bar.half, bar.top, bar.x + bar.half, scene.base)))
        found += text_marks(str(bar.value), font, bar.x, bar.top - 2 - 0.36 * scene.size, scene.size, middle, 0)
        found += text_marks(bar.month, font, bar.x, scene.base + 5 + scene.size / 2, scene.size, middle, 0)
    return found


def text_marks(
    text: str, font: Any, x: float, y: float, size: int, turned_about: tuple[float, float], angle: float
) -> list[tuple[int, Box]]:
    """A word as one mark, a number as one for each digit; written around (x, y), then turned by degrees."""
    tokens = pieces(text)[0]
    ends = [font.getlength(text[:i]) for i in range(len(text) + 1)] if len(tokens) > 1 else [0, font.getlength(text)]
    whole, (cx, cy) = ends[-1], turned_about
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    found = []
    for token, begin, end in zip(tokens, ends, ends[1:], strict=False):
        dx, dy = x - whole / 2 + (begin + end) / 2 - cx, y - cy
        at_x, at_y = cx + dx * c + dy * s, cy - dx * s + dy * c
        half = (end - begin) / 2
        found.append((token, (at_x - half, at_y - 0.4 * size, at_x + half, at_y + 0.4 * size)))
    return found
