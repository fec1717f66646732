"""photovlm: a small LLaVA on a pretrained DINOv2 encoder, asked about photographs, documents and charts.

Its pictures, fonts and encoder come out of packages that are fetched when they are first needed (`sources.py`); nothing
of them is shipped. See README.md (the model card). Importing this package is light.
"""

from vtc_tinyvlm.scoring import is_correct, is_exact

from .cache import Unavailable
from .data import SPLITS, Question, dataset, evaluation_questions, split_questions
from .model import CHECKPOINT, MAX_NEW_TOKENS, load, ready, whole
from .questions import LEFT_OUT, TYPES

__all__ = [
    "CHECKPOINT",
    "LEFT_OUT",
    "MAX_NEW_TOKENS",
    "SPLITS",
    "TYPES",
    "Question",
    "Unavailable",
    "dataset",
    "evaluation_questions",
    "is_correct",
    "is_exact",
    "load",
    "ready",
    "split_questions",
    "whole",
]
