"""Splits and questions, as in `vtc_tinyvlm.data`: every example is a pure function of (split, index)."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtc_tinyvlm.data import Question, as_dataset, collect
from vtc_tinyvlm.questions import TextQuestion, sample_questions
from vtc_tinyvlm.scenes import Scene

from .scenes import sample_picture, sample_scene

# Keys of this checkpoint's own: no random stream is shared with the first one's splits.
SPLITS = {"train": 1_000_033, "validation": 2_000_029, "evaluation": 888_888}


def example(
    key: int, index: int, kinds: list[str], picture: tuple[int, int] | None = None
) -> tuple[Scene, list[TextQuestion]]:
    """Scene `index` of the split with this key (of the given picture size, if any), and one question per kind."""
    rng = np.random.default_rng((key, index))
    drawn = sample_picture(rng)
    scene = sample_scene(rng, picture or drawn)
    return scene, sample_questions(scene, kinds, rng)


def split_questions(n: int, split: str = "evaluation", seed: int | None = None) -> list[Question]:
    """N questions, each about an image of its own, the six types in equal shares. `seed` replaces the split's key."""
    return collect(n, SPLITS[split] if seed is None else seed, example)


def evaluation_questions(n: int, seed: int = SPLITS["evaluation"]) -> list[Question]:
    """N questions of the evaluation split, which the model has never been selected on."""
    return split_questions(n, seed=seed)


def dataset(split: str, n: int) -> Any:
    """A `datasets.Dataset` of n examples with image, question, prompt, answer, type (needs the `datasets` extra)."""
    return as_dataset(split_questions(n, split))
