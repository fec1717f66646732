"""What the running release of transformers calls things, found by looking at it; like reference.py without vtc.

    from release import CACHE
    model(**inputs, **{CACHE: cache})  # generate() takes it under the same name
    cache = getattr(output, CACHE)

The old name still works in 5.24, with a deprecation that the suite takes for an error (conftest.py): no test says it.
"""

from __future__ import annotations

import inspect

import transformers
from transformers import LlamaModel

RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
OLD = RELEASE < (5, 23)

# 5.24 renamed the argument of every forward, of `generate` and of the mask builders, and the field of every output.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def checkpointing(model: transformers.PreTrainedModel, on: bool) -> None:
    """Let the model compute activations again in the backward pass, or not. By 5.23 the switch had another name."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()
