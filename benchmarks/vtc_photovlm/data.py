"""Splits and data sets: every example is a pure function of (split, index).

Each split has its own key, and the random generator of example i is seeded with (key, i). Splits share no background
and no font; where a class has several cut-outs, evaluation draws half of its objects from those that the others never
show.
The evaluation split (key 555557) is for the frozen checkpoint only; training code never names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .questions import TYPES, TextQuestion, sample_questions
from .scenes import Scene, render, sample, shipped_assets

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": 3_000_017, "validation": 3_000_029, "evaluation": 555_557}
SORT_OF = {"field": "document", "value": "chart", "color": "chart", "highest": "chart"}
"""The sort of picture that a type of question asks about; a photograph if it is not here."""


@dataclass(frozen=True)
class Question:
    """One picture with one question, ready for the processor.

    ``held``: it turns on a cut-out that training never shows.
    """

    image: Image.Image
    prompt: str
    answer: str
    type: str
    held: bool


def example(
    split: str, index: int, assets: Any = None, sort: str | None = None, seed: int | None = None
) -> tuple[Scene, np.random.Generator]:
    """Scene ``index`` of a split, and the generator that its questions are drawn from."""
    rng = np.random.default_rng((SPLITS[split] if seed is None else seed, index))
    return sample(split, rng, assets or shipped_assets(), sort), rng


def split_questions(n: int, split: str = "evaluation", seed: int | None = None, assets: Any = None) -> list[Question]:
    """N questions, each about a picture of its own, the types in equal shares. ``seed`` replaces the split's key.

    Raises:
        Unavailable: the packages with pictures and fonts cannot be had.
    """
    assets = assets or shipped_assets()
    found: list[Question] = []
    index = 0
    while len(found) < n:
        kind = TYPES[len(found) % len(TYPES)]
        scene, rng = example(split, index, assets, SORT_OF.get(kind, "photo"), seed)
        index += 1
        for q in sample_questions(scene, [kind], rng):  # none: this scene cannot be asked it; take the next
            found.append(Question(render(scene, assets), prompt_of(q), q.answer, q.type, q.held))
    return found


def prompt_of(question: TextQuestion | str) -> str:
    """The text a processor takes: an image placeholder and the question."""
    return "<image> " + (question if isinstance(question, str) else question.text)


def evaluation_questions(n: int, seed: int = SPLITS["evaluation"]) -> list[Question]:
    """N questions of the evaluation split, which the model has never been selected on."""
    return split_questions(n, seed=seed)


def dataset(split: str, n: int) -> Any:
    """A ``datasets.Dataset`` of n examples with image, question, prompt, answer, type and held (needs ``datasets``)."""
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    features = Features({"image": Image()} | dict.fromkeys(("question", "prompt", "answer", "type"), text))
    features["held"] = Value("bool")
    rows = [
        {"question": q.prompt.removeprefix("<image> ")}
        | {k: getattr(q, k) for k in ("image", "prompt", "answer", "type", "held")}
        for q in split_questions(n, split)
    ]
    return Dataset.from_list(rows, features=features)
