"""lmms-eval itself with pruned models: the shipped one on its scenes, against our own evaluation. Runs it for real."""

import csv
import importlib.util
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
from vtc_tinyvlm.evaluate import generate, prepare, score

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed: `nox -s lmms_eval` runs these", allow_module_level=True)

from lmms_eval import evaluator
from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.tasks import TaskManager
from zoo import models

import vtc_lmms_eval.model as ours
from vtc.cli import app
from vtc.commands.sweep import make_exam
from vtc_lmms_eval import EvaluationStopped, runs, scenes
from vtc_lmms_eval.tasks import APART

pytestmark = pytest.mark.lmms_eval

ROOT = Path(__file__).parents[1]
QUESTIONS = 60
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


def model_args(folder, pruning, model="model"):
    return f"base=llava_hf,pretrained={folder / model},{pruning}"


def evaluate(folder, arguments, simple=False, limit=None, batch=1, task=scenes.TASK):
    return evaluator.simple_evaluate(
        model="vtc",
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), model_name="vtc"),
        batch_size=batch,
        device="cpu",
        limit=limit,
        force_simple=simple,
        log_samples=True,
    )


def answers(result, task=scenes.TASK):
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def own_answers(method):
    """The same questions as benchmarks/accuracy.py asks them: in batches, through `vtc.patch`."""
    model, processor = vtc_tinyvlm.load()
    batches = prepare(vtc_tinyvlm.evaluation_questions(QUESTIONS), processor, 20)
    if method is None:
        return [text for batch in batches for text in generate(model, processor, batch)]
    with vtc.patch(model, method):
        return [text for batch in batches for text in generate(model, processor, batch)]


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


def test_another_base_in_batches(folder, tmp_path):
    """Qwen2.5-VL, with random weights: chat messages, its own arguments, four samples at a time, bfloat16."""
    write_tiny_qwen(tmp_path)
    arguments = f"base=qwen2_5_vl,pretrained={tmp_path},device_map=cpu,min_pixels=64,max_pixels=1024"
    result = evaluate(folder, f"{arguments},method=divprune,keep=0.25", limit=8, batch=4)
    assert len(answers(result)) == 8
    numbers = {k: v for k, v in result["throughput"].items() if k.startswith(runs.PREFIX)}
    assert numbers["avg_vtc_prompts"] == 8
    assert (numbers["avg_vtc_visual_tokens_before"], numbers["avg_vtc_visual_tokens_after"]) == (64, 16)


def write_tiny_qwen(folder):
    words = [f"w{i}" for i in range(models.VOCAB)]
    special = {"<|endoftext|>": models.PAD, "<|im_end|>": models.EOS, "<unk>": 3, "<|image_pad|>": models.IMAGE}
    special |= {"<|video_pad|>": models.VIDEO, "<|vision_start|>": models.START, "<|vision_end|>": models.END}
    for word, index in special.items():
        words[index] = word
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(special))
    tokens = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **tokens)
    template = (
        "{% for m in messages %}{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{{ ' <|vision_start|> <|image_pad|> <|vision_end|>' if p['type'] == 'image' else ' ' + p['text'] }}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    patches = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}
    pictures, videos = tf.Qwen2VLImageProcessor(**patches), tf.Qwen2VLVideoProcessor(**patches)
    tf.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template).save_pretrained(folder)
    models.qwen2_5_vl().save_pretrained(folder)


def test_afterwards_the_model_is_free(folder):
    lm = ours.VtcChat.create_from_arg_string(model_args(folder, "method=divprune,keep=0.25"), {"device": "cpu"})
    model = lm.model
    before = set(vtc_tinyvlm.load()[0].__dict__)
    assert "generate" in vars(model)
    lm.clean()
    assert set(model.__dict__) == before
    assert not {"generate_until", "clean", "loglikelihood"} & set(vars(lm))


def test_two_processes_give_the_answers_of_one(tmp_path):
    """Each patches a replica of its own; torchrun and gloo, on the CPU."""
    script = ROOT / ".ci" / "lmms_eval" / "two_processes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--questions", "13"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 and 13 answers, 0 of 13 differ" in done.stdout


# ------------------------------------------------------------------------------------------------------------- vtc eval


def test_vtc_eval_compares_and_resumes(tmp_path):
    command = ["eval", "--questions", "12", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*command, "--method", "divprune"], env={"COLUMNS": "200"})
    assert first.exit_code == 0, first.output
    assert "divprune" in first.output
    assert "144.0 → 36.0" in first.output
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
        scores, tokens = own.take(config)
        assert theirs.take(config) == (scores, tokens)
        means.append(sum(theirs.headline(scores)) / (QUESTIONS * 5 / 6))
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
        assert each.take(config)[1] == pytest.approx(each.take()[1] / 4, abs=0.5)
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


# ------------------------------------------------------------------------------------------------------------- failures


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
