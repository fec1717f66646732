"""A task of lmms-eval as one of ``vtc sweep`` and ``vtc tune``: its documents, its prompts, its scores.

The model is loaded and run as ever; of lmms-eval only the task is taken: picture by ``doc_to_visual``, text by
``doc_to_text`` (with the description and examples that the task puts before it), score by the filters, the
``process_results`` and the aggregation of its first metric, which is what ``vtc eval`` shows. Answers are greedy and as
long as the task's ``generation_kwargs`` allow, cut where ``until`` ends them.

An accuracy with an interval, and a loss on the same questions, need a number for every question. A document's is what
the task's own aggregation makes of this document alone; that these average to what the aggregation makes of all of
them is tried out before anything runs, on targets and empty answers mixed. What fails that is refused: sums over
categories, F1 and BLEU. So is what may be judged by a model, which is not tried.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vtc.profiling.tasks import Task
from vtc.values import shown
from vtc_lmms_eval import MODEL_ID
from vtc_lmms_eval.judges import client

APART = "apart"
"""Type of the questions that the first metric leaves out; they have the score of the next one that has them."""
MAX_NEW_TOKENS = 1024
"""Where the task does not say; that of most of lmms-eval's models."""
REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""Tags of what does not belong to an answer, where the task does not say: the default of lmms-eval's command line."""


@dataclass(frozen=True)
class Question:
    """One document.

    Attributes:
        task: it is from.
        index: among the task's documents.
        text: of the question, without the picture.
        answer: the target.
        type: empty, or :data:`APART`.
        prompt: for one model; empty before :func:`worded`.
    """

    task: Any = field(repr=False)
    index: int
    text: str
    answer: str
    type: str = ""
    prompt: str = ""

    @property
    def image(self) -> Any:
        """The picture; read anew every time, as all of a benchmark's together may not fit the memory."""
        return self.task.doc_to_visual(self.task.eval_docs[self.index])[0]


def find(name: str, include: Path | None = None, also: Collection[str] = ()) -> Task:
    """The task of lmms-eval with that name.

    Args:
        name: as for ``vtc eval``.
        include: a folder with tasks of one's own.
        also: other names that may have been meant.

    Raises:
        ValueError: no lmms-eval or not a tested one, no such folder, no such task, or one without a number per
            document.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(
            f"unknown task {shown(name)}; {_hint(name, also)}; with lmms-eval its tasks are known, too: "
            "pip install 'visual-token-compression[lmms-eval]'"
        )
    if include is not None and not include.is_dir():
        raise ValueError(f"--include-path {include}: there is no such folder")
    from vtc_lmms_eval.bases import check_version

    check_version()
    with _quiet():
        from lmms_eval.api.metrics import mean
        from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags
        from lmms_eval.tasks import TaskManager
        from lmms_eval.utils import load_yaml_config

        manager = TaskManager(include_path=None if include is None else str(include), model_name=MODEL_ID)
        if name not in manager.task_index:
            raise ValueError(f"unknown task {shown(name)}; {_hint(name, [*also, *manager.all_tasks])}")
        entry = manager.task_index[name]
        if entry["type"] in ("group", "tag"):
            named = entry["task"] if entry["type"] == "tag" else load_yaml_config(entry["yaml_path"])["task"]
            few = ", ".join([each for each in named if isinstance(each, str)][:5])
            raise ValueError(f"{name!r} is a {entry['type']} of lmms-eval's tasks; name one of them, such as {few}")
        with _loading(name):
            config = load_yaml_config(entry["yaml_path"], mode="full")
        refuse(name, config)  # before any data are downloaded
        with _loading(name):
            task = manager.load_task_or_group(name)[name]
        tags = parse_reasoning_tags_config(REASONING, task.config.reasoning_tags) or []
    return Benchmark(name, task, mean, lambda text: strip_reasoning_tags(text, tags)).as_task()


class Unfit(ValueError):
    """A task that has no number for every question."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"task {name!r} cannot be swept: {reason}; `vtc eval MODEL --tasks {name}` runs it as a whole")


