"""tinyvlm: a 3.3 M parameter LLaVA that really answers questions about pictures, and the scenes it was trained on.

It exists to measure what visual-token compression costs in answers, on a laptop CPU, without a download. See README.md
(the model card). Importing this package is light: torch, transformers and datasets load when a function needs them.
"""

from .data import SPLITS, Question, dataset, evaluation_questions, split_questions
from .model import CHECKPOINT, load
from .questions import TYPES
from .scenes import Scene, render, sample_scene
from .scoring import is_correct, is_exact

__all__ = [
    "CHECKPOINT",
    "SPLITS",
    "TYPES",
    "Question",
    "Scene",
    "dataset",
    "evaluation_questions",
    "is_correct",
    "is_exact",
    "load",
    "render",
    "sample_scene",
    "split_questions",
]
