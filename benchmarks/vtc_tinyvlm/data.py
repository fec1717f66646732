"""Splits and data sets: every example is a pure function of (split, index).

The three splits cannot overlap: each has its own key, and the random generator of example i is seeded with the pair
(key, i). The evaluation split (key 777777) is for the frozen checkpoint only; training code never names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .questions import TYPES, TextQuestion, sample_questions
from .scenes import Scene, render, sample_scene, to_image

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": 1_000_001, "validation": 2_000_003, "evaluation": 777_777}


@dataclass(frozen=True)
class Question:
    """One image with one question, ready for the processor."""

    image: Image.Image
    prompt: str
    answer: str
    type: str


def example(key: int, index: int, kinds: list[str]) -> tuple[Scene, list[TextQuestion]]:
    """Scene `index` of the split with this key, and one question per kind about it."""
    rng = np.random.default_rng((key, index))
    scene = sample_scene(rng)
    return scene, sample_questions(scene, kinds, rng)


def prompt_of(question: TextQuestion | str) -> str:
    """The text a processor takes: an image placeholder and the question."""
    return "<image> " + (question if isinstance(question, str) else question.text)


def split_questions(n: int, split: str = "evaluation", seed: int | None = None) -> list[Question]:
    """N questions, each about an image of its own, the six types in equal shares. `seed` replaces the split's key."""
    return collect(n, SPLITS[split] if seed is None else seed, example)


Examples = Callable[[int, int, list[str]], tuple[Scene, list[TextQuestion]]]


def collect(n: int, key: int, example: Examples) -> list[Question]:
    """The first n questions that the examples of a key can ask, the six types in turn."""
    found: list[Question] = []
    index = 0
    while len(found) < n:
        kind = TYPES[len(found) % len(TYPES)]
        scene, (question,) = example(key, index, [kind])
        index += 1
        if question.type == kind:  # else this scene cannot ask it; take the next scene
            found.append(Question(to_image(render(scene)), prompt_of(question), question.answer, kind))
    return found


def evaluation_questions(n: int, seed: int = SPLITS["evaluation"]) -> list[Question]:
    """N questions of the evaluation split, which the model has never been selected on."""
    return split_questions(n, seed=seed)


def dataset(split: str, n: int) -> Any:
    """A `datasets.Dataset` of n examples with image, question, prompt, answer, type (needs the `datasets` extra)."""
    return as_dataset(split_questions(n, split))


def as_dataset(asked: list[Question]) -> Any:
    """Questions as a `datasets.Dataset`."""
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    features = Features({"image": Image(), "question": text, "prompt": text, "answer": text, "type": text})
    rows = [
        {"question": q.prompt.removeprefix("<image> ")}
        | {k: getattr(q, k) for k in ("image", "prompt", "answer", "type")}
        for q in asked
    ]
    return Dataset.from_list(rows, features=features)
