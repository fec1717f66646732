"""What a user's method returns is looked at before it is used: one error, with the method, the row and the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import NoSync
from zoo import get_model, make_batch

import vtc
from vtc.methods import returns
from vtc.methods.base import Method, Stage, entering, surviving
from vtc.tokens import InsideTokens, Layout, VisualTokens

LENGTHS = (16, 9)
"""Two images of a batch; keep=4 asks for 4 of each."""


def tokens_of(lengths: tuple[int, ...] = LENGTHS) -> VisualTokens:
    layouts = tuple(map(Layout.plain, lengths))
    return VisualTokens(torch.randn(len(lengths), max(lengths), 8), layouts, tuple(range(len(lengths))))


def method(**members: Any) -> Method:
    """A method of the user's, called Own; it is not registered."""
    body = {"name": "own", "select": lambda self, tokens, budget: first(budget), "__module__": __name__} | members
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Own", (Method,), body))(keep=4)


def first(budget: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(max(budget)).repeat(len(budget), 1)


def spoilt(row: int, at: int, value: int) -> Callable[..., torch.Tensor]:
    def select(self: Any, tokens: VisualTokens, budget: tuple[int, ...]) -> torch.Tensor:
        picks = first(budget)
        picks[min(row, len(picks) - 1), at] = value
        return picks

    return select


PICKS = {
    "twice": (spoilt(1, 2, 1), ["row 1 picks 1 twice", "tokens 0 to 8", "4 different ones"]),
    "negative": (spoilt(0, 0, -1), ["row 0 picks -1", "tokens 0 to 15"]),
    "negative, from the end": (spoilt(1, 3, -5), ["row 1 picks -5"]),
    "padding": (spoilt(1, 3, 9), ["row 1 picks 9", "tokens 0 to 8"]),
    "out of range": (spoilt(0, 1, 99), ["row 0 picks 99"]),
    "None": (lambda *_: None, ["None", "LongTensor (2, 4)"]),
    "a list": (lambda *_: [[0, 1, 2, 3]] * 2, ["a list", "LongTensor (2, 4)"]),
    "a mask": (lambda self, tokens, budget: tokens.mask, ["torch.bool", "mask.nonzero()"]),
    "floats": (lambda self, tokens, budget: first(budget).float(), ["torch.float32", "LongTensor (2, 4)"]),
    "int32": (lambda self, tokens, budget: first(budget).int(), ["torch.int32", "LongTensor (2, 4)"]),
    "a row": (lambda self, tokens, budget: first(budget)[0], ["(4,)", "(2, 4)"]),
    "too few": (lambda self, tokens, budget: first(budget)[:, :3], ["(2, 3)", "(2, 4)"]),
    "another device": (lambda self, tokens, budget: first(budget).to("meta"), ["on meta", "on cpu"]),
}


@pytest.mark.parametrize(("select", "words"), PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "as the selector of Allocate"])
def test_bad_picks(select: Any, words: list[str], within: bool) -> None:
    own = method(select=select)
    used = vtc.Allocate(keep=4, by="image", selector=own) if within else own
    with pytest.raises(ValueError, match=r"Own\.select") as caught:
        entering(used, tokens_of())
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_what_is_not_read_may_be_anything() -> None:
    """Behind the first budget[g] entries of row g."""

    def select(self: Any, tokens: VisualTokens, budget: tuple[int, ...]) -> torch.Tensor:
        picks = torch.full((len(budget), max(budget) + 3), -7)
        for row, k in zip(picks, budget, strict=True):
            row[:k] = torch.arange(k).flip(0)
        return picks

    own = dataclasses.replace(method(select=select), keep=0.5)
    mask, counts = entering(own, tokens_of())
    assert counts == (8, 4)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[*range(8)], [*range(4)]]


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ((17, 4), ["row 0 has 17, not 1 to 16"]),
        ((4, 0), ["row 1 has 0, not 1 to 9"]),
        ((4,), ["of 1, not a tuple of 2"]),
        (None, ["None", "a tuple of 2"]),
        (torch.tensor([4, 4]), ["a Tensor", "a tuple of 2"]),
        ((4.0, 4), ["row 0", "a float", "on the host"]),
        ((torch.tensor(4), 4), ["row 0", "a Tensor", "on the host"]),
    ],
)
def test_bad_budgets(budget: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Own\.budget") as caught:
        entering(method(budget=lambda self, tokens: budget), tokens_of())
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def half(alive: torch.Tensor) -> torch.Tensor:
    return alive & (torch.arange(alive.shape[1]) % 2 == 0)


KEPT = {
    "other counts": (lambda alive: (half(alive), (8, 4)), ["row 1 keeps 5, counts 4"]),
    "more than there are": (lambda alive: (half(alive), (8, 12)), ["row 1 counts 12 of the 9"]),
    "negative counts": (lambda alive: (half(alive), (-1, 5)), ["row 0 counts -1"]),
    "what is gone": (lambda alive: (torch.ones_like(alive), (16, 9)), ["row 1 keeps 7 tokens that are not there"]),
    "a tensor of counts": (lambda alive: (half(alive), half(alive).sum(1)), ["a Tensor", "a tuple of 2 integers"]),
    "indices": (lambda alive: (torch.arange(4).repeat(2, 1), (4, 4)), ["torch.int64 of shape (2, 4)", "(2, 16)"]),
    "one row": (lambda alive: (half(alive)[:1], (8, 5)), ["shape (1, 16)", "(2, 16)"]),
    "the mask alone": (half, ["a Tensor", "(bool (2, 16), counts)"]),
    "None": (lambda alive: None, ["None", "(bool (2, 16), counts)"]),
}


@pytest.mark.parametrize(("result", "words"), KEPT.values(), ids=KEPT)
def test_bad_masks(result: Any, words: list[str]) -> None:
    given = tokens_of()
    inside = InsideTokens(given.features, given.layouts, (0, 1), given.mask, LENGTHS, LENGTHS)
    members = {"stages": lambda self, depth: (Stage(1),), "keep_inside": lambda self, index, t: result(t.alive)}
    own = method(**members)
    second = type(own)(keep=1.0)
    with torch.device("cpu"):
        chain = vtc.Chain(vtc.DivPrune(keep=0.5), second).settle(facts(4))
    for used in (own, chain):
        with pytest.raises(ValueError, match=r"Own\.keep_inside") as caught:
            surviving(used, 0, inside)
        assert [word for word in words if word not in str(caught.value)] == [], caught.value
    if "the mask alone" in words or result is half:
        return
    for name in ("choose", "keep_mask"):
        with pytest.raises(ValueError, match=rf"Own\.{name}"):
            entering(method(**{name: lambda self, tokens: result(tokens.mask)}), given)


def facts(depth: int) -> Any:
    return vtc.methods.base.ModelFacts(model_type="toy", width=8, depth=depth)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((Stage(0),), ["stage 0 comes after layer 0", "[1, 3]"]),
        ((Stage(4),), ["after layer 4", "4 layers"]),
        ((Stage(2), Stage(1)), ["stage 1 comes after layer 1", "rise"]),
        ((Stage(2), Stage(2)), ["stage 1 comes after layer 2", "rise"]),
        ((Stage(2, attention=3),), ["attention of layer 3", "0 to 2"]),
        ((Stage(2, transitions=(0, 2)),), ["transitions of layer 2", "0 to 1"]),
        (None, ["None", "a tuple of stages"]),
    ],
)
def test_bad_stages(stages: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"Own\.stages") as caught:
        method(stages=lambda self, depth: stages).check(facts(4))
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


