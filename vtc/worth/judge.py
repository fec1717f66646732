"""Whether pruning pays, batch by batch: the arithmetic of :mod:`vtc.costs` on the pace of the running device.

What pruning saves is the difference of two floors of the language model's prefill, as :func:`vtc.estimate` has them,
with FLOP/s, bytes/s and the price of an operation as measured here. What it costs is what was measured of choosing and
of the engine's own work, and the arithmetic of what is computed once more for signals. Time before the language model
has passed by then, and counts on neither side; nor do decode steps and memory.

Everything is known on the host when a prompt enters the language model, so that nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vtc.costs import Cost, Decoder
from vtc.engine.choosing import Chooser
from vtc.engine.locate import Located, by_row
from vtc.engine.verdict import Verdict
from vtc.methods import Method
from vtc.methods.stages import Step
from vtc.models import Adapter, Parts
from vtc.places import Layer
from vtc.signals import DecoderSignal
from vtc.tokens import Layout
from vtc.worth.overhead import Overhead, overhead_of
from vtc.worth.pace import Pace, pace_of
from vtc.worth.selection_time import SelectionTime, selection_time_of

LAYER_OPERATIONS = 37
"""That a decoder layer of the Llama kind hands to the device; a test counts them."""
PASSES = 3
"""Times that a watched module's input and output are read and written: lengths, cosine, softmax."""


@dataclass(frozen=True)
class Worth:
    """Judges batches of prompts of one model under one method.

    Attributes:
        decoder: what the language model costs.
        width: of its embeddings.
        steps: of the method; none inside the vision tower.
        pace: of the device.
        selection: how long the method takes to choose.
        overhead: what the engine's own work takes.
    """

    decoder: Decoder
    width: int
    steps: tuple[Step, ...]
    pace: Pace
    selection: SelectionTime
    overhead: Overhead

    @classmethod
    def of(cls, adapter: Adapter, parts: Parts, method: Method) -> Worth | None:
        """Of a settled method on a model, ``None`` if it keeps everything.

        Measures what is not known of the device yet, and changes nothing.

        Raises:
            ValueError: the language model is on no device.
        """
        facts = adapter.facts(parts)
        chooser = Chooser(adapter, parts, method, facts)
        if not (steps := (*chooser.steps, *chooser.inside)):
            return None
        weight = next(parts.decoder.parameters())
        if weight.is_meta:
            raise ValueError(
                "when='worthwhile' measures the device that the language model is on, and its weights are on none "
                "(offloaded, or never loaded). What would work: when='always'"
            )
        device, dtype = weight.device, parts.root.dtype
        decoder = replace(Decoder.of(parts.decoder, parts.root), size=dtype.itemsize)
        selection = selection_time_of(steps, facts.width, device, dtype)
        return cls(decoder, facts.width, steps, pace_of(device, dtype), selection, overhead_of(device, dtype))

    def __call__(self, images: Sequence[Located], lengths: Sequence[int], columns: int) -> Verdict:
        """Judge a batch.

        Args:
            images: of all rows.
            lengths: real columns of each row.
            columns: with padding.
        """
        layouts = tuple(image.layout for image in images)
        visual = tuple(layout.length for layout in layouts)
        present = self._present(layouts)
        pruned = [
            max(n - gone for n, gone in zip(lengths, by_row(images, _less(visual, left), len(lengths)), strict=True))
            for left in present
        ]
        saves = self._seconds([columns] * len(pruned), len(lengths)) - self._seconds(pruned, len(lengths))
        costs = self.selection.seconds(len(images), max(visual)) + self._shortening(images, pruned, columns, lengths)
        return Verdict(sum(visual), max(0.0, saves), costs)

    def _present(self, layouts: Sequence[Layout]) -> list[tuple[int, ...]]:
        """Tokens of each image in each layer; where content decides, the most there may be."""
        now = tuple(layout.length for layout in layouts)
        entered: dict[int, tuple[int, ...]] = {}
        layers: list[tuple[int, ...]] = []
        for step in self.steps:
            if isinstance(step.stage.at, Layer):
                layers += [now] * (step.stage.at.after - len(layers))
            now = step.most(layouts, entered.setdefault(id(step.method), now), now) or now
        return layers + [now] * (len(self.decoder.layers) - len(layers))

    def _seconds(self, tokens: Sequence[int], batch: int) -> float:
        cost = self.decoder.prefill(tokens, batch)
        return self.pace.seconds(cost.flops, cost.bytes, LAYER_OPERATIONS * len(tokens))

    def _shortening(
        self, images: Sequence[Located], tokens: Sequence[int], columns: int, lengths: Sequence[int]
    ) -> float:
        """Seconds of the engine's work: moved rows, signals between layers, and what hooks take whatever they do."""
        moved, pieces, again = tokens[0], 0, Cost()
        for step in self.steps:
            needs = [signal for signal in step.stage.needs if isinstance(signal, DecoderSignal)]
            if isinstance(step.stage.at, Layer):
                moved += tokens[min(step.stage.at.after, len(tokens) - 1)]
                pieces += 1 + len(needs)
            for signal in needs:
                watched = [*signal.watched()]
                pieces += len(watched)
                again += self._signal(signal, watched, tokens, columns)
        batch, row = len(lengths), 2 * self.decoder.size * self.width  # it is read and written
        arithmetic = self.pace.device.seconds(batch * again.flops, batch * (again.bytes + row * moved))
        hooks = self.overhead.once + len(images) * self.overhead.each + pieces * self.overhead.inside
        return hooks + arithmetic

    def _signal(self, signal: DecoderSignal, watched: Sequence[int], tokens: Sequence[int], columns: int) -> Cost:
        """Of one sample: keys of all columns and rows of one token in ten, or passes over what modules made."""
        moved = sum(4 * PASSES * tokens[layer] * self.width * self.decoder.size for layer in watched)
        if not signal.needs_rows:
            return Cost(0.0, moved)
        layer, n = self.decoder.layers[signal.layer], tokens[signal.layer]
        rows = columns / 10
        keys = n * self.width * layer.kv
        queries = rows * layer.width * 2 * (self.width + n)
        return Cost(keys + queries, moved)


def _less(given: Sequence[int], left: Sequence[int]) -> list[int]:
    return [n - k for n, k in zip(given, left, strict=True)]
