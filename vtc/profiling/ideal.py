"""The speed-up that FLOPs alone would give, which a measured one is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vtc.costs import Decoder
from vtc.handle import Patch
from vtc.profiling.running import Inputs, encode


def ideal_ratio(handle: Patch, encoder: float, encoder_pruned: float | None = None) -> float:
    """TTFT-FLOPs ratio, unpruned / pruned, of a patch's last prompt: vision tower, projector and language model.

    The language model's part follows :mod:`vtc.costs`, with the tokens that each layer really had. Selecting is not
    counted: in the ideal it costs nothing.

    Args:
        handle: of the model that was just run.
        encoder: FLOPs of vision tower and projector for one sample, see :func:`encoder_flops`.
        encoder_pruned: the same under the patch, where some of it does not run; default: as many.
    """
    report, parts = handle.report(), handle.stage.parts
    decoder, text = Decoder.of(parts.decoder, parts.root), report.text_tokens
    full = decoder.prefill([round(text + report.visual_tokens)] * len(report.tokens_per_layer)).flops
    pruned = decoder.prefill([round(text + kept) for kept in report.tokens_per_layer]).flops
    return (encoder + full) / ((encoder if encoder_pruned is None else min(encoder, encoder_pruned)) + pruned)


def encoder_flops(model: nn.Module, inputs: Inputs, patched: bool = False) -> float:
    """FLOPs of vision tower and projector for a batch, by torch's counter, which sees what really runs.

    Under a patch (``patched``) what signals and rules compute in the tower is counted with it.
    """
    return count_flops(lambda: encode(model, inputs, patched))


def count_flops(run: Callable[[], Any]) -> float:
    """FLOPs of whatever ``run`` runs, two for a multiplication with its addition.

    Torch's counter cannot look into a flash-attention package: where one is used, its attention is missing.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *ignored: Any, **also: Any) -> int:
    """Of full attention, from shapes [B, H, N, d]: scores and sums."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What torch's counter does not know: the kernel behind SDPA on a CPU."""
