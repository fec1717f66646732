"""`vtc tune`: the smallest keep that is surely good enough, or a clear word that the sample is too small."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.commands.tune import parse_drop
from vtc.profiling.exam import Answers
from vtc.profiling.tune import tune, with_keep

DIVPRUNE = vtc.CompressionConfig("divprune", {"keep": 0.5})


class Pretended:
    """An exam whose model loses a known share of the answers at each keep."""

    def __init__(self, questions, lost, accuracy=1.0):
        self.lost, self.asked = lost, []
        self.before = [float(i < accuracy * questions) for i in range(questions)]

    def headline(self, scores):
        return scores

    def take(self, config=None, way=None, tick=None):
        if config is None:
            return Answers(self.before, [], 144.0)
        keep = config.options["keep"]
        self.asked.append(keep)
        wrong = round(self.lost(keep) * len(self.before))
        return Answers([0.0] * wrong + self.before[wrong:], [], 144 * keep)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.mark.parametrize("threshold", [0.02, 0.13, 0.5, 0.99])
def test_bisection_finds_the_smallest_keep(threshold):
    exam = Pretended(1000, lambda keep: 0.0 if keep >= threshold else 0.3)
    found = tune(exam, DIVPRUNE, 0.01)
    assert found.config.options["keep"] == threshold
    assert len(exam.asked) <= 7
    assert found.unsure == ()
    assert {trial.verdict for trial in found.trials} <= {"within", "beyond"}
    assert found.config.method == "divprune"


def test_a_loss_that_the_sample_cannot_judge_is_not_good_enough():
    exam = Pretended(1000, lambda keep: 0.0 if keep >= 0.4 else 0.01 if keep >= 0.2 else 0.3)
    found = tune(exam, DIVPRUNE, 0.012)
    assert found.config.options["keep"] == 0.4
    assert found.unsure
    assert all(0.2 <= keep < 0.4 for keep in found.unsure)
    many = Pretended(100_000, lambda keep: 0.0 if keep >= 0.4 else 0.01 if keep >= 0.2 else 0.3)
    assert tune(many, DIVPRUNE, 0.012).config.options["keep"] == 0.2


def test_nothing_is_found_where_everything_hurts():
    found = tune(Pretended(1000, lambda keep: 0.5), DIVPRUNE, 0.01)
    assert found.config is None
    assert {trial.verdict for trial in found.trials} == {"beyond"}


def test_too_few_questions_are_refused_with_a_number_that_would_do():
    exam = Pretended(50, lambda keep: 0.0)
    with pytest.raises(ValueError, match=r"50 questions are too few.* about (\d+) questions would do") as error:
        tune(exam, DIVPRUNE, 0.01)
    assert exam.asked == []
    enough = int(str(error.value).split(" about ")[1].split()[0])
    assert 380 <= enough <= 450
    assert tune(Pretended(enough, lambda keep: 0.0), DIVPRUNE, 0.01).config.options["keep"] == 0.01


@pytest.mark.parametrize("method", [vtc.PixelPrune(), vtc.PruMerge(adaptive=True)])
def test_a_method_that_looks_at_no_keep_is_refused(method):
    exam = Pretended(1000, lambda keep: 0.0)
    with pytest.raises(ValueError, match=f"{method.name} lets the picture decide"):
        tune(exam, vtc.CompressionConfig.of(method), 0.01)
    assert exam.asked == []


def test_other_options_and_positions_stay():
    config = vtc.CompressionConfig("todre", {"keep": 0.5, "variant": "k_center"}, "compact", calibration="size")
    changed = with_keep(config, 0.13)
    assert changed.calibration == "size"
    assert (changed.options["keep"], changed.options["variant"], changed.positions) == (0.13, "k_center", "compact")


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02)])
def test_a_bound_is_a_share_or_per_cent(text, value):
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "0", "-1%", "101%", "much", "nan"])
def test_other_bounds_are_refused(text):
    with pytest.raises(ValueError, match="write 1% or"):
        parse_drop(text)
    with pytest.raises(ValueError, match="max_drop"):
        tune(SimpleNamespace(), DIVPRUNE, 1.0)


def test_the_command_writes_the_config(tmp_path):
    pytest.importorskip("vtc_tinyvlm")
    arguments = ("tune", "tinyvlm", "-m", "todre", "-o", "variant=k_center", "--max-drop", "40%", "-n", 18)
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "vtc_config.json").read_text())
    assert (written["method"], written["options"]["variant"]) == ("todre", "k_center")
    assert 0 < written["options"]["keep"] < 1
    assert f"keep {written['options']['keep']:g} written to" in result.stdout
    assert vtc.CompressionConfig.from_pretrained(tmp_path).build().keep == written["options"]["keep"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--max-drop", "1"), "write 1% or 0.01"),
        (("--method", "divprun"), "did you mean 'divprune'"),
        (("--method", "globalcom2"), "globalcom2"),
        (("-o", "heat=1"), "no option 'heat'"),
        (("-n", 12), "questions are too few"),
    ],
)
def test_bad_arguments_write_nothing(arguments, told, tmp_path):
    pytest.importorskip("vtc_tinyvlm")
    result = invoke("tune", "tinyvlm", "-n", 6, *arguments, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []
