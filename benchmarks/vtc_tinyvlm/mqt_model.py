"""tinyvlm-mqt: tinyvlm with a Matryoshka Query Transformer in place of its projector. Its card is MQT.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtc.modules import LlavaMqtConfig, LlavaMqtForConditionalGeneration, load_mqt

from . import model as plain
from .data import SPLITS, Question, evaluation_questions, split_questions
from .model import SIZE
from .questions import TYPES

__all__ = ["CHECKPOINT", "SPLITS", "TYPES", "Question", "evaluation_questions", "load", "split_questions"]

CHECKPOINT = Path(__file__).parent / "checkpoint_mqt"
QUERIES, HEADS = 36, 4
SIDE = SIZE // 6
"""Of the squares that the processor counts, in pixels: as many as queries."""


def build_model() -> Any:
    """With tinyvlm's vision tower and language model, and a fresh resampler (seed torch first)."""
    shipped, _ = plain.load()
    fields = shipped.config.to_dict()
    fields.pop("model_type")
    fields |= {"num_queries": QUERIES, "query_heads": HEADS, "image_seq_length": QUERIES}
    model = LlavaMqtForConditionalGeneration(LlavaMqtConfig.from_dict(fields))
    state = {k: v for k, v in shipped.state_dict().items() if "multi_modal_projector" not in k}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("multi_modal_projector" in name for name in missing)
    model.generation_config = shipped.generation_config
    return model


def build_processor() -> Any:
    """As tinyvlm's, with one placeholder for each query."""
    processor = plain.build_processor()
    processor.patch_size = SIDE
    return processor


def save(model: Any, directory: str | Path = CHECKPOINT) -> None:
    """Write model and processor, weights rounded to fp16, as tinyvlm's are."""
    plain.save(model, directory, build_processor())


def load(directory: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """The shipped model (eval mode, fp32) and its processor."""
    from transformers import AutoProcessor

    return load_mqt(directory), AutoProcessor.from_pretrained(directory)
