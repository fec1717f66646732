"""Training batches: thumbnail and crops of rendered scenes, packed questions, and labels of the auxiliary heads.

All pictures of a batch have one size, so that nothing needs padding; sizes take turns at random between batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc_tinyvlm.batches import IGNORE, PATCH_CLASSES, hide_from_answer, normalise
from vtc_tinyvlm.building import PAD
from vtc_tinyvlm.model import VOCABULARY
from vtc_tinyvlm.questions import TYPES
from vtc_tinyvlm.scenes import COLOR_NAMES, GRID, LATTICE, PATCH, SHAPES, SIZE, Scene, patch_owner, render

from .data import example
from .scenes import FULL, crop_grid, sample_picture, thumbnail_owner

KINDS = [t for t, n in {"color": 2, "shape": 2, "count": 4, "digit": 5, "exist": 3, "rel": 8}.items() for _ in range(n)]
SLOT = 9  # tokens of the longest question and its answer
POSITIONS = FULL // LATTICE + 1
CELLS = FULL // PATCH  # patches along a side of the largest picture


@dataclass
class Batch:
    """Tensors of one step: B pictures of one size with 1 + gh * gw tiles (thumbnail first), N image tokens."""

    picture: tuple[int, int]  # width, height
    pixels: Tensor  # [B, tiles, 3, 96, 96] normalised
    patches: Tensor  # [B, tiles, 144, 5] labels of PATCH_CLASSES, IGNORE where there is none
    pairs: Tensor  # [B, tiles, 48] which colour-shape pairs are present
    questions: Tensor | None = None  # [B, Q, SLOT] question, answer, padding
    length: Tensor | None = None  # [B, Q] tokens of the question without its answer
    answer: Tensor | None = None  # [B, Q]
    kind: Tensor | None = None  # [B, Q] index into TYPES
    referent: Tensor | None = None  # [B, Q, 2] lattice column and row of the object named, or IGNORE
    target: Tensor | None = None  # [B, Q, 2] likewise of the object whose property is asked for
    hidden: Tensor | None = None  # bool [B, Q, N] image tokens that the answer's row may not see (training only)


def tiles(picture: np.ndarray) -> np.ndarray:
    """What LLaVA-NeXT's image processor makes of uint8 [H, W, 3], before normalising: [1 + gh * gw, 96, 96, 3]."""
    height, width = picture.shape[:2]
    thumbnail = np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    gh, gw = crop_grid(width, height)
    canvas = _centred(picture, gh, gw, 0)
    return np.concatenate(
        [thumbnail[None], canvas.reshape(gh, SIZE, gw, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)]
    )


def _centred(array: np.ndarray, gh: int, gw: int, fill: int, unit: int = 1) -> np.ndarray:
    """`array` in the middle of the crop canvas (in cells of `unit` pixels), `fill` around it."""
    size = SIZE // unit
    out = np.full((gh * size, gw * size, *array.shape[2:]), fill, array.dtype)
    top, left = (out.shape[0] - array.shape[0]) // 2, (out.shape[1] - array.shape[1]) // 2
    out[top : top + array.shape[0], left : left + array.shape[1]] = array
    return out


def owners(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Object index per patch, -1 for background: of the whole picture [h, w], and per tile [1 + gh * gw, 12, 12]."""
    whole = patch_owner(scene)
    gh, gw = crop_grid(scene.width, scene.height)
    crops = _centred(whole, gh, gw, -1, PATCH).reshape(gh, GRID, gw, GRID).swapaxes(1, 2).reshape(-1, GRID, GRID)
    return whole, np.concatenate([thumbnail_owner(whole)[None], crops])


def _tile_labels(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """[tiles, 144, 5]: shape, colour, digit (0 = background) and the centre in the tile's own lattice."""
    gh, gw = crop_grid(scene.width, scene.height)
    out = np.full((len(owner), GRID * GRID, len(PATCH_CLASSES)), IGNORE, np.int64)
    out[..., :3] = 0
    x = np.array([o.x for o in scene.objects])
    y = np.array([o.y for o in scene.objects])
    what = np.array([(o.shape + 1, o.color + 1, o.digit + 1) for o in scene.objects])
    inside = (x + (gw * SIZE - scene.width) // 2) % SIZE, (y + (gh * SIZE - scene.height) // 2) % SIZE
    for tile, of_tile in enumerate(owner.reshape(len(owner), -1)):
        px, py = (x * SIZE // scene.width, y * SIZE // scene.height) if tile == 0 else inside
        labels = np.column_stack([what, px // LATTICE, py // LATTICE])
        out[tile][of_tile >= 0] = labels[of_tile[of_tile >= 0]]
    return out


def image_foreground(whole: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """Per image token in the model's order (thumbnail, then rows with a newline each): lies it on an object?"""
    rows = np.pad(whole >= 0, ((0, 0), (0, 1)))
    return np.concatenate([(tile[0] >= 0).ravel(), rows.ravel()])


def make_batch(key: int, start: int, size: int, kinds: list[str] | None) -> Batch:
    """Examples start .. start + size of the split with this key, all of one picture size (drawn from key and start);
    without `kinds` only the vision labels.
    """
    picture = sample_picture(np.random.default_rng((key, start, 1)))
    count = len(kinds or ())
    tokens = np.full((size, count, SLOT), PAD, np.int64)
    length, answer, kind = (np.zeros((size, count), np.int64) for _ in range(3))
    referent, target = (np.full((size, count, 2), IGNORE, np.int64) for _ in range(2))
    pixels, patches, pairs, foreground = [], [], [], []
    for i in range(size):
        scene, asked = example(key, start + i, kinds or [], picture)
        whole, tile = owners(scene)
        pixels.append(tiles(render(scene)))
        patches.append(_tile_labels(scene, tile))
        foreground.append(image_foreground(whole, tile))
        present = np.zeros((len(tile), len(COLOR_NAMES) * len(SHAPES)), np.float32)
        for index, o in enumerate(scene.objects):
            present[(tile == index).any((1, 2)), o.color * len(SHAPES) + o.shape] = 1
        pairs.append(present)
        for j, question in enumerate(asked):
            ids = [VOCABULARY[word] for word in question.text.split()]
            length[i, j], answer[i, j], kind[i, j] = len(ids), VOCABULARY[question.answer], TYPES.index(question.type)
            tokens[i, j, : len(ids) + 1] = [*ids, answer[i, j]]
            for labels, index in ((referent, question.referent), (target, question.target)):
                if index >= 0:
                    labels[i, j] = scene.objects[index].x // LATTICE, scene.objects[index].y // LATTICE
    stacked = np.stack(pixels)
    vision = (
        normalise(stacked.reshape(-1, SIZE, SIZE, 3)).unflatten(0, stacked.shape[:2]),
        torch.from_numpy(np.stack(patches)),
        torch.from_numpy(np.stack(pairs)),
    )
    if not kinds:
        return Batch(picture, *vision)
    hidden = hide_from_answer(np.stack(foreground), count, np.random.default_rng((key, start, count)))
    labels = (tokens, length, answer, kind, referent, target, hidden)
    return Batch(picture, *vision, *(torch.from_numpy(a) for a in labels))
