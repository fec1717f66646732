"""`vtc sweep` and `vtc tune` over tasks of lmms-eval itself, against our own task of the same scenes."""

import csv
import importlib.util
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
from vtc.cli import app
from vtc.commands.sweep import make_exam

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: `nox -s lmms_eval` runs these", allow_module_level=True)

from lmms_reference import QUESTIONS, evaluate, model_args, write_tiny_qwen

from vtc_lmms_eval import scenes
from vtc_lmms_eval.tasks import APART

pytestmark = pytest.mark.lmms_eval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task, data and model."""
    path = tmp_path_factory.mktemp("lmms_eval")
    scenes.write(path, QUESTIONS)
    return path


# ------------------------------------------------------------------------------------------------------------ vtc sweep


def exam(folder, task, model="tinyvlm", questions=QUESTIONS):
    return make_exam(str(model), task, None if task == "tinyvlm" else folder, questions, "cpu", 1)[0]


@pytest.mark.parametrize("shipped", [True, False])
def test_a_sweep_scores_every_question_as_our_own_task_does(folder, shipped):
    """Through the shipped model, or a checkpoint with a chat template; the last method loses answers."""
    own = exam(folder, "tinyvlm")
    theirs = exam(folder, scenes.TASK, "tinyvlm" if shipped else folder / "model")
    assert [q.type == APART for q in theirs.asked] == [q.type == "count" for q in own.asked]
    means = []
    for method in (None, vtc.DivPrune(keep=0.25), vtc.Random(keep=4)):
        config = None if method is None else vtc.CompressionConfig.of(method)
        taken = own.take(config)
        assert theirs.take(config) == taken
        means.append(sum(theirs.headline(taken.scores)) / (QUESTIONS * 5 / 6))
    assert means[0] >= means[1] > means[2] > 0
    found = evaluate(folder, model_args(folder, "method=divprune,keep=0.25"))["results"][scenes.TASK]
    assert found["answer,none"] == pytest.approx(means[1])  # and as lmms-eval does


def test_another_family_is_swept_in_batches(folder, tmp_path):
    """Qwen2.5-VL, with random weights and a tokenizer that pads on the right: answers are those of one at a time."""
    write_tiny_qwen(tmp_path)
    theirs = exam(folder, scenes.TASK, tmp_path, questions=12)
    said = []
    theirs = replace(theirs, task=replace(theirs.task, score=lambda text, question: said.append(text) or 0.0))
    config = vtc.CompressionConfig.of(vtc.DivPrune(keep=0.25))
    for each in (theirs, replace(theirs, size=1)):
        assert each.take(config).tokens == pytest.approx(each.take().tokens / 4, abs=0.5)
    assert len({len(q.prompt) for q in theirs.asked}) > 1
    assert len(set(said)) > 1
    assert said[:24] == said[24:]


def test_vtc_sweep_goes_on_and_writes_its_page(folder, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-c", "from vtc.cli import main; main()", "sweep", "tinyvlm", "--task", scenes.TASK]
    command += ["--include-path", str(folder), "-m", "divprune", "-k", "0.25", "-n", str(QUESTIONS), "--batch", "1"]
    command += ["--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]
    file = tmp_path / "sweep.csv"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and not (file.exists() and file.read_text().count("\n") > 2):
            time.sleep(0.05)
        child.kill()
    assert child.returncode < 0  # in the middle
    before = file.read_text()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file.read_text().startswith(before[: before.rindex("\n") + 1])
    rows = list(csv.DictReader(file.open()))
    assert [row["method"] for row in rows] == ["none", "random", "grid", "downsample", "pool", "divprune"]
    assert {(row["task"], row["questions"]) for row in rows} == {(scenes.TASK, str(QUESTIONS))}
    assert f"Task {scenes.TASK}, {QUESTIONS} questions" in (tmp_path / "sweep.html").read_text()


def write_task(folder, name, metric="exact_match", aggregation="mean", **lines):
    """The scenes with one metric and some other lines in their config."""
    config = (folder / f"{scenes.TASK}.yaml").read_text().split("metric_list:")[0].replace(scenes.TASK, name)
    added = "".join(f"{key}: {value}\n" for key, value in lines.items())
    metrics = f"metric_list:\n  - metric: {metric}\n    aggregation: {aggregation}\n    higher_is_better: true\n"
    (folder / f"{name}.yaml").write_text(config + added + metrics)  # of two lines with one key, the later counts


POPE = "!function lmms_eval.tasks.pope.utils.pope"
DOCS = """
def yes_or_no(docs):
    return docs.map(lambda doc, i: {"answer": "yes" if i % 3 else "no", "question_id": i}, with_indices=True)

def two(doc):
    return [doc["image"]] * 2

def none(doc):
    return []
"""


@pytest.fixture(scope="module")
def others(folder, tmp_path_factory):
    """Tasks with the scores of other benchmarks, over the scenes."""
    path = tmp_path_factory.mktemp("others")
    for name in (f"{scenes.TASK}.yaml", "scenes.parquet"):
        (path / name).write_bytes((folder / name).read_bytes())
    (path / "docs.py").write_text(DOCS)
    plain = {"process_results": "null"}
    pope = {"process_docs": "!function docs.yes_or_no", "process_results": f"{POPE}_process_results"}
    write_task(path, "plain", **plain)
    write_task(path, "accuracy", "pope_accuracy", f"{POPE}_aggregate_accuracy", **pope)
    write_task(path, "f1", "pope_f1_score", f"{POPE}_aggregate_f1_score", **pope)
    write_task(path, "two", doc_to_visual="!function docs.two", **plain)
    write_task(path, "none", doc_to_visual="!function docs.none", **plain)
    write_task(path, "likely", output_type="loglikelihood", **plain)
    write_task(path, "gone", dataset_path="nobody/nothing", dataset_kwargs="null", **plain)
    return path


def test_scores_of_other_benchmarks(others):
    """lmms-eval's own exact_match, and POPE's accuracy, which its aggregation makes of the documents."""
    plain = exam(others, "plain", questions=6)
    assert plain.task.scores([q.answer for q in plain.asked], plain.asked) == [1.0] * 6
    assert plain.task.scores(["a purple cow"] * 6, plain.asked) == [0.0] * 6
    accuracy = exam(others, "accuracy", questions=6)
    assert [q.answer for q in accuracy.asked] == ["no", "yes", "yes"] * 2
    assert accuracy.task.scores([" Yes"] * 6, accuracy.asked) == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("task", "questions", "said"),
    [
        ("f1", 12, "its metric 'pope_f1_score' is no mean over documents"),
        ("two", 2, "document 0 has 2 pictures, and one is asked about; `vtc eval MODEL --tasks two`"),
        ("none", 2, "document 0 has no pictures"),
        ("likely", 2, "its output_type is 'loglikelihood'"),
        ("gone", 2, "task 'gone' of lmms-eval cannot be loaded"),
        ("plain", 61, "--questions 61: task 'plain' has 60 documents"),
        ("vtc_scene", 2, "unknown task 'vtc_scene'; did you mean 'vtc_scenes'"),
        ("mmmu", 2, "'mmmu' is a group of lmms-eval's tasks; name one of them, such as mmmu_val"),
        ("llava_in_the_wild", 2, "judged by a model, through lmms_eval.llm_judge"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(others, tmp_path, monkeypatch, task, questions, said):
    monkeypatch.setattr(vtc_tinyvlm, "load", lambda: pytest.fail("loaded"))
    command = ["tune", "tinyvlm", "--task", task, "--include-path", str(others), "-n", str(questions)]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
