"""tinyvlm-next: the 3.3 M parameter model of `vtc_tinyvlm` in LLaVA-NeXT shape (thumbnail + crops), which answers
questions about larger pictures whose details only the crops show. See README.md (the model card).
"""

from vtc_tinyvlm.questions import TYPES
from vtc_tinyvlm.scoring import is_correct, is_exact

from .data import SPLITS, dataset, evaluation_questions, split_questions
from .model import CHECKPOINT, load
from .scenes import sample_scene

__all__ = [
    "CHECKPOINT",
    "SPLITS",
    "TYPES",
    "dataset",
    "evaluation_questions",
    "is_correct",
    "is_exact",
    "load",
    "sample_scene",
    "split_questions",
]
