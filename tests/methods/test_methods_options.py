"""Options: what is given is checked by the field's own rule, and every method's options have one."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from every import SAMPLES

import vtc
from vtc.methods.options import check_of, option
from vtc.values import number, one_of, share


@dataclass(frozen=True, kw_only=True)
class Optional(vtc.Method):
    """Has one option of each kind."""

    alpha: float = option(0.5, share, "it must lie in [0, 1]")
    beta: float | None = option(0.5, share, "it must lie in [0, 1]")
    kind: str = option("code", one_of, "code", "paper")
    count: int = option(4, one_of, 2, 4)
    newlines: vtc.methods.base.Newlines = "keep"  # another default, the same check
    never: str = option("keep", one_of, "keep", rule="nothing else is there")

    name: ClassVar[str] = "optional"

    def reduce(self, stage: Any, tokens: Any, budget: Any) -> Any:
        """Is not asked."""
        raise NotImplementedError


def test_values_become_what_the_check_returns() -> None:
    made = Optional(alpha=1, count=4.0)  # type: ignore[arg-type]
    assert (type(made.alpha), type(made.count)) == (float, int)
    assert Optional(beta=None).beta is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"alpha": 1.5}, ValueError, "alpha=1.5: it must lie in [0, 1]"),
        ({"alpha": None}, TypeError, "alpha=None is not a number"),
        ({"beta": "half"}, TypeError, "beta='half' is not a number"),
        ({"kind": "cod"}, ValueError, "kind='cod' is none of 'code', 'paper'"),
        ({"kind": None}, ValueError, "kind=None is none of"),
        ({"count": 3}, ValueError, "count=3 is none of 2, 4"),
        ({"never": "drop"}, ValueError, "never='drop' must be 'keep': nothing else is there"),
        ({"newlines": "all"}, ValueError, "newlines='all' is none of 'candidates', 'keep'"),
    ],
)
def test_a_bad_value_is_refused_by_name(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        Optional(**options)


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (0.0, {"least": 0.0}, True),
        (-1e-9, {"least": 0.0}, False),
        (0.0, {"above": 0.0}, False),
        (1e-9, {"above": 0.0}, True),
        (1.0, {"below": 1.0}, False),
        (math.inf, {"below": math.inf}, False),
        (math.inf, {}, True),
        (math.nan, {}, False),
    ],
)
def test_bounds_of_numbers(value: float, bounds: dict[str, float], fits: bool) -> None:
    if fits:
        assert number("x", value, "rule", **bounds) == value
    else:
        with pytest.raises(ValueError, match=r"x=.*: rule"):
            number("x", value, "rule", **bounds)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_option_of_ours_takes_nonsense(name: str) -> None:
    """Not an object, whatever the option: checked by a field's rule, or by the class."""
    method = SAMPLES[name]
    for each in dataclasses.fields(method):
        if each.init:
            with pytest.raises((TypeError, ValueError), match=each.name if check_of(type(method), each.name) else None):
                dataclasses.replace(method, **{each.name: object()})


def test_titles_name_a_budget_where_there_is_one() -> None:
    titles = {
        "divprune, keep 0.25": vtc.DivPrune(),
        "fastv, keep 64": vtc.FastV(keep=64),
        "adaptive, keep 0.5": vtc.Adaptive(vtc.DivPrune(), at_most=0.5),
        "intower, keep 0.5": vtc.InTower(),
        "chain, keep 0.5": vtc.Chain(),
        "pixelprune": vtc.PixelPrune(),
        "prumerge": vtc.PruMerge(adaptive=True),
        "chain": vtc.Chain(vtc.PixelPrune(), vtc.DivPrune()),
    }
    assert {method.title: method for method in titles.values()} == titles
