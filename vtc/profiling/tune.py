"""The smallest ``keep`` whose loss of accuracy stays within a bound: by bisection, and as sure as the sample allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vtc.config import CompressionConfig
from vtc.profiling.exam import Exam
from vtc.profiling.intervals import loss_interval, paired_loss
from vtc.values import shown

STEPS = 100
"""``keep`` is looked for among its multiples of 1/100."""

Verdict = Literal["within", "unsure", "beyond"]


@dataclass(frozen=True)
class Trial:
    """One ``keep`` that was tried.

    Attributes:
        keep: fraction kept.
        tokens: visual tokens of a question, averaged over the layers.
        accuracy: pruned.
        loss: accuracy lost, against the unpruned model on the same questions.
        low: its lower 95 % bound.
        high: its upper one.
        verdict: ``within``: even the upper bound is within the loss allowed; ``beyond``: even the lower one is not;
            ``unsure``: the sample is too small to tell.
    """

    keep: float
    tokens: float
    accuracy: float
    loss: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Tuning:
    """What came out.

    Attributes:
        config: with the smallest ``keep`` that is surely within the bound; ``None``: there is none below 1.
        trials: in the order tried.
        accuracy: of the unpruned model.
        questions: that it was measured on.
    """

    config: CompressionConfig | None
    trials: tuple[Trial, ...]
    accuracy: float
    questions: int

    @property
    def unsure(self) -> tuple[float, ...]:
        """Values of ``keep`` that were tried and could not be judged, rising."""
        return tuple(sorted(trial.keep for trial in self.trials if trial.verdict == "unsure"))


def tune(
    exam: Exam,
    config: CompressionConfig,
    max_drop: float,
    *,
    tick: Callable[[int], None] = lambda done: None,
) -> Tuning:
    """Bisect for the smallest ``keep`` whose loss is surely at most ``max_drop``.

    Loss is taken to fall as ``keep`` grows; what cannot be judged counts as not within.

    Args:
        exam: model and questions.
        config: the method and its options; its ``keep`` is replaced.
        max_drop: accuracy that may be lost, 0.01 for one point.
        tick: called with the number of questions of each batch that is done.

    Raises:
        ValueError: ``max_drop`` is out of range; the method looks at no ``keep``; the model cannot be pruned so; or the
            sample is too small for any answer, which the message says along with the number of questions it would take.
    """
    if not 0.0 < max_drop < 1.0:
        raise ValueError(f"max_drop={shown(max_drop)} must lie between 0 and 1; one point of accuracy is 0.01")
    if not (method := config.build()).reads_keep:
        raise ValueError(
            f"{method.name} lets the picture decide how many tokens stay, and no keep can be looked for. What would "
            "work: vtc sweep, which measures it as it is; or another method, e.g. 'divprune'"
        )
    before = exam.headline(exam.take(tick=tick).scores)
    if (floor := paired_loss(before, before)[2]) > max_drop:
        raise ValueError(
            f"{len(before)} questions are too few: even if no answer changed, a loss of up to {floor:.1%} would remain "
            f"possible, and {max_drop:.1%} is asked for; about {_enough(before, max_drop)} questions would do"
        )
    trials: list[Trial] = []
    lost, kept = 0, STEPS
    while kept - lost > 1:
        middle = (lost + kept) // 2
        trials.append(_try(exam, with_keep(config, middle / STEPS), before, max_drop, tick))
        lost, kept = (lost, middle) if trials[-1].verdict == "within" else (middle, kept)
    found = with_keep(config, kept / STEPS) if kept < STEPS else None
    return Tuning(found, tuple(trials), sum(before) / len(before), len(before))


def with_keep(config: CompressionConfig, keep: float) -> CompressionConfig:
    """The same with another ``keep``."""
    return config.with_method(replace(config.build(), keep=keep))


def _try(
    exam: Exam, config: CompressionConfig, before: Sequence[float], max_drop: float, tick: Callable[[int], None]
) -> Trial:
    always = replace(config, when="always")  # what pruning loses is asked, not where it pays
    taken = exam.take(always, tick=tick)
    after = exam.headline(taken.scores)
    loss, low, high = paired_loss(before, after)
    verdict: Verdict = "within" if high <= max_drop else "beyond" if low > max_drop else "unsure"
    return Trial(float(config.options["keep"]), taken.tokens, sum(after) / len(after), loss, low, high, verdict)


def _enough(before: Sequence[float], max_drop: float) -> int:
    """How many questions of this kind would do if no answer changed, rounded up to tens."""
    accuracy, n = sum(before) / len(before), len(before)
    while loss_interval(accuracy, accuracy, 1.0, n)[2] > max_drop and n < 1_000_000:
        n = n * 11 // 10 + 1
    return -(-n // 10) * 10
