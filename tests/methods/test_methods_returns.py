"""What a user's method returns is looked at before it is used: one error, with the method, the row and the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from asking import inside as inside_of
from asking import keep_mask as entering
from nosync import NoSync
from zoo import get_model, make_batch

import vtc
from vtc.methods import Method, Reduction, Stage, returns
from vtc.methods.stages import steps_of
from vtc.places import Entry, Layer
from vtc.signals import DecoderSignal, Rows, Transitions
from vtc.tokens import Layout, VisualTokens

LENGTHS = (16, 9)
"""Two images of a batch; keep=4 asks for 4 of each."""


def tokens_of(lengths: tuple[int, ...] = LENGTHS) -> VisualTokens:
    layouts = tuple(map(Layout.plain, lengths))
    return VisualTokens(torch.randn(len(lengths), max(lengths), 8), layouts, tuple(range(len(lengths))))


def method(**members: Any) -> Method:
    """A method of the user's, called Own; it is not registered."""
    if (pick := members.pop("pick", None)) is not None:
        members["reduce"] = lambda self, stage, tokens, budget: Reduction(pick(tokens, budget))
    plain = {"reduce": lambda self, stage, tokens, budget: Reduction(first(budget))}
    body = {"name": "own", "__module__": __name__} | plain | members
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Own", (Method,), body))(keep=4)


