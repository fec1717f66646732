"""Questions whose answers are known, put to one model: pruned, with coarser pictures, or as it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.config import CompressionConfig
from vtc.models import resolve
from vtc.patching import patch
from vtc.profiling.downsample import Coarse
from vtc.profiling.tasks import Task, answers, batches_of


@dataclass(frozen=True)
class Answers:
    """What one way of running a model answered.

    Attributes:
        scores: in [0, 1], of each question.
        said: a fingerprint of each answer's text: equal for equal texts.
        tokens: visual tokens of a question, averaged over the layers.
    """

    scores: list[float]
    said: list[str]
    tokens: float


@dataclass(frozen=True)
class Exam:
    """Questions put to one model, the same for all cells of a sweep and for all trials of ``tune``.

    Attributes:
        model: in eval mode.
        processor: of the model.
        task: where the questions are from.
        asked: the questions.
        size: of the batches they are asked in.
    """

    model: Any
    processor: Any
    task: Task
    asked: Sequence[Any]
    size: int = 32

    @property
    def counted(self) -> list[int]:
        """Indices of the questions that count towards the accuracy."""
        return [i for i, question in enumerate(self.asked) if question.type not in self.task.apart]

    def headline(self, scores: Sequence[float]) -> list[float]:
        """The scores that count towards the accuracy."""
        return [scores[i] for i in self.counted]

    @property
    def digest(self) -> str:
        """A hash of prompts, answers and types: a task's questions may change while its name stays."""
        said = [[question.prompt, str(getattr(question, "answer", "")), question.type] for question in self.asked]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()

    def take(
        self,
        config: CompressionConfig | None = None,
        baseline: Coarse | None = None,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Answers:
        """Answer all questions, pruned or with coarser pictures or neither.

        Args:
            config: how to prune.
            baseline: how to make pictures coarser instead.
            tick: called with the number of questions of each batch that is done.
        """
        texts: list[str] = []
        tokens = 0.0
        _, parts = resolve(self.model)
        context: Any = (
            patch(self.model, config) if config else baseline.running() if baseline else contextlib.nullcontext()
        )
        with context as handle:
            for start in range(0, len(self.asked), self.size):
                part = self.asked[start : start + self.size]
                inputs = baseline.inputs(part) if baseline else self.inputs(part)
                texts += answers(self.model, self.processor, inputs, self.task.max_new_tokens)
                if config:
                    layers = handle.report().tokens_per_layer
                    tokens += len(part) * sum(layers) / len(layers)
                else:
                    tokens += int((inputs["input_ids"] == parts.placeholders["image"]).sum())
                tick(len(part))
        said = [fingerprint(text) for text in texts]
        return Answers(self.task.scores(texts, self.asked), said, tokens / len(self.asked))

    def inputs(self, part: Sequence[Any]) -> dict[str, Any]:
        """One batch, as the processor makes it."""
        return batches_of(part, self.processor, len(part), self.model.device, self.model.dtype)[0]


def fingerprint(text: str) -> str:
    """Eight hexadecimal digits for the words of a text, which may be long, or not ours to repeat."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=4).hexdigest()
