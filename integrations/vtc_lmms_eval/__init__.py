"""lmms-eval with pruned models: `--model vtc --model_args base=llava_hf,pretrained=...,method=divprune,keep=0.25`.

The entry point of this package (group ``lmms_eval.models``) adds one model id, ``vtc``. lmms-eval builds its own model,
``base``, with the arguments that are not ours; it is patched in place and handed back, so that every prompt, batch,
process group and answer is that of lmms-eval. Importing this package loads neither lmms-eval nor torch.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "vtc"


class EvaluationStopped(SystemExit):
    """An evaluation that must not go on, with the reason; the process ends with status 1.

    Not an ``Exception``: lmms-eval catches those, scores an empty answer or prints them, and exits with status 0.
    """


def manifest() -> Any:
    """What lmms-eval's registry asks the entry point for: a ``ModelManifest``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, "vtc_lmms_eval.model.VtcSimple", "vtc_lmms_eval.model.VtcChat")
