"""Tasks of lmms-eval in `vtc sweep`, as far as that goes without lmms-eval: scores, refusals, prompts, judges.

test_lmms_eval_sweep.py has the tasks of lmms-eval itself.
"""

import functools
import importlib.util
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm as tiny
from vtc.cli import app
from vtc.profiling.exam import Exam
from vtc.profiling.tasks import get_task
from vtc_lmms_eval import judges, scenes
from vtc_lmms_eval import tasks as bridge
from vtc_lmms_eval.tasks import APART, Benchmark, Question, Unfit, refuse, worded


def mean(values):
    return sum(values) / len(values)


class First:
    """lmms-eval's filter `take_first`."""

    def apply(self, answers, docs):
        assert len(answers) == len(docs)
        return (each[0] for each in answers)


class Pretended:
    """A task with lmms-eval's methods: yes or no questions, scored by `process_results` and aggregations."""

    def __init__(self, docs, process_results, metrics, **config):
        self.eval_docs = docs
        self.eval_docs_no_media = [{k: v for k, v in doc.items() if k != "image"} for doc in docs]
        self.process_results, self._metrics = process_results, metrics
        self.config = SimpleNamespace(num_fewshot=None, generation_kwargs=config)
        self._filters = [SimpleNamespace(filters=[First()])]

    def aggregation(self):
        return self._metrics

    def doc_to_visual(self, doc):
        return doc["image"]

    def doc_to_target(self, doc):
        return doc["answer"]

    def fewshot_context(self, doc, shots):
        return doc["question"]


def documents(n=12):
    picture = Image.new("RGB", (8, 8))
    return [
        {
            "image": [picture],
            "question": f"is {i} even",
            "answer": ("yes", "no")[i % 2],
            "type": ("a", "b", "b")[i % 3],
        }
        for i in range(n)
    ]


def right(doc, results):
    return {"acc": float(results[0] == doc["answer"])}


def made(process_results=right, metrics=None, docs=None, **config):
    docs = documents() if docs is None else docs
    return Benchmark("yesno", Pretended(docs, process_results, metrics or {"acc": mean}, **config), mean)


# --------------------------------------------------------------------------------------------------------------- scores


def test_questions_are_the_first_documents_and_scores_the_tasks():
    benchmark = made(max_new_tokens=16)
    task = benchmark.as_task()
    asked = task.questions(5)
    assert [(q.index, q.text, q.answer, q.type) for q in asked[:2]] == [
        (0, "is 0 even", "yes", ""),
        (1, "is 1 even", "no", ""),
    ]
    assert asked[3].image.size == (8, 8)
    assert task.scores(["yes", "yes", "yes", "no", "maybe"], asked) == [1, 0, 1, 1, 0]
    assert (task.name, task.max_new_tokens, task.model) == ("yesno", 16, None)
    assert made().as_task().max_new_tokens == bridge.MAX_NEW_TOKENS


def test_the_tasks_own_aggregation_gives_the_number_of_a_document():
    def told(doc, results):
        return {"acc": {"told": results[0], "true": doc["answer"]}}

    def percent(values):
        print("a table")  # as some of lmms-eval's do
        return 100 * mean([v["told"] == v["true"] for v in values])

    task = made(told, {"acc": percent}).as_task()
    assert task.scores(["yes", "yes"], task.questions(2)) == [1, 0]


def test_what_the_metric_leaves_out_is_shown_apart():
    """As vtc_scenes: by a mean over types without one of them, or by a metric that a document does not have."""

    def typed(doc, results):
        value = right(doc, results)["acc"]
        return {"acc": {"type": doc["type"], "score": value}, f"acc_{doc['type']}": value}

    def without_a(values):
        return mean([v["score"] for v in values if v["type"] != "a"])

    def missing(doc, results):
        return {k: v for k, v in right(doc, results).items() if doc["type"] != "a"} | {"every": 0.5}

    named = {"acc": without_a, "acc_a": mean, "acc_b": mean}
    for task, score in ((made(typed, named), 1.0), (made(missing, {"acc": mean, "every": mean}), 0.5)):
        task = task.as_task()
        asked = task.questions(6)
        assert [q.type for q in asked] == [APART, "", "", APART, "", ""]
        exam = Exam(None, None, task, asked)
        assert exam.counted == [1, 2, 4, 5]
        assert task.score("yes", asked[0]) == score


def test_answers_end_where_the_task_says():
    for until in (["\n\n", ""], "\n\n"):
        task = made(until=until).as_task()
        (question,) = task.questions(1)
        assert task.score("yes\n\nand so on", question) == 1
        assert task.score("no\n\nyes", question) == 0
    thinking = Benchmark("yesno", Pretended(documents(), right, {"acc": mean}), mean, lambda text: text.split(">")[-1])
    assert thinking.score("<think>no</think>yes", question) == 1


