"""Ways to answer, the sheet of answers, and comparisons question by question."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vtc.profiling.intervals import paired_loss, wilson

tiny = pytest.importorskip("vtc_tinyvlm")
sys.path.append(str(Path(__file__).parents[2]))  # `benchmarks` is no installed package
from benchmarks import paired  # noqa: E402
from benchmarks.answering import AnswerSheet, Paper, Way, able, answer_all, read_answers  # noqa: E402

ASKED = [
    SimpleNamespace(type=kind, answer=answer) for kind, answer in (("color", "red"), ("digit", "4"), ("count", "2"))
]


def test_a_sheet_keeps_what_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    sheet = AnswerSheet(path, ASKED)
    sheet.add(Way("none", 1.0), ["red", "4", "2"])
    again = AnswerSheet(path, ASKED)
    again.add(Way("random", 0.25, seed=1), ["a red, one", "x\ny", ""])
    again.add(Way("divprune", 16, "compact"), ["red", "5", "2"])
    columns = read_answers(path)
    assert list(columns)[3:] == ["none 1.0", "random 0.25 seed=1", "divprune 16 compact"]
    assert columns["random 0.25 seed=1"] == ["a red, one", "x y", ""]
    assert columns["question"] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="other questions; remove it"):
        AnswerSheet(path, ASKED[:2])


def test_comparisons_by_hand(tmp_path: Path) -> None:
    """Eight questions and one that is left out; two seeds of random."""
    asked = [SimpleNamespace(type="digit", answer=str(n)) for n in range(8)] + [
        SimpleNamespace(type="count", answer="9")
    ]
    sheet = AnswerSheet(tmp_path / "answers.csv", asked)
    right = [str(n) for n in range(8)] + ["9"]

    def wrong(*where: int) -> list[str]:
        return ["x" if n in where else text for n, text in enumerate(right)]

    sheet.add(Way("none", 1.0), wrong(7))
    sheet.add(Way("downsample", 0.5), wrong(0, 1, 2, 7))
    sheet.add(Way("divprune", 0.5), wrong(0, 8))
    sheet.add(Way("random", 0.5, seed=0), wrong(0, 1, 3, 7))
    sheet.add(Way("random", 0.5, seed=1), wrong(1, 2))
    rows = {row["method"]: row for row in paired.rows_of(*paired.read(sheet.path))}
    assert list(rows) == ["none", "divprune", "downsample", "random"]
    best, chance = rows["divprune"], rows["random"]
    assert (best["questions"], best["accuracy"], chance["accuracy"]) == (8, 7 / 8, 5 / 8)
    divprune, random = [0.0, *[1.0] * 7], [0.5, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 0.5]
    assert (best["minus_random"], best["minus_random_low"], best["minus_random_high"]) == paired_loss(divprune, random)
    assert best["minus_divprune"] == rows["none"]["minus_random"] == ""
    assert best["loyalty"] == 6 / 8  # 0 and 7 differ
    assert chance["loyalty"] == pytest.approx((5 / 8 + 5 / 8) / 2)
    assert (best["hard_questions"], best["hard"]) == (3, 2 / 3)
    assert chance["hard"] == pytest.approx(1 / 3)
    assert (chance["hard_low"], chance["hard_high"]) == wilson(1.0, 3)
    assert rows["none"]["hard_questions"] is None
    page = paired.markdown(rows.values(), "tinyvlm", "command")
    assert "| downsample | 0.5 | original | 50.0" in page
    exam, found = paired.read(sheet.path)
    with pytest.raises(ValueError, match="no unpruned answers"):
        paired.rows_of(exam, {key: runs for key, runs in found.items() if key[0] != "none"})


@pytest.fixture(scope="module")
def paper() -> tuple[Any, Paper]:
    model, processor = tiny.load()
    return model, Paper(tiny.evaluation_questions(6), processor, size=4)


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        (Way("none", 1.0), 144),
        (Way("divprune", 0.25), 36),
        (Way("intower-late", 0.25), 36),
        (Way("downsample", 0.25), 36),
        (Way("pool", 16), 16),
    ],
    ids=lambda value: getattr(value, "column", None),
)
def test_every_way_answers_every_question(paper: tuple[Any, Paper], way: Way, kept: int) -> None:
    model, questions = paper
    with torch.inference_mode():
        texts, (last, average) = answer_all(model, questions, way)
    assert len(texts) == 6
    assert sum(tiny.is_correct(text, q.answer) for text, q in zip(texts, questions.asked, strict=True)) >= 2
    assert last == average == kept


def test_what_a_model_cannot_do_is_left_out(paper: tuple[Any, Paper]) -> None:
    model, questions = paper
    names = able(model, questions.processor, 0.25, "original")
    assert names[:5] == ["random", "grid", "downsample", "pool", "divprune"]
    assert "globalcom2" not in names  # one thumbnail, no crops
    assert not {"downsample", "pool"} & set(able(model, questions.processor, 0.25, "compact"))
