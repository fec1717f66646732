"""Base of the methods that do something with the choice of another one, their selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vtc.budget import Keep
from vtc.methods.base import ANY_MODEL, Method, ModelFacts, Newlines, Reduction, Stage
from vtc.methods.divprune import DivPrune
from vtc.methods.returns import check_reduction
from vtc.methods.stages import Step
from vtc.tokens import Layout, VisualTokens
from vtc.values import shown

_SELECTOR = DivPrune()


def take_over(outer: Method, inner: str) -> None:
    """Give a method the ``keep`` and ``newlines`` of another one inside it; where it has its own, those replace them.

    Args:
        outer: under construction; its two options may be ``None``.
        inner: the field that has the other method.
    """
    method = getattr(outer, inner)
    if not isinstance(method, Method):
        raise TypeError(f"{inner}={shown(method)} is no vtc.Method, such as vtc.DivPrune()")
    given: dict[str, Any] = {n: getattr(outer, n) for n in ("keep", "newlines") if getattr(outer, n) is not None}
    if any(getattr(method, n) != v or type(getattr(method, n)) is not type(v) for n, v in given.items()):
        object.__setattr__(outer, inner, method := replace(method, **given))
    object.__setattr__(outer, "keep", method.keep)
    object.__setattr__(outer, "newlines", method.newlines)


def refuse_inside_tower(outer: str, selector: Method) -> None:
    """Refuse a selector that lets patches leave inside the vision tower, where pictures have no tokens yet.

    Args:
        outer: class of the method that wraps it.
        selector: the other.
    """
    if selector.acts_in_tower:
        raise ValueError(
            f"selector={shown(selector)} lets patches leave inside the vision tower. What would work: "
            f"vtc.InTower(then=vtc.{outer}())"
        )


@dataclass(frozen=True)
class Wrapper(Method):
    """A method whose selector chooses before the language model; what that does inside it, it does there as ever.

    ``keep`` and ``newlines`` are those of the selector and, when given, replace them.

    Attributes:
        selector: the method that chooses.
    """

    selector: Method = _SELECTOR
    keep: Keep | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    newlines: Newlines | None = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        take_over(self, "selector")
        super().__post_init__()
        me, selector = type(self).__name__, self.selector
        refuse_inside_tower(me, selector)
        if len(selector.members) > 1:
            raise ValueError(
                f"selector={shown(selector)} is several methods; wrap the first of them: "
                f"vtc.Chain(vtc.{me}(first), second)"
            )
        if not any(stage.at.before_the_model for stage in selector.stages(ANY_MODEL)):
            raise ValueError(
                f"selector={shown(selector)} does not choose before the language model, where {self.name} works. What "
                f"would work: vtc.DivPrune(), or with it vtc.Chain(vtc.{me}(), second)"
            )

    def chosen(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """What the selector keeps, looked at, with its counts."""
        return check_reduction(self.selector, self.selector.reduce(stage, tokens, budget), budget, tokens)

    def most(self, stage: Stage, tokens: VisualTokens) -> tuple[int, ...] | None:
        """How many tokens of each image the selector would keep; ``None``: content decides."""
        return Step(self.selector, stage).counts(tokens.layouts, tokens.given, tokens.counts)

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """As the selector is."""
        return self.selector.query_aware

    @property
    def reads_layout(self) -> bool:
        """As the selector does."""
        return self.selector.reads_layout

    def positions_for(self, asked: str | None) -> str:
        """As the selector does."""
        return self.selector.positions_for(asked)

    @property
    def remedy(self) -> str:
        """That of the selector."""
        return self.selector.remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Settles the selector."""
        return replace(self, selector=self.selector.settle(facts))

    def check(self, facts: ModelFacts) -> None:
        """Asks the selector."""
        self.selector.check(facts)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Those of the selector."""
        return self.selector.stages(model)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Those of the selector."""
        return self.selector.counts(layouts, stage, given)
