"""Ways to answer the same questions: a method, a baseline with coarser pictures, or neither; and what was answered.

A method is a registered name, which gets `keep` and is otherwise at its defaults, or a name in `CONFIGURATIONS`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import vtc
from vtc.budget import Keep
from vtc.methods import make_method, method_class
from vtc.methods.video import VideoMethod
from vtc.profiling.downsample import NAMES as COARSE
from vtc.profiling.downsample import coarse
from vtc_tinyvlm.evaluate import generate, prepare

UNPRUNED, ORIGINAL = "none", "original"

# What a registered name and a keep cannot say; keep -> method. A chain's two parts drop the same share, so that `keep`
# is what is left at the end.
CONFIGURATIONS: dict[str, Callable[[float], vtc.Method]] = {
    "divprune-centred": lambda keep: vtc.DivPrune(keep=keep, centered=True),
    "idpruner-centred": lambda keep: vtc.IDPruner(keep=keep, centered=True),
    "merge/divprune": lambda keep: vtc.Merge(vtc.DivPrune(keep=keep)),
    "merge/fastervlm": lambda keep: vtc.Merge(vtc.FasterVLM(keep=keep)),
    "adaptive-0.1/divprune": lambda keep: vtc.Adaptive(vtc.DivPrune(keep=keep), radius=0.1),
    "adaptive-0.2/divprune": lambda keep: vtc.Adaptive(vtc.DivPrune(keep=keep), radius=0.2),
    "intower-diverse": lambda keep: vtc.InTower(rule="diverse", keep=keep),
    "intower-late": lambda keep: vtc.InTower(keep=keep, after=2 / 3),
    "intower/divprune": lambda keep: vtc.InTower(keep=keep**0.5, then=vtc.DivPrune(keep=keep)),
    "prumerge-adaptive": lambda keep: vtc.PruMerge(adaptive=True),
    "vscan-full": lambda keep: vtc.VScan(keep=keep, stage2=True),
    "divprune-newlines": lambda keep: vtc.DivPrune(keep=keep, newlines="keep"),
    "idpruner-newlines": lambda keep: vtc.IDPruner(keep=keep, newlines="keep"),
    "todre-full": lambda keep: vtc.ToDRE(keep=keep, stage2=True),
    "globalcom2-probabilities": lambda keep: vtc.GlobalCom2(keep=keep, scores="probabilities"),
    "globalcom2/divprune": lambda keep: vtc.GlobalCom2(keep=keep, selector=vtc.DivPrune()),
    "allocate/divprune": lambda keep: vtc.Allocate(keep=keep, selector=vtc.DivPrune()),
    "divprune+transprune": lambda keep: vtc.Chain(vtc.DivPrune(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
    "idpruner+transprune": lambda keep: vtc.Chain(vtc.IDPruner(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
    "globalcom2+transprune": lambda keep: vtc.Chain(vtc.GlobalCom2(keep=keep**0.5), vtc.TransPrune(keep=keep**0.5)),
}
FIRST = ("random", "grid", *COARSE, "divprune")
"""What every method has to beat, and the plainest that does."""
MADE_OF_OTHERS = ("allocate", "chain", "merge", "adaptive")
"""At their defaults they say nothing of their own."""


def method_of(name: str, keep: Keep, seed: int = 0) -> vtc.Method:
    """A registered name or one of the combinations."""
    if name in CONFIGURATIONS:
        return CONFIGURATIONS[name](keep)
    return make_method(name, keep=keep, **({"seed": seed} if name == "random" else {}))


@dataclass(frozen=True)
class Way:
    """How questions are answered.

    Attributes:
        method: a name for :func:`method_of`, one of the coarse baselines, or ``none``.
        keep: as for :func:`vtc.patch`; 1.0 for ``none``.
        positions: likewise.
        seed: of ``random``.
    """

    method: str
    keep: Keep
    positions: str = ORIGINAL
    seed: int = 0

    @property
    def column(self) -> str:
        """Its name in a file of answers."""
        words = [self.method, str(self.keep), *([] if self.positions == ORIGINAL else [self.positions])]
        return " ".join([*words, *([f"seed={self.seed}"] if self.method == "random" else [])])

    def running(self, model: Any, processor: Any) -> AbstractContextManager[Any]:
        """The context that the model has to run in; gives the handle of the patch, if it is one.

        Raises:
            ValueError: the model cannot do it.
        """
        if self.method == UNPRUNED:
            return nullcontext()
        if self.method in COARSE:
            if self.positions != ORIGINAL:
                raise ValueError(f"{self.method}: a smaller picture has no gaps between its positions")
            return coarse(self.method, model, processor, self.keep).running()
        return vtc.patch(model, method_of(self.method, self.keep, self.seed), positions=self.positions)  # type: ignore[arg-type]


@dataclass
class Paper:
    """The questions, with what the processor makes of them in batches.

    Attributes:
        asked: the questions.
        processor: of the model.
        size: of the batches.
    """

    asked: Sequence[Any]
    processor: Any
    size: int = 64

    def __post_init__(self) -> None:
        self.whole = prepare(self.asked, self.processor, self.size)

    def batches(self, model: Any, way: Way) -> Iterator[dict[str, Any]]:
        """Inputs for :meth:`Way.running`."""
        if way.method not in COARSE:
            yield from self.whole
            return
        baseline = coarse(way.method, model, self.processor, way.keep)
        for start in range(0, len(self.asked), self.size):
            yield baseline.inputs(self.asked[start : start + self.size])


def answer_all(model: Any, paper: Paper, way: Way, max_new_tokens: int = 3) -> tuple[list[str], tuple[float, float]]:
    """Generated texts of all questions, and visual tokens per image: in the last layer, and averaged over layers."""
    texts: list[str] = []
    last = average = 0.0
    with way.running(model, paper.processor) as handle:
        for batch in paper.batches(model, way):
            texts += generate(model, paper.processor, batch, max_new_tokens)
            if isinstance(handle, vtc.Patch):
                layers = handle.report().tokens_per_layer
            else:
                layers = (int((batch["input_ids"] == model.config.image_token_id).sum()) / len(batch["input_ids"]),)
            last += layers[-1] * len(batch["input_ids"])
            average += sum(layers) / len(layers) * len(batch["input_ids"])
    return texts, (last / len(texts), average / len(texts))


def able(model: Any, processor: Any, keep: float, positions: str) -> list[str]:
    """The methods that this model can run; why not of the others goes to stderr."""
    rest = [n for n in vtc.list_methods() if not issubclass(method_class(n), VideoMethod)]
    rest = [n for n in rest if n not in (*FIRST, *MADE_OF_OTHERS)]
    found = []
    for name in (*FIRST, *rest, *CONFIGURATIONS):
        try:
            with Way(name, keep, positions).running(model, processor):
                found.append(name)
        except ValueError as reason:
            typer.echo(f"{name}: {reason}", err=True)
    return found


class AnswerSheet:
    """A CSV with a line for each question and a column for each way: the words that were answered.

    Whatever is compared question by question is computed from it.

    Args:
        path: of the file; read if it is there.
        asked: the questions.

    Raises:
        ValueError: the file is about other questions.
    """

    ABOUT = ("question", "type", "answer")

    def __init__(self, path: Path, asked: Sequence[Any]) -> None:
        self.path = path
        about = [[str(number), q.type, q.answer] for number, q in enumerate(asked)]
        self.columns = dict(zip(self.ABOUT, map(list, zip(*about, strict=True)), strict=True))
        if path.exists():
            found = read_answers(path)
            if any(found.get(name) != self.columns[name] for name in self.ABOUT):
                raise ValueError(f"{path} has the answers to other questions; remove it, or name another file")
            self.columns = found

    def add(self, way: Way, texts: Sequence[str]) -> None:
        """Write a column."""
        self.columns[way.column] = [" ".join(text.split()) for text in texts]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as handle:
            table = csv.writer(handle, lineterminator="\n")
            table.writerow(self.columns)
            table.writerows(zip(*self.columns.values(), strict=True))


def read_answers(path: Path) -> dict[str, list[str]]:
    """The columns of a sheet."""
    with path.open(newline="", encoding="utf-8") as handle:
        head, *lines = csv.reader(handle)
    return dict(zip(head, map(list, zip(*lines, strict=True)), strict=True))