def refuse(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what a task's config alone tells.

    Raises:
        Unfit: with the reason.
        ValueError: nothing is generated.
    """
    kind = config.get("output_type", "generate_until")
    if "class" in config:
        raise Unfit(name, "it is a class of its own")
    if kind != "generate_until":
        raise ValueError(f"task {name!r} cannot be swept: its output_type is {kind!r}, and only generate_until works")
    if (repeats := config.get("repeats") or 1) > 1:
        raise Unfit(name, f"every question is asked {repeats} times")
    metric = (config.get("metric_list") or [{"metric": "exact_match"}])[0]
    if metric.get("higher_is_better") is False:
        raise Unfit(name, f"its metric {metric['metric']!r} grows with the errors")
    for function in (config.get("process_results"), metric.get("aggregation")):
        if callable(function) and (found := client(function)):
            raise Unfit(name, f"its answers may be judged by a model, through {found}")


class Benchmark:
    """A task of lmms-eval with a number for every document.

    Args:
        name: of the task.
        task: lmms-eval's.
        mean: lmms-eval's own aggregation of that name.
        strip: takes reasoning out of an answer.
    """

    def __init__(
        self, name: str, task: Any, mean: Callable[[list[Any]], Any], strip: Callable[[str], str] = str
    ) -> None:
        self.name, self._task, self._mean, self._strip = name, task, mean, strip
        self._metrics: dict[str, Callable[[list[Any]], Any]] = dict(task.aggregation())
        self._metric = next(iter(self._metrics))
        self._generation = dict(task.config.generation_kwargs or {})
        self._scale = 1.0

    def as_task(self) -> Task:
        """For ``vtc sweep``."""
        return Task(
            self.name,
            questions=self.questions,
            score=self.score,
            wording=worded,
            apart=frozenset({APART}),
            max_new_tokens=int(self._generation.get("max_new_tokens", MAX_NEW_TOKENS)),
        )

    def questions(self, n: int) -> list[Question]:
        """The first ``n`` documents, in the task's order as with ``--limit``.

        Raises:
            ValueError: the task has fewer.
            Unfit: not every document has exactly one picture, or a number of its own.
        """
        task = self._task
        if n > (total := len(task.eval_docs)):
            raise ValueError(f"--questions {n}: task {self.name!r} has {total} documents; ask for {total} at most")
        docs = task.eval_docs_no_media  # scored without pictures, as lmms-eval does
        shots = task.config.num_fewshot or 0
        with _quiet(), _loading(self.name):
            for index in range(n):
                self._check_picture(index)
            return self._tried(
                [
                    Question(task, i, str(task.fewshot_context(docs[i], shots)), _first(task.doc_to_target(docs[i])))
                    for i in range(n)
                ]
            )

    def score(self, text: str, question: Question) -> float:
        """Of an answer, in [0, 1].

        Raises:
            ValueError: the task gives it none, or one out of range.
        """
        until = self._generation.get("until") or ()
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        with _quiet():
            results = self._results(text, question)
            metric = self._metric if question.type != APART else self._second(results)
            value = None if metric is None else self._number(results, metric)
        if value is None or not 0.0 <= value <= self._scale:
            raise ValueError(
                f"task {self.name!r}, document {question.index}: the answer {text!r} scores {value}, which is no "
                f"number in [0, {self._scale:g}]"
            )
        return value / self._scale

    def _check_picture(self, index: int) -> None:
        visuals = self._task.doc_to_visual(self._task.eval_docs[index]) or []
        kinds = [type(visual).__name__ for visual in visuals if not hasattr(visual, "convert")]
        if kinds:
            raise Unfit(self.name, f"document {index} brings a {kinds[0]}, not a picture")
        if len(visuals) != 1:
            raise Unfit(self.name, f"document {index} has {len(visuals) or 'no'} pictures, and one is asked about")

    def _results(self, text: str, question: Question) -> Mapping[str, Any]:
        """Values of the metrics, as the task's filters and ``process_results`` make them of one answer."""
        doc = self._task.eval_docs_no_media[question.index]
        try:
            answers: Any = [[text]]
            for each in self._task._filters[0].filters:
                answers = each.apply(answers, [doc])
            (answer,) = answers
            return self._task.process_results(doc, [self._strip(answer) if isinstance(answer, str) else answer])
        except Exception as error:  # the task's own code
            raise Unfit(
                self.name, f"its scoring fails for document {question.index}, answer {text!r}: {_said(error)}"
            ) from error

    def _number(self, results: Mapping[str, Any], metric: str) -> float | None:
        """What the aggregation makes of one document; ``None``: it is not among those that the metric is of."""
        if metric not in results:
            return None
        try:
            return self._aggregated([results[metric]], metric)
        except ZeroDivisionError:  # a mean over nothing
            return None

    def _aggregated(self, values: list[Any], metric: str) -> float:
        try:
            value = self._metrics[metric](values)
        except ZeroDivisionError:
            raise
        except Exception as error:  # the task's own code
            several = "one document" if len(values) == 1 else f"{len(values)} documents"
            raise Unfit(self.name, f"its metric {metric!r} cannot be had of {several}: {_said(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError):
            raise Unfit(self.name, f"its metric {metric!r} is no number but a {type(value).__name__}") from None

    def _second(self, results: Mapping[str, Any]) -> str | None:
        """The first other metric that has a number for a document; only plain means, as others may write files."""
        others = (name for name, function in self._metrics.items() if name != self._metric and function is self._mean)
        return next((name for name in others if name in results), None)

    def _tried(self, asked: Sequence[Question]) -> list[Question]:
        """The questions with their types, once the metric has been seen to be the mean of the documents' numbers."""
        choices = [index % 2 for index in range(len(asked))]
        random.Random(0).shuffle(choices)
        typed, numbers, values, mixed = [], [], [], []
        for question, choice in zip(asked, choices, strict=True):
            both = [self._results(text, question) for text in (question.answer, "")]
            own = [self._number(results, self._metric) for results in both]
            if None in own:
                if own != [None, None] or not all(map(self._second, both)):
                    raise Unfit(self.name, f"its metric {self._metric!r} has no number for document {question.index}")
                typed.append(replace(question, type=APART))
                continue
            typed.append(question)
            numbers += own
            values.append(both[choice][self._metric])
            mixed.append(own[choice])
        if not mixed:
            return typed  # nothing counts: said by who asks, with the number of questions
        found, mean = self._aggregated(values, self._metric), sum(mixed) / len(mixed)
        low, high = min(numbers), max(numbers)
        if not math.isclose(found, mean, rel_tol=1e-4, abs_tol=1e-4):  # aggregations round
            raise Unfit(
                self.name,
                f"its metric {self._metric!r} is no mean over documents (of trial answers to the first {len(asked)} it "
                f"makes {found:.4g}, and their mean is {mean:.4g}; one over groups is where --questions takes as many "
                "of each)",
            )
        self._scale = 100.0 if high == 100.0 else 1.0
        if not 0.0 <= low <= high <= self._scale:
            raise Unfit(self.name, f"its metric {self._metric!r} has numbers from {low:g} to {high:g}, not in [0, 1]")
        if low == high and self._metrics[self._metric] is not self._mean:
            raise Unfit(
                self.name,
                f"its metric {self._metric!r} makes no difference between targets and empty answers to the first "
                f"{len(asked)} documents, so that it cannot be seen whether it is a mean",
            )
        return typed


def worded(asked: Sequence[Question], processor: Any) -> list[Question]:
    """Questions with their prompts: through the processor's chat template, or the image token and the text.

    Raises:
        ValueError: a text names the image token more than once.
    """
    token = getattr(processor, "image_token", "<image>")
    return [replace(question, prompt=_prompt(question, processor, token)) for question in asked]


def _prompt(question: Question, processor: Any, token: str) -> str:
    named = question.text.count(token)
    if named > 1:
        raise ValueError(f"document {question.index} names the picture {named} times, as {token!r}, and there is one")
    if not getattr(processor, "chat_template", None):
        return question.text if named else f"{token}\n{question.text}"
    content = [*([] if named else [{"type": "image"}]), {"type": "text", "text": question.text}]
    message = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    tokenizer = processor.tokenizer
    begin = tokenizer.bos_token
    # a template may write the first token, and the tokenizer writes it again
    doubled = begin and prompt.startswith(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return prompt.removeprefix(begin) if doubled else prompt


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Unfit:
        raise
    except Exception as error:  # whatever the imports, the data and the functions of a task raise
        raise ValueError(f"task {name!r} of lmms-eval cannot be loaded: {_said(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lmms-eval logs and its tasks print: a progress bar is being drawn."""
    log = importlib.import_module("loguru").logger if importlib.util.find_spec("loguru") else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if log is not None:
            log.disable("")
            stack.callback(log.enable, "")
        yield


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known: {', '.join(known)}" if len(known) < 10 else "`python -m lmms_eval --tasks list` shows all of them"


def _first(target: Any) -> str:
    return str(target[0] if isinstance(target, (list, tuple)) and target else target)


def _said(error: BaseException) -> str:
    """The error that was retried, in one line."""
    cause = error.__cause__ if type(error).__name__ == "RetryError" and error.__cause__ else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]
