"""Trained modules that take the place of a part of a model."""

from vtc.modules.llava import LlavaMqtConfig, LlavaMqtForConditionalGeneration, load_mqt
from vtc.modules.mqt import MatryoshkaQueryTransformer, draw_queries

__all__ = [
    "LlavaMqtConfig",
    "LlavaMqtForConditionalGeneration",
    "MatryoshkaQueryTransformer",
    "draw_queries",
    "load_mqt",
]
