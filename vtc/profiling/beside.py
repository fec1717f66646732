"""A cell's answers beside those of others: what was lost, what stayed as it was, and what a small picture loses.

*Loyalty* is the share of answers that are, word for word, the unpruned model's, right or wrong (EffiVLM-Bench, arXiv
2506.00479). The *hard* questions of a budget are those that the whole picture answers and a smaller one of as many
tokens does not (after VTC-Bench, arXiv 2510.07143, which filters benchmarks by downsampling): many benchmarks consist
of questions for which any few tokens would do, and methods differ on the others.
"""

from __future__ import annotations

from typing import Any

from vtc.profiling.exam import Answers, Exam
from vtc.profiling.intervals import paired_loss, wilson


def accuracy(exam: Exam, answers: Answers) -> dict[str, Any]:
    """Accuracy with its 95 % interval, and that of the questions which are kept apart."""
    counted = exam.headline(answers.scores)
    low, high = wilson(sum(counted), len(counted))
    kept = set(exam.counted)
    apart = [score for i, score in enumerate(answers.scores) if i not in kept]
    return {
        "accuracy": sum(counted) / len(counted),
        "accuracy_low": low,
        "accuracy_high": high,
        "apart": sum(apart) / len(apart) if apart else None,
    }


def beside_unpruned(exam: Exam, answers: Answers, unpruned: Answers) -> dict[str, Any]:
    """Loss and loyalty on the questions that count, with 95 % intervals."""
    loss, loss_low, loss_high = paired_loss(exam.headline(unpruned.scores), exam.headline(answers.scores))
    same = [answers.said[i] == unpruned.said[i] for i in exam.counted]
    low, high = wilson(sum(same), len(same))
    return {
        "loss": loss,
        "loss_low": loss_low,
        "loss_high": loss_high,
        "loyalty": sum(same) / len(same),
        "loyalty_low": low,
        "loyalty_high": high,
    }


def beside_downsampled(exam: Exam, answers: Answers, unpruned: Answers, downsampled: Answers | None) -> dict[str, Any]:
    """How many questions are hard at this budget, and how many of them are still answered, with a 95 % interval.

    Nothing where there is no such baseline, or no hard question.
    """
    blank: dict[str, Any] = dict.fromkeys(("hard_questions", "hard", "hard_low", "hard_high"))
    if downsampled is None:
        return blank
    hard = [i for i in exam.counted if unpruned.scores[i] >= RIGHT > downsampled.scores[i]]
    if not hard:
        return blank | {"hard_questions": 0}
    right = sum(answers.scores[i] for i in hard)
    low, high = wilson(right, len(hard))
    return {"hard_questions": len(hard), "hard": right / len(hard), "hard_low": low, "hard_high": high}


RIGHT = 0.5
"""From this score on an answer counts as right, where a task gives more than 0 and 1."""
