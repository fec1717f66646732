"""Whether a pruned run may be timed at all: nothing is called faster before its result was found right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vtc.config import CompressionConfig
from vtc.handle import Patch
from vtc.methods import Method
from vtc.patching import patch
from vtc.profiling.running import Inputs, forward

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative norm by which the logits of ``keep=1.0`` may differ from the unpatched model's. Methods that prune before
the model do not differ at all; stages inside it hand over explicit masks, and other kernels round differently."""


def faults(handle: Patch, logits: Tensor) -> list[str]:
    """What is wrong with a patch's last run, as sentences; empty when nothing is.

    Every image must keep at least one token, in ascending order, of those it has; fewer than all if ``keep`` says so;
    and the logits must be finite. That ``keep=1.0`` gives the unpruned model's logits is asked by
    :func:`faults_keeping_all`.

    Args:
        handle: of the model that was just run.
        logits: what it gave.
    """
    found: list[str] = []
    if not bool(logits.isfinite().all()):
        found.append("its logits are not finite")
    if handle.last_keep is None or handle.last_layouts is None:
        return [*found, "no image was pruned"]
    pairs = [pair for row in zip(handle.last_keep, handle.last_layouts, strict=True) for pair in zip(*row, strict=True)]
    for indices, layout in pairs:
        if not len(indices) or indices[0] < 0 or indices[-1] >= layout.length or bool((indices.diff() <= 0).any()):
            found.append(f"it keeps {indices.tolist()} of an image of {layout.length} tokens")
    total, left = sum(layout.length for _, layout in pairs), sum(len(indices) for indices, _ in pairs)
    keep = handle.method.keep
    if left >= total and (keep < 0.9 if isinstance(keep, float) else keep < total // len(pairs)):
        found.append(f"it keeps {left} of {total} tokens with keep={keep}")
    return found


def faults_keeping_all(model: nn.Module, inputs: Inputs, config: CompressionConfig, plain: Tensor) -> list[str]:
    """What is wrong with a configuration that keeps all: it has to give the unpruned model's logits.

    Args:
        model: not patched.
        inputs: a prompt.
        config: from :func:`keeping_all`.
        plain: logits of the unpruned model.
    """
    with patch(model, config) as handle:
        same = forward(model, inputs).logits
        if any(step.stage.all_or_nothing for step in handle.stage.layers.steps):  # may drop all, whatever keep is
            entered, left = _total(handle.last_keep), _total(handle.last_stages[-1][1])
            whole = sum(layout.length for images in handle.last_layouts or [] for layout in images)
            if left < entered:
                return [] if entered == whole else [f"with keep=1.0 it keeps {entered} of {whole} tokens"]
    error = float((same.float() - plain.float()).norm() / plain.float().norm())
    limit = TOLERANCE[plain.dtype]
    if error <= limit:
        return []
    return [f"with keep=1.0 its logits differ from the unpruned model's by {error:.1e}, above {limit:.0e}"]


def _total(samples: Sequence[Sequence[Tensor]] | None) -> int:
    return sum(len(kept) for images in samples or [] for kept in images)


def keeping_all(config: CompressionConfig) -> CompressionConfig | None:
    """The configuration with ``keep=1.0``; ``None`` for a chain, whose parts have a ``keep`` each, and where even then
    the content decides how many tokens stay.
    """
    method = config.build()
    if method.content_decides or any(
        isinstance(value, Method) and name != "selector" for name, value in config.options.items()
    ):
        return None
    return config.with_method(replace(method, keep=1.0))
