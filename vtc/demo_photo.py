"""The demo's photograph: one question to the model on a pretrained encoder, where that model is on this machine.

Its encoder and pictures are no part of vtc, and a demo fetches nothing: `python -m vtc_photovlm.sources` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import vtc_photovlm
from vtc.config import CompressionConfig
from vtc.patching import patch
from vtc.profiling.tasks import answers, batches_of
from vtc.viz import overlay as draw

TYPE = "where"
"""The question shown is the first of this type, whatever is answered to it."""


@dataclass(frozen=True)
class Photograph:
    """A question about a photograph, and its answers.

    Attributes:
        question: in words.
        answer: the right one.
        unpruned: what the model says.
        pruned: the same, pruned.
        tokens: visual tokens of the picture.
        kept: how many of them stay.
        overlay: the picture with the kept tokens, if one was written.
    """

    question: str
    answer: str
    unpruned: str
    pruned: str
    tokens: int
    kept: int
    overlay: Path | None


def ask_photograph(config: CompressionConfig, overlay: Path | None = None, device: str = "cpu") -> Photograph | None:
    """Ask the first question of its type, unpruned and pruned; ``None`` where the model is not on this machine.

    Args:
        config: how to prune.
        overlay: where to write the picture with the kept tokens; ``None`` writes none.
        device: where the model runs.
    """
    if not vtc_photovlm.ready():
        return None
    model, processor = vtc_photovlm.load()
    model = model.to(device)
    asked = next(q for q in vtc_photovlm.evaluation_questions(len(vtc_photovlm.TYPES)) if q.type == TYPE)
    (inputs,) = batches_of([asked], processor, 1, device, model.dtype)
    (unpruned,) = answers(model, processor, inputs, vtc_photovlm.MAX_NEW_TOKENS)
    with patch(model, config) as handle:
        (pruned,) = answers(model, processor, inputs, vtc_photovlm.MAX_NEW_TOKENS)
    assert handle.last_keep is not None  # there was a picture
    kept = handle.last_keep[0][0]
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if overlay is not None:
        overlay.parent.mkdir(parents=True, exist_ok=True)
        draw(asked.image, kept, (math.isqrt(tokens),) * 2).save(overlay)
    question = asked.prompt.replace(processor.image_token, "").strip()
    return Photograph(question, asked.answer, unpruned, pruned, tokens, len(kept), overlay)
