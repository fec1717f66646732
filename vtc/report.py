"""What pruning did to one prompt, in numbers: tokens in every layer, and the arithmetic they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """Of one prefill, averaged over the samples that had images.

    Attributes:
        visual_tokens: visual tokens that the images had.
        tokens_per_layer: visual tokens in each decoder layer.
        text_tokens: other tokens of the prompt.
        flops: of the language model's layers for this prompt, in FLOPs (two per multiply-add; causal attention).
        flops_unpruned: the same without pruning.
    """

    visual_tokens: float
    tokens_per_layer: tuple[float, ...]
    text_tokens: float
    flops: float
    flops_unpruned: float

    @property
    def average_keep(self) -> float:
        """Share of visual tokens, averaged over the layers: what one ``keep`` means for a schedule."""
        return sum(self.tokens_per_layer) / (len(self.tokens_per_layer) * self.visual_tokens)

    @classmethod
    def of(
        cls, config: Any, lengths: Sequence[int], given: Sequence[int], stages: Sequence[tuple[int, Sequence[int]]]
    ) -> Report:
        """From host integers.

        Args:
            config: of the decoder.
            lengths: tokens of each sample's prompt.
            given: visual tokens of each sample.
            stages: (layers run before, visual tokens of each sample from there on), the first with 0 layers.
        """
        depth = config.num_hidden_layers
        rows = [row for row, count in enumerate(given) if count]
        present = [next(counts for after, counts in reversed(stages) if after <= layer) for layer in range(depth)]

        def mean(values: Sequence[float]) -> float:
            return sum(values[row] for row in rows) / len(rows)

        text = [n - v for n, v in zip(lengths, given, strict=True)]
        cost = [sum(layer_flops(config, text[row] + layer[row]) for layer in present) for row in range(len(given))]
        full = [depth * layer_flops(config, n) for n in lengths]
        return cls(mean(given), tuple(mean(layer) for layer in present), mean(text), mean(cost), mean(full))

    def __str__(self) -> str:
        steps: list[tuple[int, float]] = []
        for layer, count in enumerate(self.tokens_per_layer):
            if not steps or steps[-1][1] != count:
                steps.append((layer, count))
        schedule = ", ".join(f"{count:g} from layer {layer}" for layer, count in steps)
        return (
            f"visual tokens: {self.visual_tokens:g} -> {schedule} (average over layers {self.average_keep:.1%}); "
            f"language model {self.flops / 1e9:.4g} of {self.flops_unpruned / 1e9:.4g} GFLOPs "
            f"({self.flops / self.flops_unpruned:.1%})"
        )


def layer_flops(config: Any, n: int) -> float:
    """FLOPs of one dense decoder layer over n tokens: projections, gated MLP, causal attention."""
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    per_token = 2 * (2 * width * heads * head + 2 * width * groups * head + 3 * width * config.intermediate_size)
    return per_token * n + 2 * n * n * heads * head