def test_an_answer_out_of_range_is_an_error():
    benchmark = made(lambda doc, results: {"acc": len(results[0]) / 3 if results[0] != doc["answer"] else 1.0})
    (question,) = benchmark.questions(1)
    with pytest.raises(ValueError, match=r"document 0: the answer 'always' scores 2.0, which is no number in \[0, 1\]"):
        benchmark.score("always", question)


# ------------------------------------------------------------------------------------------------------------- refusals


def paired(doc, results):
    return {"acc": (doc["answer"], results[0], doc["type"])}


def f1(values):
    hits = sum(true == told == "yes" for true, told, _ in values)
    wrong = sum((true == "yes") != (told == "yes") for true, told, _ in values)
    return 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0


def per_type(values):
    types = {kind for _, _, kind in values}
    return sum(mean([true == told for true, told, each in values if each == kind]) for kind in types)


def two_at_a_time(values):
    assert len(values) % 2 == 0, "pairs only"
    return 0.5


@pytest.mark.parametrize(
    ("process_results", "aggregation", "said"),
    [
        (paired, f1, "'acc' is no mean over documents"),
        (paired, per_type, "'acc' is no mean over documents"),
        (paired, two_at_a_time, "cannot be had of one document: AssertionError: pairs only"),
        (paired, mean, "cannot be had of one document: TypeError"),
        (paired, lambda values: None, "is no number but a NoneType"),
        (paired, lambda values: 0.0, "makes no difference between targets and empty answers"),
        (lambda doc, results: {"acc": 5 * right(doc, results)["acc"]}, mean, r"from 0 to 5, not in \[0, 1\]"),
        (lambda doc, results: {"acc": -1.0}, mean, r"from -1 to -1"),
        (lambda doc, results: {"other": 1.0}, mean, "'acc' has no number for document 0"),
        (lambda doc, results: {"acc": 1.0} if results[0] else {}, mean, "'acc' has no number for document 0"),
        (lambda doc, results: doc["nothing"], mean, "its scoring fails for document 0, answer 'yes': KeyError"),
    ],
)
def test_without_a_number_for_every_document_nothing_is_asked(process_results, aggregation, said):
    with pytest.raises(Unfit, match=said) as refused:
        made(process_results, {"acc": aggregation}).questions(10)
    assert "`vtc eval MODEL --tasks yesno` runs it" in str(refused.value)


@pytest.mark.parametrize(
    ("visuals", "said"),
    [
        ([], "document 7 has no pictures"),
        (None, "document 7 has no pictures"),
        ([Image.new("RGB", (8, 8))] * 2, "document 7 has 2 pictures"),
        (["film.mp4"], "document 7 brings a str, not a picture"),
    ],
)
def test_one_picture_per_question(visuals, said):
    docs = documents()
    docs[7]["image"] = visuals
    assert len(made(docs=docs).questions(7)) == 7
    with pytest.raises(Unfit, match=said):
        made(docs=docs).questions(8)
    with pytest.raises(ValueError, match="--questions 13: task 'yesno' has 12 documents"):
        made(docs=docs).questions(13)
    del docs[7]["image"]
    with pytest.raises(ValueError, match="task 'yesno' of lmms-eval cannot be loaded: KeyError: 'image'"):
        made(docs=docs).questions(8)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"output_type": "multiple_choice"}, "output_type is 'multiple_choice'"),
        ({"class": object}, "a class of its own"),
        ({"repeats": 5}, "asked 5 times"),
        ({"metric_list": [{"metric": "wer", "higher_is_better": False}]}, "'wer' grows with the errors"),
        ({"process_results": lambda doc, results: judged_inside(results)}, "judged by a model, through openai"),
    ],
)
def test_a_config_alone_can_be_enough(config, said):
    with pytest.raises(ValueError, match=said):
        refuse("yesno", config)


def test_a_config_that_says_little_is_fine():
    refuse("yesno", {"task": "yesno", "metric_list": [{"metric": "acc", "aggregation": "mean"}]})
    refuse("yesno", {"process_results": right})


# --------------------------------------------------------------------------------------------------------------- judges


def judged_inside(answer):
    from openai import OpenAI

    return OpenAI().ask(answer)


class Judge:
    def rate(self, answer):
        return [judged_inside(each) for each in answer]


JUDGE = Judge()


