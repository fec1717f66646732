"""Models of the original LLaVA code, under ``vtc.patch``: `LlavaLlamaForCausalLM` of ``llava-torch`` and its kin.

What they have in common is a method, ``prepare_inputs_labels_for_multimodal``, that turns ids and pictures into
embeddings before the language model is called. ``vtc.patch`` finds this package by its entry point (group
``vtc.models``) when it is given such a model. Importing it loads neither LLaVA nor torch, and changes nothing.
"""

from __future__ import annotations

from typing import Any

SEAM = "prepare_inputs_labels_for_multimodal"
"""The method through which pictures enter; a model that has it is one of these, whatever its class is called."""


def find(model: Any) -> tuple[Any, Any] | None:
    """The adapter and the parts of a model with that method, ``None`` of any other.

    Raises:
        UnsupportedModelError: it is one, and cannot be pruned; nothing was touched.
    """
    if not callable(getattr(model, SEAM, None)):
        return None
    from vtc_llava.model import resolve

    return resolve(model)
