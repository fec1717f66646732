"""Tasks: questions whose answers are known, by name. The shipped models bring one each; others can be registered."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc.names import SHIPPED
from vtc.values import shown


@dataclass(frozen=True)
class Task:
    """Where questions come from, and when an answer is right.

    Attributes:
        name: as in ``--task``.
        questions: called with a number, gives that many questions, always the same ones, or raises ValueError where
            there are fewer. A question has ``image`` (a picture), ``prompt`` (text with the image token in it) and
            ``type``; ``answer`` if it is to tell two questions apart.
        score: called with the text answered and the question, gives a score in [0, 1]; ``None``: the task has no
            accuracy.
        model: what ``vtc sweep`` and ``vtc tune`` run when no model is named: one of :data:`vtc.names.SHIPPED`.
        apart: types of questions left out of the accuracy and shown beside it.
        max_new_tokens: an answer is cut there.
        wording: called with questions and a model's processor, gives the same questions with a ``prompt`` for this
            model; ``None``: the prompts are for every model.
    """

    name: str
    questions: Callable[[int], Sequence[Any]]
    score: Callable[[str, Any], float] | None
    model: str | None = None
    apart: frozenset[str] = frozenset()
    max_new_tokens: int = 3
    wording: Callable[[Sequence[Any], Any], Sequence[Any]] | None = None

    def scores(self, texts: Sequence[str], asked: Sequence[Any]) -> list[float]:
        """A score for each answer.

        Raises:
            ValueError: the task has no accuracy.
        """
        if self.score is None:
            raise ValueError(f"task {self.name!r} has no accuracy: it cannot say what pruning loses")
        return [float(self.score(text, question)) for text, question in zip(texts, asked, strict=True)]


_TASKS: dict[str, Callable[[], Task]] = {}


def register_task(name: str, make: Callable[[], Task]) -> None:
    """Make a task known; ``make`` is called when it is asked for.

    Raises:
        ValueError: the name is taken.
    """
    if name in _TASKS:
        raise ValueError(f"a task named {shown(name)} exists already")
    _TASKS[name] = make


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    return sorted(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name; one with an accuracy.

    Raises:
        ValueError: unknown, or without an accuracy.
    """
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(list_tasks())}"
        raise ValueError(f"unknown task {shown(name)}; {hint}")
    task = _TASKS[name]()
    if task.score is None:
        raise ValueError(
            f"task {shown(name)} has no accuracy, so that nothing can be said about what pruning loses; "
            "`vtc profile` measures time alone"
        )
    return task


def batches_of(
    asked: Sequence[Any], processor: Any, size: int, device: Any, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """What the processor makes of questions, in batches padded on the left."""
    batches = []
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        inputs = processor(
            images=[q.image for q in part], text=[q.prompt for q in part], return_tensors="pt", padding=True
        )
        batches.append(placed(inputs, device, dtype))
    return batches


def placed(inputs: Mapping[str, Any], device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Tensors on a device, floats in a dtype."""
    return {n: x.to(device, dtype if x.is_floating_point() else None) for n, x in inputs.items()}


@torch.inference_mode()
def answers(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to one batch."""
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _shipped(name: str) -> Callable[[], Task]:
    def make() -> Task:
        home = importlib.import_module(SHIPPED[name].module)
        return Task(
            name,
            questions=home.evaluation_questions,
            score=lambda text, question: float(home.is_correct(text, question.answer)),
            model=name,
            # how many tokens of an object remain changes the count, though no object was lost
            apart=frozenset(getattr(home, "LEFT_OUT", {"count"})),
            max_new_tokens=getattr(home, "MAX_NEW_TOKENS", 3),
        )

    return make


for _name, _model in SHIPPED.items():
    if _model.task == _name:
        register_task(_name, _shipped(_name))
