"""Training batches: rendered scenes, packed questions, and the labels of the auxiliary heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .building import PAD
from .data import example
from .model import IMAGE_MEAN, IMAGE_STD, VOCABULARY
from .questions import TYPES
from .scenes import COLOR_NAMES, GRID, LATTICE, SHAPES, SIZE, patch_owner, render

# One image's questions. Relations get a third of them from the start: they are what learns slowest.
KINDS = ["color", "shape", "count", "count", "digit", "digit", "exist", "exist", "rel", "rel", "rel", "rel"]
SLOT = 9  # tokens of the longest question and its answer
IGNORE = -100
POSITIONS = SIZE // LATTICE + 1
# Per-patch classification targets: shape, colour, digit of the object under the patch (0 = background), and the
# lattice column and row of its centre.
PATCH_CLASSES = (len(SHAPES) + 1, len(COLOR_NAMES) + 1, 11, POSITIONS, POSITIONS)


@dataclass
class Batch:
    """Tensors of one step; B images, Q questions each."""

    pixels: Tensor  # [B, 3, 96, 96] normalised
    patches: Tensor  # [B, 144, 5] labels of PATCH_CLASSES, IGNORE where there is none
    pairs: Tensor  # [B, 48] which colour-shape pairs are present
    questions: Tensor | None = None  # [B, Q, SLOT] question, answer, padding
    length: Tensor | None = None  # [B, Q] tokens of the question without its answer
    answer: Tensor | None = None  # [B, Q]
    kind: Tensor | None = None  # [B, Q] index into TYPES
    referent: Tensor | None = None  # [B, Q, 2] lattice column and row of the object named, or IGNORE
    target: Tensor | None = None  # [B, Q, 2] likewise of the object whose property is asked for
    hidden: Tensor | None = None  # bool [B, Q, 144] image tokens that the answer's row may not see (training only)


def hide_from_answer(foreground: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which image tokens the answer token may not look at when it predicts the end token: [B, 144] -> [B, Q, 144].

    To stop after the answer is a matter of language, but a model that always sees the whole image learns to stop in a
    way that breaks once tokens are dropped: it then repeats its answer. So the row that predicts the end token, and
    only that row, sees everything, nothing, the foreground, the background, or a random part. The rows that find the
    answer always see the whole image: dropping tokens from those would train the model towards one way of pruning.
    """
    size, tokens = foreground.shape
    case = rng.integers(5, size=(size, count, 1))
    random = rng.random((size, count, tokens)) > rng.random((size, count, 1))
    seen = foreground[:, None, :]
    return np.choose(case, [np.zeros_like(random), np.ones_like(random), ~seen | ~random, seen | ~random, random])


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 [B, 96, 96, 3] -> what the processor makes of it, [B, 3, 96, 96]."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD


def make_batch(key: int, start: int, size: int, kinds: list[str] | None) -> Batch:
    """Examples start .. start + size of the split with this key; without `kinds` only the vision labels."""
    pixels = np.empty((size, SIZE, SIZE, 3), np.uint8)
    patches = np.full((size, GRID * GRID, len(PATCH_CLASSES)), IGNORE, np.int64)
    patches[..., :3] = 0
    pairs = np.zeros((size, len(COLOR_NAMES) * len(SHAPES)), np.float32)
    count = len(kinds or ())
    tokens = np.full((size, count, SLOT), PAD, np.int64)
    length, answer, kind = (np.zeros((size, count), np.int64) for _ in range(3))
    referent, target = (np.full((size, count, 2), IGNORE, np.int64) for _ in range(2))
    for i in range(size):
        scene, asked = example(key, start + i, kinds or [])
        pixels[i] = render(scene)
        owner = patch_owner(scene).ravel()
        labels = np.array(
            [(o.shape + 1, o.color + 1, o.digit + 1, o.x // LATTICE, o.y // LATTICE) for o in scene.objects]
        )
        patches[i][owner >= 0] = labels[owner[owner >= 0]]
        for o in scene.objects:
            pairs[i, o.color * len(SHAPES) + o.shape] = 1
        for j, question in enumerate(asked):
            ids = [VOCABULARY[word] for word in question.text.split()]
            length[i, j], answer[i, j], kind[i, j] = len(ids), VOCABULARY[question.answer], TYPES.index(question.type)
            tokens[i, j, : len(ids) + 1] = [*ids, answer[i, j]]
            if question.referent >= 0:
                referent[i, j] = labels[question.referent, 3:]
            if question.target >= 0:
                target[i, j] = labels[question.target, 3:]
    vision = normalise(pixels), torch.from_numpy(patches), torch.from_numpy(pairs)
    if not kinds:
        return Batch(*vision)
    hidden = hide_from_answer(patches[..., 0] > 0, count, np.random.default_rng((key, start, count)))
    labels = (tokens, length, answer, kind, referent, target, hidden)
    return Batch(*vision, *(torch.from_numpy(a) for a in labels))