# ----------------------------------------------------------------------------------------------------- in a real model


@pytest.mark.parametrize("value", [1, -1, 99])
def test_a_prompt_is_refused_instead_of_misread(value: int) -> None:
    model, batch = get_model("llava"), make_batch("llava")
    own = vtc.methods.register_method(type(method(select=spoilt(2, 2, value))))
    try:
        with vtc.patch(model, own(keep=4)), torch.inference_mode():
            with pytest.raises(ValueError, match=rf"Own\.select: row 2 picks {value}"):
                model(**batch)
            with pytest.raises(ValueError, match=r"Own\.select: row 2"):
                model.generate(**batch, max_new_tokens=2)
    finally:
        vtc.methods.base._REGISTRY.pop("own")


def test_transitions_of_another_shape_are_refused() -> None:
    real = torch.ones(2, 5, dtype=torch.bool)
    for wrong in (torch.zeros(5, 2), torch.zeros(2, 5, dtype=torch.long), None):
        with pytest.raises(ValueError, match=r"Own\.transition returned .*shape \(2, 5\)"):
            returns.check_scores(method(), wrong, real)
    model, batch = get_model("llava"), make_batch("llava")
    members = {
        "stages": lambda self, depth: (Stage(1, frozenset({"transition"}), transitions=(0,)),),
        "transition": lambda self, before, after, real, visual: real.float().T,
        "keep_inside": lambda self, index, tokens: (tokens.alive, tokens.counts),
    }
    own = vtc.methods.register_method(type(method(**members)))
    try:
        with vtc.patch(model, own(keep=4)), torch.inference_mode(), pytest.raises(ValueError, match=r"Own\.transition"):
            model(**batch)
    finally:
        vtc.methods.base._REGISTRY.pop("own")


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
        assert asserted == ["Own.select"]
        entering(vtc.DivPrune(keep=4), tokens)
        assert asserted == ["Own.select", "DivPrune.select"]  # on a CPU
    assert not returns._looks(vtc.DivPrune(), torch.device("cuda"))
    assert not returns._looks(vtc.DivPrune(), torch.device("meta"))
    assert returns._looks(method(), torch.device("cuda"))


def test_in_a_graph_the_assertion_is_part_of_it() -> None:
    good, bad = method(), method(select=lambda self, tokens, budget: tokens.features[:, : max(budget), 0].long())
    tokens = tokens_of()

    def run(features: torch.Tensor) -> torch.Tensor:
        return entering(bad, dataclasses.replace(tokens, features=features))[0]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    right = torch.zeros_like(tokens.features)
    right[..., 0] = torch.arange(16)
    assert torch.equal(compiled(right), entering(good, tokens)[0])
    with pytest.raises(RuntimeError, match=r"Own\.select: indices must be different"):
        compiled(torch.zeros_like(right))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_does_not_wait_and_still_lets_right_picks_through() -> None:
    tokens = tokens_of((16, 16))
    tokens = dataclasses.replace(tokens, features=tokens.features.cuda())
    own = method(select=lambda self, tokens, budget: torch.arange(4, device="cuda").repeat(2, 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask, _ = entering(own, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mask.sum(1).tolist() == [4, 4]
