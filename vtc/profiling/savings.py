"""What pruning can save on one device, as arithmetic: costs of a prompt unpruned and pruned, and their ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from vtc.costs import Cost, Decoder
from vtc.devices import Device
from vtc.profiling.budget import Way

LOW_CEILING = 2.0
"""Below it, what behind the tower can win is not much."""


@dataclass(frozen=True)
class PromptCost:
    """The language model's part, unpruned or pruned, for the whole batch.

    Attributes:
        visual: visual tokens of one prompt in each layer.
        layers: FLOPs of each layer in prefill.
        prefill: from the first layer to the last position's logits.
        decode: one step behind the prompt: one token for each sample.
        cache_bytes: of keys and values of the prompt.
    """

    visual: tuple[int, ...]
    layers: tuple[float, ...]
    prefill: Cost
    decode: Cost
    cache_bytes: float

    @classmethod
    def of(cls, decoder: Decoder, visual: Sequence[int], text: int, batch: int) -> PromptCost:
        """What follows from the visual tokens in each layer."""
        tokens = [n + text for n in visual]
        flops = tuple(batch * layer.flops(n) for layer, n in zip(decoder.layers, tokens, strict=True))
        prefill, decode = decoder.prefill(tokens, batch), decoder.decode(tokens, batch)
        return cls(tuple(visual), flops, prefill, decode, decoder.cache_bytes(tokens, batch))


@dataclass(frozen=True)
class Savings:
    """Costs of one batch of prompts, unpruned and pruned. Times are floors that no machine reaches.

    Attributes:
        model: its type.
        parameters: of the whole model.
        picture: what was asked about.
        fed: what the processor makes of it.
        method: as it would run on this model.
        visual_tokens: of one prompt.
        text_tokens: all others of one prompt, wrappers and row breaks included.
        batch: prompts.
        vision: of the tower.
        projector: between tower and language model.
        vision_pruned: of the tower under the patch: patches may leave inside it, blocks that nobody reads do not run.
        projector_pruned: the same behind it.
        in_tower: patches leave inside the tower.
        full: the language model, unpruned.
        pruned: the same, pruned.
        text_only: prefill of the text alone: what is left of a prompt without visual tokens.
        weight_bytes: of the whole model.
        device: whose roofline it is.
        open_tower: whether patches can leave inside the tower of this model.
        halves: where the processor has a budget of its own: lowering that to about half the tokens, and beside it the
            method with ``keep=0.5``; else empty.
        notes: what was assumed.
    """

    model: str
    parameters: int
    picture: str
    fed: str
    method: str
    visual_tokens: int
    text_tokens: int
    batch: int
    vision: Cost
    projector: Cost
    vision_pruned: Cost
    projector_pruned: Cost
    in_tower: bool
    full: PromptCost
    pruned: PromptCost
    text_only: Cost
    weight_bytes: float
    device: Device
    open_tower: bool = False
    halves: tuple[Way, ...] = ()
    notes: tuple[str, ...] = ()

    RATIOS: ClassVar[tuple[str, ...]] = (
        "ttft_ratio",
        "llm_ratio",
        "ceiling",
        "vision_share",
        "ttft_seconds",
        "ttft_seconds_pruned",
        "ttft_time_ratio",
        "decode_ratio",
        "cache_ratio",
        "average_keep",
        "best_place",
        "ridge_tokens",
    )

    @property
    def before(self) -> Cost:
        """What no pruning behind the projector saves: tower and projector."""
        return self.vision + self.projector

    @property
    def before_pruned(self) -> Cost:
        """The same under the patch."""
        return self.vision_pruned + self.projector_pruned

    @property
    def ttft_ratio(self) -> float:
        """FLOPs to the first token, unpruned over pruned, vision tower and projector included: the ideal speed-up."""
        return (self.before + self.full.prefill).flops / (self.before_pruned + self.pruned.prefill).flops

    @property
    def llm_ratio(self) -> float:
        """The same for the language model alone."""
        return self.full.prefill.flops / self.pruned.prefill.flops

    @property
    def ceiling(self) -> float:
        """The ideal ratio if behind the projector all visual tokens were dropped, and only the text stayed."""
        return (self.before + self.full.prefill).flops / (self.before + self.text_only).flops

    @property
    def vision_share(self) -> float:
        """Share of tower and projector in the FLOPs to the first token, unpruned."""
        return self.before.flops / (self.before + self.full.prefill).flops

    @property
    def ttft_seconds(self) -> float:
        """Floor of the time to the first token, unpruned."""
        return self._ttft(self.vision, self.projector, self.full.prefill)

    @property
    def ttft_seconds_pruned(self) -> float:
        """The same, pruned."""
        return self._ttft(self.vision_pruned, self.projector_pruned, self.pruned.prefill)

    @property
    def ttft_time_ratio(self) -> float:
        """Unpruned over pruned, by those floors: below :attr:`ttft_ratio` where reading weights takes longer."""
        return self.ttft_seconds / self.ttft_seconds_pruned

    @property
    def decode_ratio(self) -> float:
        """Bytes that a decode step moves, unpruned over pruned."""
        return self.full.decode.bytes / self.pruned.decode.bytes

    @property
    def cache_ratio(self) -> float:
        """Bytes of keys and values, unpruned over pruned."""
        return self.full.cache_bytes / self.pruned.cache_bytes

    @property
    def best_place(self) -> str:
        """Where tokens leave with the greatest gain: ``tower`` where what lies behind it cannot win much and patches
        may leave inside it, else ``entry``, since every layer that tokens leave later has worked for them.
        """
        return "tower" if self.open_tower and self.ceiling < LOW_CEILING else "entry"

    @property
    def average_keep(self) -> float:
        """Share of visual tokens, averaged over the layers."""
        return sum(self.pruned.visual) / (len(self.pruned.visual) * self.visual_tokens)

    @property
    def ridge_tokens(self) -> float:
        """Tokens, over the batch, below which fewer tokens cannot make prefill faster on this device."""
        return self.device.ridge

    def seconds(self, cost: Cost) -> float:
        """The floor of a part's time."""
        return self.device.seconds(cost.flops, cost.bytes)

    def _ttft(self, *parts: Cost) -> float:
        return sum(map(self.seconds, parts))

    @property
    def schedule(self) -> list[tuple[int, int, int]]:
        """(first layer, last layer, visual tokens) of each run of layers with equally many; layers count from 1."""
        runs, at = [], 0
        for count, run in groupby(self.pruned.visual):
            length = len(list(run))
            runs.append((at + 1, at + length, count))
            at += length
        return runs