def first(budget: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(max(budget)).repeat(len(budget), 1)


def spoilt(row: int, at: int, value: int) -> Callable[..., torch.Tensor]:
    def pick(tokens: VisualTokens, budget: tuple[int, ...]) -> torch.Tensor:
        picks = first(budget)
        picks[min(row, len(picks) - 1), at] = value
        return picks

    return pick


PICKS = {
    "twice": (spoilt(1, 2, 1), ["row 1 keeps 1 twice", "tokens 0 to 8", "4 different ones"]),
    "negative": (spoilt(0, 0, -1), ["row 0 keeps -1", "tokens 0 to 15"]),
    "negative, from the end": (spoilt(1, 3, -5), ["row 1 keeps -5"]),
    "padding": (spoilt(1, 3, 9), ["row 1 keeps 9", "tokens 0 to 8"]),
    "out of range": (spoilt(0, 1, 99), ["row 0 keeps 99"]),
    "None": (lambda *_: None, ["None", "LongTensor (2, 4)"]),
    "a list": (lambda *_: [[0, 1, 2, 3]] * 2, ["a list", "LongTensor (2, 4)"]),
    "a mask": (lambda tokens, budget: tokens.mask, ["torch.bool", "Reduction.of_mask"]),
    "floats": (lambda tokens, budget: first(budget).float(), ["torch.float32", "LongTensor (2, 4)"]),
    "int32": (lambda tokens, budget: first(budget).int(), ["torch.int32", "LongTensor (2, 4)"]),
    "a row": (lambda tokens, budget: first(budget)[0], ["(4,)", "(2, 4)"]),
    "too few": (lambda tokens, budget: first(budget)[:, :3], ["(2, 3)", "(2, 4)"]),
    "another device": (lambda tokens, budget: first(budget).to("meta"), ["on meta", "on cpu"]),
}


@pytest.mark.parametrize(("pick", "words"), PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "as the selector of Allocate"])
def test_bad_picks(pick: Any, words: list[str], within: bool) -> None:
    own = method(pick=pick)
    used = vtc.Allocate(keep=4, by="image", selector=own) if within else own
    with pytest.raises(ValueError, match=r"Own\.reduce") as caught:
        entering(used, tokens_of())
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_what_is_not_read_may_be_anything() -> None:
    """Behind the first budget[g] entries of row g."""

    def pick(tokens: VisualTokens, budget: tuple[int, ...]) -> torch.Tensor:
        picks = torch.full((len(budget), max(budget) + 3), -7)
        for row, k in zip(picks, budget, strict=True):
            row[:k] = torch.arange(k).flip(0)
        return picks

    own = dataclasses.replace(method(pick=pick), keep=0.5)
    mask, counts = entering(own, tokens_of())
    assert counts == (8, 4)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[*range(8)], [*range(4)]]


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ((4, 0), ["row 1 has 0, not 1 to 9"]),
        ((4,), ["of 1, not a tuple of 2"]),
        (torch.tensor([4, 4]), ["a Tensor", "a tuple of 2"]),
        ((4.0, 4), ["row 0", "a float", "on the host"]),
        ((torch.tensor(4), 4), ["row 0", "a Tensor", "on the host"]),
    ],
)
def test_bad_counts_beforehand(budget: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Own\.counts") as caught:
        entering(method(counts=lambda self, layouts, stage=None, given=None: budget), tokens_of())
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def half(alive: torch.Tensor) -> torch.Tensor:
    return alive & (torch.arange(alive.shape[1]) % 2 == 0)


REDUCTIONS = {
    "more than there are": (lambda t: Reduction.of_mask(half(t.mask), (8, 12)), ["row 1 counts 12 of the 5"]),
    "negative counts": (lambda t: Reduction.of_mask(half(t.mask), (-1, 5)), ["row 0 counts -1"]),
    "what is gone": (lambda t: Reduction(first((8, 5)), counts=(8, 5)), ["row 0 keeps 1", "8 tokens left"]),
    "a tensor of counts": (
        lambda t: Reduction(first((8, 5)), counts=half(t.mask).sum(1)),
        ["a Tensor", "a tuple of 2"],
    ),
    "no counts": (lambda t: Reduction(first((8, 5))), ["no budget", "Reduction(index, counts=...)"]),
    "one row": (lambda t: Reduction(first((8,)), counts=(8, 5)), ["shape (1, 8)", "(2, 8)"]),
    "an index alone": (lambda t: first((8, 5)), ["a Tensor", "Reduction(index)"]),
    "None": (lambda t: None, ["None", "not a Reduction"]),
    "features of another width": (
        lambda t: dataclasses.replace(Reduction.of_mask(half(t.mask), (4, 3)), features=torch.zeros(2, 4, 7)),
        ["features as torch.float32 of shape (2, 4, 7)", "(2, 4, 8)"],
    ),
    "features of another place": (
        lambda t: dataclasses.replace(Reduction.of_mask(half(t.mask), (4, 3)), features=torch.zeros(2, 3, 8)),
        ["features as", "(2, 3, 8)"],
    ),
    "integer sizes": (
        lambda t: dataclasses.replace(Reduction.of_mask(half(t.mask), (4, 3)), size=torch.ones(2, 4, dtype=torch.long)),
        ["size as torch.int64"],
    ),
}


@pytest.mark.parametrize(("result", "words"), REDUCTIONS.values(), ids=REDUCTIONS)
def test_bad_reductions(result: Any, words: list[str]) -> None:
    """At a stage inside the language model, where half of the tokens have left and the content decides."""
    given = tokens_of()
    alive = half(given.mask)
    tokens = dataclasses.replace(given, alive=alive, alive_counts=tuple(alive.sum(1).tolist()), entered=LENGTHS)
    members = {
        "merges": True,
        "stages": lambda self, model: (Stage(Layer(1)),),
        "counts": lambda self, layouts, stage=None, given=None: None,
        "reduce": lambda self, stage, tokens, budget: result(tokens),
    }
    own = method(**members)
    chain = vtc.Chain(vtc.DivPrune(keep=0.5), type(own)(keep=1.0)).settle(facts(4))
    for used in (own, chain):
        with pytest.raises(ValueError, match=r"Own\.reduce") as caught:
            inside_of(used, 0, tokens)
        assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_features_of_a_method_that_does_not_say_so_are_refused() -> None:
    found = Reduction(first((4, 4)), features=torch.zeros(2, 4, 8))
    own = method(reduce=lambda self, stage, tokens, budget: found)
    with pytest.raises(ValueError, match=r"Own\.reduce returned features.*`merges = True` in Own"):
        entering(own, tokens_of())


def test_counts_that_are_not_the_budget_are_refused() -> None:
    own = method(reduce=lambda self, stage, tokens, budget: Reduction(first((5, 5)), counts=(5, 5)))
    with pytest.raises(ValueError, match=r"Own\.reduce returned counts \(5, 5\) where the budget is \(4, 4\)"):
        entering(own, tokens_of())


def facts(depth: int) -> Any:
    return vtc.methods.base.ModelFacts(model_type="toy", width=8, depth=depth)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((Stage(Layer(0)),), ["stage 0 comes after layer 0", "[1, 3]"]),
        ((Stage(Layer(4)),), ["after layer 4", "4 layers"]),
        ((Stage(Layer(2)), Stage(Layer(1))), ["stage 1 is at Layer(after=1)", "rise"]),
        ((Stage(Layer(2)), Stage(Layer(2))), ["stage 1 is at Layer(after=2)", "rise"]),
        ((Stage(Layer(1)), Stage(Entry())), ["stage 1 is at Entry()", "rise"]),
        ((Stage(Layer(2), needs=(Rows(3),)),), ["reads layer 3", "0 to 2"]),
        ((Stage(Layer(2), needs=(Transitions(0, until=3),)),), ["modules of layer 2", "0 to 1"]),
        ((Stage(Entry(), needs=(Rows(0),)),), ["at Entry()", "has not run"]),
        (None, ["None", "a tuple of stages"]),
        ((Layer(1),), ["a tuple of stages"]),
    ],
)
def test_bad_stages(stages: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Own\.stages") as caught:
        steps_of(method(stages=lambda self, model: stages), facts(4))
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


# ----------------------------------------------------------------------------------------------------- in a real model


@pytest.mark.parametrize("value", [1, -1, 99])
def test_a_prompt_is_refused_instead_of_misread(value: int) -> None:
    model, batch = get_model("llava"), make_batch("llava")
    own = vtc.methods.register_method(type(method(pick=spoilt(2, 2, value))))
    try:
        with vtc.patch(model, own(keep=4)), torch.inference_mode():
            with pytest.raises(ValueError, match=rf"Own\.reduce: row 2 keeps {value}"):
                model(**batch)
            with pytest.raises(ValueError, match=r"Own\.reduce: row 2"):
                model.generate(**batch, max_new_tokens=2)
    finally:
        vtc.methods.registry._REGISTRY.pop("own")


@dataclasses.dataclass(frozen=True)
class Turned(DecoderSignal):
    """A user's own signal whose scores lie on their side."""

    kind = "turned"
    needs_rows = False

    def watched(self) -> Any:
        return iter((self.layer,))

    def score(self, before: Any, after: Any, real: torch.Tensor, visual: Any) -> torch.Tensor:
        return real.float().T


def test_scores_of_another_shape_are_refused() -> None:
    real = torch.ones(2, 5, dtype=torch.bool)
    for wrong in (torch.zeros(5, 2), torch.zeros(2, 5, dtype=torch.long), None):
        with pytest.raises(ValueError, match=r"Turned\.score returned .*shape \(2, 5\)"):
            returns.check_scores(Turned(0), wrong, real)
    model, batch = get_model("llava"), make_batch("llava")
    own = vtc.methods.register_method(type(method(stages=lambda self, model: (Stage(Layer(1), needs=(Turned(0),)),))))
    try:
        with vtc.patch(model, own(keep=4)), torch.inference_mode(), pytest.raises(ValueError, match=r"Turned\.score"):
            model(**batch)
    finally:
        vtc.methods.registry._REGISTRY.pop("own")


# ------------------------------------------------------------------------------------------------------------ its cost


def test_nothing_waits_for_the_device() -> None:
    """On a CPU without any operation that would wait on a GPU; on a GPU only what is not vtc's own is looked at."""
    asserted: list[str] = []
    tokens = tokens_of()

    def fake(right: torch.Tensor, who: str, rule: str, wrong: Any) -> None:
        asserted.append(who)

    with pytest.MonkeyPatch.context() as patched, NoSync():
        patched.setattr(returns, "_require", fake)
        entering(method(), tokens)
        assert asserted == ["Own.reduce"]
        entering(vtc.DivPrune(keep=4), tokens)
        assert asserted == ["Own.reduce", "DivPrune.reduce"]  # on a CPU
    assert not returns._looks(vtc.DivPrune(), torch.device("cuda"))
    assert not returns._looks(vtc.DivPrune(), torch.device("meta"))
    assert returns._looks(method(), torch.device("cuda"))


def test_in_a_graph_the_assertion_is_part_of_it() -> None:
    good, bad = method(), method(pick=lambda tokens, budget: tokens.features[:, : max(budget), 0].long())
    tokens = tokens_of()
    (step,) = steps_of(bad, facts(4))

    def run(features: torch.Tensor) -> torch.Tensor:
        return step.reduce(dataclasses.replace(tokens, features=features)).mask

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    right = torch.zeros_like(tokens.features)
    right[..., 0] = torch.arange(16)
    assert torch.equal(compiled(right), entering(good, tokens)[0])
    with pytest.raises(RuntimeError, match=r"Own\.reduce: indices must be different"):
        compiled(torch.zeros_like(right))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_does_not_wait_and_still_lets_right_picks_through() -> None:
    tokens = tokens_of((16, 16))
    tokens = dataclasses.replace(tokens, features=tokens.features.cuda())
    own = method(pick=lambda tokens, budget: torch.arange(4, device="cuda").repeat(2, 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask, _ = entering(own, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mask.sum(1).tolist() == [4, 4]
