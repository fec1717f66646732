"""Training batches: cached features, packed questions, and where what they name stands in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtc_tinyvlm.batches import hide_from_answer
from vtc_tinyvlm.building import EOS, PAD

from .charts import Chart
from .data import SPLITS, example
from .documents import Document
from .marks import patch_labels
from .photos import SIZE, Photo
from .questions import TYPES, TextQuestion, sample_questions
from .scenes import Scene, shipped_assets
from .vocabulary import pieces

KINDS: dict[type, tuple[str, ...]] = {
    Photo: ("exist", "exist", "count", "where", "rel", "rel", "leftmost", "sign"),
    Document: ("field",) * 5,
    Chart: ("value", "value", "value", "color", "color", "highest", "highest"),
}
"""What a picture is asked in one step, where it can be."""
QUESTIONS = 8
SLOT = 11
"""Tokens of the longest question and its answer."""
NAMED = 2
"""Words of a question whose place in the picture is known, at most."""
CELLS = 16
"""Columns and rows that a place is told in."""
IGNORE = -100


@dataclass
class Batch:
    """Tensors of one step; B pictures, Q questions each of at most T tokens, n visual tokens."""

    features: Tensor  # [B, n, 768] standardised
    questions: Tensor  # [B, Q, T] question, answer, padding
    labels: Tensor  # [B, Q, T] the token behind each: of the answer and the end token, else IGNORE
    last: Tensor  # [B, Q] index of the answer's last token, which the end token follows
    kind: Tensor  # [B, Q] index into TYPES, -1 where there is no question
    named: Tensor  # [B, Q, NAMED] index of a word whose place is known
    place: Tensor  # [B, Q, NAMED, 2] its column and row in the picture, or IGNORE
    patches: Tensor  # [B, n] words of what stands under each patch, 0 where nothing named does
    hidden: Tensor  # bool [B, Q, n] what the row that predicts the end token may not see (training only)


class Source:
    """Batches of a split.

    Args:
        split: whose pictures were encoded.
        features: float16 [pictures, n, 768], of pictures 0, 1, ..
        mean, deviation: [768].
        seed: of order and questions.
        assets: as :class:`~vtc_photovlm.assets.Assets`.
    """

    def __init__(
        self, split: str, features: np.ndarray, mean: Tensor, deviation: Tensor, seed: int = 0, assets: Any = None
    ) -> None:
        self.split, self.features, self.seed, self.assets = split, features, seed, assets
        self.mean, self.deviation = mean, deviation
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, position: int) -> tuple[int, int]:
        """Picture and epoch of a position in the endless row of all epochs, each in an order of its own."""
        epoch, place = divmod(position, len(self.features))
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.features))
            self._order = (epoch, order)
        return int(self._order[1][place]), epoch

    def batch(self, start: int, size: int, shuffled: bool = True) -> Batch:
        """Pictures of positions start .. start + size; their questions are drawn anew in each epoch."""
        chosen = [self.at(i) if shuffled else (i, 0) for i in range(start, start + size)]
        scenes = [example(self.split, index, self.assets)[0] for index, _ in chosen]
        asked = [self.ask(scene, *of) for scene, of in zip(scenes, chosen, strict=True)]
        patches = np.stack([patch_labels(scene, self.assets or shipped_assets()) for scene in scenes])
        raw = torch.from_numpy(np.stack([self.features[index] for index, _ in chosen])).float()
        return pack((raw - self.mean) / self.deviation, asked, patches, np.random.default_rng((self.seed, start, 2)))

    def ask(self, scene: Scene, index: int, epoch: int) -> list[TextQuestion]:
        """The questions about a picture in an epoch."""
        rng = np.random.default_rng((SPLITS[self.split], index, epoch, self.seed))
        return sample_questions(scene, KINDS[type(scene)], rng)


def pack(
    features: Tensor, asked: Sequence[Sequence[TextQuestion]], patches: np.ndarray, rng: np.random.Generator
) -> Batch:
    """Features [B, n, d], each picture's questions, and what stands under its patches [B, n] as a batch."""
    size, tokens = features.shape[:2]
    shape = (size, QUESTIONS)
    questions = np.full((*shape, SLOT), PAD, np.int64)
    labels = np.full((*shape, SLOT), IGNORE, np.int64)
    last, named = np.zeros(shape, np.int64), np.zeros((*shape, NAMED), np.int64)
    kind, place = np.full(shape, -1, np.int64), np.full((*shape, NAMED, 2), IGNORE, np.int64)
    for b, of_picture in enumerate(asked):
        for q, question in enumerate(of_picture):
            words = pieces(question.text)
            ids = [i for word in words for i in word]
            answer = [i for word in pieces(question.answer) for i in word]
            last[b, q] = len(ids) + len(answer) - 1
            questions[b, q, : last[b, q] + 1] = ids + answer
            labels[b, q, len(ids) - 1 : last[b, q] + 1] = [*answer, EOS]
            kind[b, q] = TYPES.index(question.type)
            for j, (word, x, y) in enumerate(question.named):
                named[b, q, j] = sum(len(w) for w in words[: word + 1]) - 1
                place[b, q, j] = [min(CELLS - 1, max(0, v * CELLS // SIZE)) for v in (x, y)]
    hidden = hide_from_answer(np.zeros((size, tokens), bool), QUESTIONS, rng)
    arrays = (questions, labels, last, kind, named, place, patches, hidden)
    return Batch(features, *(torch.from_numpy(x) for x in arrays))
