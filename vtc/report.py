"""What pruning did to one prompt, in numbers: tokens in every layer, and the arithmetic they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vtc.costs import Decoder
from vtc.engine.verdict import Verdict
from vtc.tokens import Layout
from vtc.viz.page import report_html


@dataclass(frozen=True)
class Report:
    """Of one prefill, averaged over the samples that had images.

    Attributes:
        visual_tokens: visual tokens that the images had.
        tokens_per_layer: visual tokens in each decoder layer.
        text_tokens: other tokens of the prompt.
        flops: of the language model's layers for this prompt, in FLOPs (two per multiply-add; causal attention).
        flops_unpruned: the same without pruning.
        layouts: structure of each sample's images, as ``p.last_layouts``; for the cells that a notebook shows.
        stages: what was kept of them, as ``p.last_stages``.
        verdict: with ``when="worthwhile"``, whether pruning the batch pays: ``verdict.pays``, and in words ``str``.
    """

    visual_tokens: float
    tokens_per_layer: tuple[float, ...]
    text_tokens: float
    flops: float
    flops_unpruned: float
    layouts: Sequence[Sequence[Layout]] = field(default=(), repr=False, compare=False)
    stages: Sequence[tuple[int, Sequence[Sequence[Tensor]]]] = field(default=(), repr=False, compare=False)
    verdict: Verdict | None = None

    @property
    def average_keep(self) -> float:
        """Share of visual tokens, averaged over the layers: what one ``keep`` means for a schedule."""
        return sum(self.tokens_per_layer) / (len(self.tokens_per_layer) * self.visual_tokens)

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        lengths: Sequence[int],
        visual: Sequence[int],
        stages: Sequence[tuple[int, Sequence[int]]],
    ) -> Report:
        """From counts of tokens, as plain integers.

        Args:
            decoder: what its layers cost.
            lengths: tokens of each sample's prompt.
            visual: visual tokens of each sample.
            stages: (layers run before, visual tokens of each sample from there on), the first with 0 layers.
        """
        layers = decoder.layers
        rows = [row for row, count in enumerate(visual) if count]
        present = [next(counts for after, counts in reversed(stages) if after <= layer) for layer in range(len(layers))]

        def mean(values: Sequence[float]) -> float:
            return sum(values[row] for row in rows) / len(rows)

        text = [n - v for n, v in zip(lengths, visual, strict=True)]
        cost = [
            sum(layer.flops(text[row] + counts[row]) for layer, counts in zip(layers, present, strict=True))
            for row in range(len(visual))
        ]
        full = [sum(layer.flops(n) for layer in layers) for n in lengths]
        return cls(mean(visual), tuple(mean(layer) for layer in present), mean(text), mean(cost), mean(full))

    def __str__(self) -> str:
        steps: list[tuple[int, float]] = []
        for layer, count in enumerate(self.tokens_per_layer):
            if not steps or steps[-1][1] != count:
                steps.append((layer, count))
        schedule = ", ".join(f"{count:g} from layer {layer}" for layer, count in steps)
        why = "" if self.verdict is None else f"{self.verdict}; "
        return (
            f"{why}visual tokens: {self.visual_tokens:g} -> {schedule} (average over layers {self.average_keep:.1%}); "
            f"language model {self.flops / 1e9:.4g} of {self.flops_unpruned / 1e9:.4g} GFLOPs "
            f"({self.flops / self.flops_unpruned:.1%})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: a bar for each run of equal layers, and the kept tokens as cells."""
        return report_html(self, self.layouts, self.stages)
