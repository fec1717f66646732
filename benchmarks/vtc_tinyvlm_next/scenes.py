"""Larger scenes in the first checkpoint's style: 3 to 8 objects of the same pixel size on up to 192x192 pixels.

What changes is the scale between picture and object: in the 96x96 thumbnail an object is 9 to 15 pixels wide and the
5x7 digit on it about 2x3. No object crosses the border between two crops, so a crop shows what a picture of the
first checkpoint shows.
"""

from __future__ import annotations

import numpy as np

from vtc_tinyvlm.scenes import LATTICE, PATCH, RADII, SIZE, Scene, try_objects

FULL = 2 * SIZE
# (width, height) of a picture, how often it is drawn, the most objects on it. The non-square ones are unpadded
# (192x128, 128x192: four crops with a black border) or need two crops only (192x96, 96x192).
PICTURES = ((192, 192), (192, 128), (128, 192), (192, 96), (96, 192))
SHARES = (0.5, 0.125, 0.125, 0.125, 0.125)
MOST_OBJECTS = {192 * 192: 8, 192 * 128: 6, 192 * 96: 5}


def sample_picture(rng: np.random.Generator) -> tuple[int, int]:
    """Draw a picture size."""
    return PICTURES[rng.choice(len(PICTURES), p=SHARES)]


def crop_grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of crops: one along a side of at most 96 pixels, else two."""
    return 1 + (height > SIZE), 1 + (width > SIZE)


def sample_scene(rng: np.random.Generator, picture: tuple[int, int]) -> Scene:
    """Draw 3 objects up to as many as the picture takes; colours and shapes repeat as in the first checkpoint's."""
    width, height = picture
    while True:
        count = int(rng.integers(3, MOST_OBJECTS[width * height] + 1))
        objects = try_objects(rng, count, lambda radius: _spot(rng, radius, width, height))
        if objects is not None:
            return Scene(objects, int(rng.integers(2**31)), width, height)


def _free(size: int, radius: int) -> list[int]:
    """Lattice positions along a side at which an object neither leaves the picture nor crosses a crop border."""
    border = size // 2 if size > SIZE else -SIZE
    return [c for c in range(0, size + 1, LATTICE) if radius <= c <= size - radius and abs(c - border) >= radius]


_FREE = {(size, radius): _free(size, radius) for size in (96, 128, 192) for radius in RADII}


def _spot(rng: np.random.Generator, radius: int, width: int, height: int) -> tuple[int, int]:
    """Draw one of the free lattice points of a picture."""
    columns, rows = _FREE[width, radius], _FREE[height, radius]
    return columns[rng.integers(len(columns))], rows[rng.integers(len(rows))]


def thumbnail_owner(owner: np.ndarray) -> np.ndarray:
    """Object index per patch of the thumbnail, [12, 12]: of a patch's cells in the full-size map `owner` (8-pixel
    patches), the first object that fills at least a quarter; -1 for background.
    """
    size = SIZE // PATCH
    rows, columns = owner.shape
    fine = owner.repeat(size, 0).repeat(size, 1)  # every thumbnail patch is rows x columns of these
    cells = fine.reshape(size, rows, size, columns).transpose(0, 2, 1, 3).reshape(size, size, -1)
    best = np.full((size, size), rows * columns / 4)
    out = np.full((size, size), -1, np.int64)
    for index in range(owner.max() + 1):
        area = (cells == index).sum(-1)
        out[area >= best] = index
        best = np.maximum(best, area)
    return out
