"""How sure an accuracy, and a difference between two, can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
"""Of a 95 % interval."""


def wilson(right: float, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    p = right / total
    centre = p + Z * Z / (2 * total)
    spread = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_loss(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """How much the mean score fell on the same questions, with a 95 % interval.

    Newcombe's square-and-add interval for paired proportions (Statistics in Medicine 17, 1998): built from the two
    Wilson intervals and the correlation of the pairs, so that it has a width even where nothing changed. For scores
    between 0 and 1 the means stand in for proportions, which makes it wider, never narrower.

    Args:
        before: a score in [0, 1] for each question.
        after: likewise, in the same order.

    Returns:
        Loss (positive: worse than before), its lower and its upper bound.

    Raises:
        ValueError: different numbers of questions, or none.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} scores are no pairs")
    n = len(before)
    first, second = sum(before) / n, sum(after) / n
    covariance = sum((a - first) * (b - second) for a, b in zip(before, after, strict=True)) / n
    scale = math.sqrt(first * (1 - first) * second * (1 - second))
    return loss_interval(first, second, covariance / scale if scale > 0 else 0.0, n)


def loss_interval(before: float, after: float, correlation: float, n: int) -> tuple[float, float, float]:
    """:func:`paired_loss` from the two means, the correlation of the pairs, and the number of questions."""
    (low1, high1), (low2, high2) = wilson(before * n, n), wilson(after * n, n)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    loss = before - after
    return loss, loss - reach(before - low1, high2 - after), loss + reach(high1 - before, after - low2)