def test_judges_are_found_in_what_a_function_reaches():
    def nested(doc, results):
        return [(lambda text: JUDGE.rate(text))(text) for text in results]

    for function in (judged_inside, nested, functools.partial(nested, {}), Judge):
        assert judges.client(function) == "openai"
    for function in (right, paired, f1, scenes.process_results, scenes.headline, len, functools.partial(print)):
        assert judges.client(function) is None


# -------------------------------------------------------------------------------------------------------------- prompts


class Tokenizer:
    bos_token, bos_token_id = "<s>", 1

    def __init__(self, begins):
        self.begins = begins

    def __call__(self, text):
        return {"input_ids": [1] if self.begins else []}


class Templated:
    """A processor with a chat template that writes the first token, as its tokenizer may, too."""

    image_token, chat_template = "<image>", "a template"

    def __init__(self, begins=True):
        self.tokenizer = Tokenizer(begins)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        (message,) = messages
        parts = ["<image>" if part["type"] == "image" else part["text"] for part in message["content"]]
        return f"<s>USER: {' '.join(parts)} ASSISTANT:"


def test_prompts():
    plain = SimpleNamespace(image_token="<picture>")
    (question,) = made().questions(1)
    named = Question(None, 0, "is <image> even", "yes")

    def prompt(question, processor):
        return worded([question], processor)[0].prompt

    assert prompt(question, plain) == "<picture>\nis 0 even"
    assert prompt(named, SimpleNamespace()) == "is <image> even"
    assert prompt(question, Templated()) == "USER: <image> is 0 even ASSISTANT:"
    assert prompt(question, Templated(begins=False)) == "<s>USER: <image> is 0 even ASSISTANT:"
    assert prompt(named, Templated()) == "USER: is <image> even ASSISTANT:"
    with pytest.raises(ValueError, match="document 0 names the picture 2 times, as '<image>'"):
        prompt(Question(None, 0, "<image> or <image>", "yes"), Templated())


# ------------------------------------------------------------------------------------------------------------ the whole


def scenes_task(n):
    """`vtc_scenes` without lmms-eval: its documents, `process_results` and aggregations."""
    docs = [
        {"image": [q.image], "question": q.prompt.removeprefix("<image> "), "answer": q.answer, "type": q.type}
        for q in tiny.evaluation_questions(n)
    ]
    metrics = {"answer": scenes.headline} | {f"answer_{kind}": mean for kind in tiny.TYPES}
    return Benchmark("vtc_scenes", Pretended(docs, scenes.process_results, metrics, max_new_tokens=3), mean).as_task()


def test_scores_and_tokens_are_those_of_our_own_task():
    model, processor = tiny.load()
    own, theirs = get_task("tinyvlm"), scenes_task(24)
    first = Exam(model, processor, own, own.questions(24))
    second = Exam(model, processor, theirs, theirs.wording(theirs.questions(24), processor))
    assert second.counted == first.counted
    seen = []
    for method in (None, vtc.DivPrune(keep=0.25), vtc.Random(keep=2)):
        config = None if method is None else vtc.CompressionConfig.of(method)
        taken = first.take(config)
        assert second.take(config) == taken
        seen.append(sum(taken.scores))
    assert seen[0] > seen[2] > 0  # the last loses answers: the equality above is not that of perfect scores


def test_vtc_sweep_takes_a_task_of_lmms_eval(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bridge, "find", lambda name, include, also: asked.append((name, include)) or scenes_task(6))
    command = ["sweep", "tinyvlm", "--task", "vtc_scenes", "--include-path", str(tmp_path), "--no-baselines"]
    command += ["-m", "divprune", "-k", "0.25", "--batch", "2", "-n", "6", "--repeats", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert asked == [("vtc_scenes", tmp_path)]
    assert "Task vtc_scenes, 6 questions" in (tmp_path / "sweep.html").read_text()
    missing = CliRunner().invoke(app, ["sweep", "--task", "vtc_scenes", "-n", "6", "--out", str(tmp_path)])
    assert missing.exit_code == 2
    assert "task 'vtc_scenes' has no model of its own; name a checkpoint" in missing.stderr


@pytest.mark.parametrize("command", ["sweep", "tune"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--task", "gqa"),
            "known: photovlm, tinyvlm, tinyvlm-next; with lmms-eval its tasks are known, too: pip install",
        ),
        (("--task", "tinyvl"), "did you mean 'tinyvlm'"),
        (("--include-path", "tasks"), "--include-path tasks is for tasks of lmms-eval, and 'tinyvlm' is vtc's own"),
    ],
)
def test_bad_tasks_are_one_line(monkeypatch, command, arguments, said):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else find_spec(name))
    done = CliRunner().invoke(app, [command, "tinyvlm", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
