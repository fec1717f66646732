"""lmms-eval itself with pruned models, and `vtc eval`: the shipped one on its scenes, against our own evaluation."""

import csv
import importlib.util
import json

import pytest
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
from vtc.cli import app
from vtc_tinyvlm.evaluate import score

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: `nox -s lmms_eval` runs these", allow_module_level=True)

from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_reference import QUESTIONS, answers, evaluate, model_args, own_answers, write_tiny_qwen

import vtc_lmms_eval.model as ours
from vtc_lmms_eval import EvaluationStopped, runs, scenes

pytestmark = pytest.mark.lmms_eval

METHODS = {
    "method=none": None,
    "method=divprune,keep=0.25": vtc.DivPrune(keep=0.25),
    "method=todre,keep=0.1,method.stage2=true": vtc.ToDRE(keep=0.1, stage2=True),
    "method=transprune,keep=0.125": vtc.TransPrune(keep=0.125),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task, data and model."""
    path = tmp_path_factory.mktemp("lmms_eval")
    scenes.write(path, QUESTIONS)
    return path


# ---------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("pruning", METHODS)
def test_answers_and_scores_are_those_of_our_own_evaluation(folder, pruning):
    result = evaluate(folder, model_args(folder, pruning))
    texts = own_answers(METHODS[pruning])
    assert answers(result) == texts
    asked = vtc_tinyvlm.evaluation_questions(QUESTIONS)
    right = score(texts, asked)["answer"]
    means = {
        kind: sum(right[i] for i, q in enumerate(asked) if q.type == kind) / (QUESTIONS / 6)
        for kind in vtc_tinyvlm.TYPES
    }
    found = result["results"][scenes.TASK]
    assert {kind: found[f"answer_{kind},none"] for kind in means} == pytest.approx(means)
    means.pop("count")
    assert found["answer,none"] == pytest.approx(sum(means.values()) / 5)
    numbers = {k: v for k, v in result["throughput"].items() if k.startswith(runs.PREFIX)}
    assert numbers["avg_vtc_prompts"] == QUESTIONS
    assert numbers["avg_vtc_visual_tokens_before"] == 144
    left = {"none": 144, "divprune": 36, "transprune": 18}
    name = pruning.split(",")[0].removeprefix("method=")
    if name in left:
        assert numbers["avg_vtc_visual_tokens_after"] == left[name]
    assert numbers["avg_vtc_ttft_ms_median"] > 0
    assert numbers["avg_vtc_decode_tokens_per_s_and_sequence"] > 0
    assert ("avg_vtc_realised_fraction_median" in numbers) == (name != "none")
    assert result["throughput"]["total_gen_tokens"] > 0  # the base's own sums are still there


def test_the_simple_model_with_the_checkpoint_as_it_is_shipped(folder):
    """`--force_simple` needs no chat template of the checkpoint's own; and the base's arguments reach the base."""
    arguments = (
        f"base=llava_hf,pretrained={vtc_tinyvlm.CHECKPOINT},method=divprune,keep=0.25,"
        "chat_template={{ messages[0]['content'] }}"
    )
    result = evaluate(folder, arguments, simple=True, limit=12)
    assert answers(result) == own_answers(vtc.DivPrune(keep=0.25))[:12]
    assert "models.simple.llava_hf" in result["config"]["model_backend"]
    assert result["throughput"]["total_gen_tokens"] > 0  # this base logs none: ours


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")  # lmms-eval passes them, no argument is ours
def test_another_base_in_batches(folder, tmp_path):
    """Qwen2.5-VL, with random weights: chat messages, its own arguments, four samples at a time, bfloat16."""
    write_tiny_qwen(tmp_path)
    arguments = f"base=qwen2_5_vl,pretrained={tmp_path},device_map=cpu,min_pixels=64,max_pixels=1024"
    result = evaluate(folder, f"{arguments},method=divprune,keep=0.25", limit=8, batch=4)
    assert len(answers(result)) == 8
    numbers = {k: v for k, v in result["throughput"].items() if k.startswith(runs.PREFIX)}
    assert numbers["avg_vtc_prompts"] == 8
    assert (numbers["avg_vtc_visual_tokens_before"], numbers["avg_vtc_visual_tokens_after"]) == (64, 16)


@pytest.mark.parametrize("base", ["llava_hf", "internvl_hf"])
def test_a_base_without_batches_is_refused_before_its_weights(folder, base, monkeypatch):
    """In lmms-eval 0.7.3 these assert it when the first answer is wanted."""
    arguments = model_args(folder, "method=divprune,keep=0.25").replace("base=llava_hf", f"base={base}")
    monkeypatch.setattr(ours.bases, "check_family", lambda *given: pytest.fail("too late"))
    with pytest.raises(ours.EvaluationStopped, match=rf"base='{base}' takes one sample at a time.*batch_size 8"):
        ours.VtcChat.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 8})


def test_afterwards_the_model_is_free(folder):
    lm = ours.VtcChat.create_from_arg_string(model_args(folder, "method=divprune,keep=0.25"), {"device": "cpu"})
    model = lm.model
    before = set(vtc_tinyvlm.load()[0].__dict__)
    assert "generate" in vars(model)
    lm.clean()
    assert set(model.__dict__) == before
    assert not {"generate_until", "clean", "loglikelihood"} & set(vars(lm))


def test_two_processes_give_the_answers_of_one(folder, tmp_path):
    """Each patches a replica of its own; torchrun and gloo, on the CPU."""
    (run,) = runs.plan(["divprune"], ["0.25"], [], [scenes.TASK])
    outcome = runs.execute(run, runs.Settings("llava_hf", str(folder / "model"), "cpu", 1, 2, 13, folder, 1), tmp_path)
    assert not outcome.reason
    (log,) = outcome.folder.rglob("*_samples_*.jsonl")
    samples = sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    one = evaluate(folder, model_args(folder, "method=divprune,keep=0.25"), limit=13)
    assert [sample["filtered_resps"] for sample in samples] == answers(one)
    assert len(samples) == 13
    results = one["results"][scenes.TASK]
    assert outcome.scores == {(scenes.TASK, name): results[f"{name},none"] for _, name in outcome.scores}


# ------------------------------------------------------------------------------------------------------------- vtc eval


def test_vtc_eval_compares_and_resumes(tmp_path):
    command = ["eval", "--questions", "12", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*command, "--method", "divprune"], env={"COLUMNS": "200"})
    assert first.exit_code == 0, first.output
    assert "divprune" in first.output
    assert "144.0 → 36.0" in first.output
    (whole, pruned) = (own_answers(method)[:12] for method in (None, vtc.DivPrune(keep=0.25)))
    loyal = sum(a == b for a, b in zip(whole, pruned, strict=True)) / 12
    rows = csv.DictReader((tmp_path / "summary.csv").open())
    assert {(row["method"], float(row["loyalty"])) for row in rows} == {("none", 1.0), ("divprune", loyal)}
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")}
    assert len(logs) == 2
    again = CliRunner().invoke(app, [*command, "--method", "divprune"], env={"COLUMNS": "200"})
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")} == logs  # nothing was run again


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "llava_h"], "did you mean llava_hf"),
        (["--method", "globalcom2"], "thumbnail"),
        (["--keep", "3.5"], "keep=3.5"),
        (["nobody/nothing", "--tasks", "gqa"], "first thing wanted from the hub"),
    ],
)
def test_vtc_eval_refuses_bad_input_before_anything_runs(tmp_path, arguments, said):
    done = CliRunner().invoke(app, ["eval", *arguments, "--questions", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not list(tmp_path.rglob("log.txt"))


def test_a_run_whose_generate_raises_ends_with_an_error_and_the_reason(folder, tmp_path):
    """lmms-eval's llava_hf swallows this one, scores empty answers and exits with status 0."""
    task = (folder / f"{scenes.TASK}.yaml").read_text().replace(scenes.TASK, "vtc_broken")
    task = task.replace("max_new_tokens: 3", "max_new_tokens: -1")
    (tmp_path / "vtc_broken.yaml").write_text(task.replace("scenes.parquet", str(folder / "scenes.parquet")))
    command = ["eval", str(folder / "model"), "--tasks", "vtc_broken", "--include-path", str(tmp_path), "--no-unpruned"]
    command += ["--device", "cpu", "--threads", "1", "--limit", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "divprune 0.25 vtc_broken failed: generate raised ValueError: `max_new_tokens`" in done.stderr
    (log,) = tmp_path.rglob("log.txt")  # the reason is only read from it when the process ended with a status
    assert "vtc: generate raised ValueError" in log.read_text()


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_pruner_that_is_not_there(folder, monkeypatch):
    def taken_off(model, config):
        handle = vtc.patch(model, config)
        handle.unpatch()
        return handle

    monkeypatch.setattr(ours, "patch", taken_off)
    with pytest.raises(EvaluationStopped, match="did not fire for a prompt with 144 visual tokens"):
        evaluate(folder, model_args(folder, "method=divprune"), limit=2)


def test_a_base_that_goes_another_way(folder, monkeypatch):
    monkeypatch.setattr(LlavaHf, "generate_until", lambda self, requests: ["red"] * len(requests))
    with pytest.raises(EvaluationStopped, match="the pruner never fired: 2 requests"):
        evaluate(folder, model_args(folder, "method=divprune"), limit=2)


def test_a_pruner_that_drops_nothing(folder):
    with pytest.raises(EvaluationStopped, match="dropped none"):
        evaluate(folder, model_args(folder, "method=random,keep=0.999"), limit=2)


def test_likelihoods_are_refused(folder):
    lm = ours.VtcChat.create_from_arg_string(model_args(folder, "method=divprune"), {"device": "cpu"})
    with pytest.raises(EvaluationStopped, match="likelihoods"):
        lm.loglikelihood([])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("base=llava_hff,method=divprune", "did you mean llava_hf"),
        ("base=vtc,method=divprune", "no model of lmms-eval"),
        ("base=async_openai,method=divprune", "no Hugging Face model"),
        ("base=vllm,method=divprune", "in another program"),
        ("base=llava_hf,pretrained={},method=globalcom2", "thumbnail"),
        ("base=llava_hf,pretrained={},method=divprune,nonsense=1", "nonsense"),
        ("base=llava_hf,pretrained={}", "method=NAME"),
    ],
)
def test_bad_input_stops_before_the_model_is_loaded(folder, monkeypatch, arguments, said):
    from transformers import LlavaForConditionalGeneration as Model

    monkeypatch.setattr(Model, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(EvaluationStopped, match=said):
        ours.VtcChat.create_from_arg_string(arguments.replace("{}", str(folder / "model")), {"device": "cpu"})


def test_an_untested_lmms_eval(monkeypatch):
    monkeypatch.setattr("vtc_lmms_eval.bases.version", lambda name: "0.9.0")
    with pytest.raises(EvaluationStopped, match=r"lmms-eval 0\.9\.0 is outside the range"):
        ours.VtcChat.create_from_arg_string("base=llava_hf,method=divprune", {})
