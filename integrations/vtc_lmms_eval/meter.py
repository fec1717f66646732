"""What a run's ``generate`` calls came to: visual tokens before and after, time to first token, decode rate.

A stopping criterion that never stops is told when each token is there; it changes nothing else. The realised fraction
(measured speed-up of the prefill over that of its FLOPs, as in :mod:`vtc.profiling`) needs unpruned prefills beside
the pruned ones: the first prompts of a run are timed both ways, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from vtc.engine.context import bypassed
from vtc.handle import Patch
from vtc.profiling.ideal import encoder_flops, ideal_ratio
from vtc.profiling.timing import time_prefill

WARM_UP, CALIBRATED = 1, 5
"""Prompts that are timed for the realised fraction, after those that warm up."""


class Clock(StoppingCriteria):
    """Notes when the first token was chosen, and how many steps there were. Seconds, on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.begin = self._now()
        self.first = self.begin

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Never stops a sequence: False for each row."""
        self.steps += 1
        if self.steps == 1:
            self.first = self._now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def stop(self) -> None:
        """Generation is over."""
        self.end = self._now()

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()


@dataclass
class Meter:
    """Sums and samples of one process; :meth:`merged` adds up those of several.

    Attributes:
        requests: that lmms-eval handed to the model.
        prompts: samples with images that were generated for (beams count as samples of their own).
        given: visual tokens of all of them.
        left: of these, in the last layer of the language model.
        averaged: of these, averaged over its layers.
        ttft: seconds from the call of ``generate`` to its first token, vision tower included, one entry a call.
        steps: decode steps after the first token.
        decoding: seconds they took.
        realised: one entry per calibrated call: measured TTFT ratio, unpruned / pruned, over that of the FLOPs.
    """

    requests: int = 0
    prompts: int = 0
    given: float = 0.0
    left: float = 0.0
    averaged: float = 0.0
    ttft: list[float] = field(default_factory=list)
    steps: int = 0
    decoding: float = 0.0
    realised: list[float] = field(default_factory=list)

    def timed(self, clock: Clock) -> None:
        """Take in the times of a call."""
        if clock.steps:
            self.ttft.append(clock.first - clock.begin)
            self.steps += clock.steps - 1
            self.decoding += clock.end - clock.first

    def counted(self, rows: int, given: int, handle: Patch | None) -> None:
        """Take in the tokens of a call: ``given`` visual tokens in the prompts of ``rows`` samples."""
        if handle is None:
            self.prompts, self.given = self.prompts + rows, self.given + given
            self.left, self.averaged = self.left + given, self.averaged + given
            return
        report = handle.report()  # means over the samples with images
        layers = report.tokens_per_layer
        self.prompts += rows
        self.given += rows * report.visual_tokens
        self.left += rows * layers[-1]
        self.averaged += rows * sum(layers) / len(layers)

    def summary(self) -> dict[str, float]:
        """Numbers for lmms-eval's result file; names say the unit. Empty when there was no image."""
        if not self.prompts:
            return {}
        numbers = {
            "vtc_prompts": self.prompts,
            "vtc_visual_tokens_before": self.given / self.prompts,
            "vtc_visual_tokens_after": self.left / self.prompts,
            "vtc_kept_fraction_over_layers": self.averaged / self.given,
        }
        if self.ttft:
            numbers["vtc_ttft_ms_median"] = 1e3 * statistics.median(self.ttft)
            numbers["vtc_ttft_ms_mean"] = 1e3 * statistics.fmean(self.ttft)
        if self.steps and self.decoding > 0:
            numbers["vtc_decode_tokens_per_s_and_sequence"] = self.steps / self.decoding
        if self.realised:
            numbers["vtc_realised_fraction_median"] = statistics.median(self.realised)
        return numbers

    @classmethod
    def merged(cls, meters: Iterable[Meter]) -> Meter:
        """The sum of several processes' meters."""
        total = cls()
        for meter in meters:
            for each in fields(cls):
                setattr(total, each.name, getattr(total, each.name) + getattr(meter, each.name))
        return total


def realised_fraction(model: nn.Module, inputs: Mapping[str, Tensor], handle: Patch) -> float:
    """Prefill one batch pruned, unpruned and pruned again: (unpruned / mean pruned time) / FLOPs ratio."""
    pruned = [time_prefill(model, inputs).total]
    with bypassed():
        whole = time_prefill(model, inputs).total
    pruned.append(time_prefill(model, inputs).total)
    encoder = encoder_flops(model, inputs) / inputs["input_ids"].shape[0]
    return whole / statistics.fmean(pruned) / ideal_ratio(handle, encoder)
