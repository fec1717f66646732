"""Between methods and engine: which stages a method has on a model, and the one call that runs one of them.

Budgets, newlines that stay unasked, tokens that left before, and a look at the result: here, once, for every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vtc.methods.base import Method, ModelFacts, Reduction, Stage, keeps_all, marked, read_of
from vtc.methods.returns import check_counts, check_reduction, check_stages
from vtc.tokens import Layout, VisualTokens


@dataclass(frozen=True)
class Step:
    """One stage of one method on one model; a chain's steps belong to its parts.

    Attributes:
        method: who decides.
        stage: where, and what it needs.
    """

    method: Method
    stage: Stage

    @property
    def axes(self) -> dict[str, int | None]:
        """Of signals that are not [G, N, ...], the axis of the tokens."""
        return {name: axis for signal in self.stage.needs for name, axis in signal.axes.items()}

    def reduce(self, tokens: VisualTokens, budget: tuple[int, ...] | None = None, in_order: bool = False) -> Kept:
        """Let the method decide: the one call that the engine makes.

        Args:
            tokens: what is there.
            budget: how many to keep of each image, at most all; default: what the method's counts come to.
            in_order: ask also where all stay, since somebody wants to know the order; not if the method merges.

        Raises:
            ValueError: it returned something else than promised; on CUDA, wrong values of methods that are not vtc's
                own end in an assertion of the device.
        """
        if budget is None:
            budget = self.counts(tokens.layouts, tokens.given, tokens.counts)
        if budget == tokens.counts and (self.method.merges or not in_order):
            return Kept(tokens.mask, tokens.counts)
        if self.method.newlines == "keep":
            return self._around_newlines(tokens, budget)
        found = check_reduction(self.method, self.method.reduce(self.stage, tokens, budget), budget, tokens)
        return Kept.of(found, tokens)

    def counts(self, layouts: Sequence[Layout], given: Sequence[int], present: Sequence[int]) -> tuple[int, ...] | None:
        """How many tokens of each image are left behind this step, from layouts alone; ``None``: content decides.

        Args:
            layouts: of the images.
            given: how many of each there were before the method's first stage.
            present: how many there are now.
        """
        counts = self.method.counts(layouts, self.stage, given)
        return check_counts(self.method, counts, tuple(present), layouts)

    def most(self, layouts: Sequence[Layout], given: Sequence[int], present: Sequence[int]) -> tuple[int, ...] | None:
        """As :meth:`counts`; where content decides, the most that may be left, ``None`` if nothing bounds it."""
        if (counts := self.counts(layouts, given, present)) is not None:
            return counts
        if self.stage.all_or_nothing:
            return tuple(present)
        if not self.method.content_decides:
            return None
        bound = Method.counts(self.method, layouts, self.stage, given)
        assert bound is not None  # of the base class, which always knows
        return tuple(map(min, bound, present))

    def _around_newlines(self, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Kept:
        bare, index = tokens.without_newlines()
        n = tokens.features.shape[1]
        spared = tuple(have - left for have, left in zip(tokens.counts, bare.counts, strict=True))
        asked = None if budget is None else tuple(k - s for k, s in zip(budget, spared, strict=True))
        if asked == bare.counts:
            return Kept(tokens.mask, tokens.counts)
        found = check_reduction(self.method, self.method.reduce(self.stage, bare, asked), asked, bare)
        inner = Kept.of(found, bare)
        place = index.masked_fill(~bare.mask, n)  # where the others stood
        kept = tokens.mask & ~_spread(bare.mask & ~inner.mask, place, n)
        order = None if inner.order is None else index.gather(1, inner.order)
        return Kept(
            kept,
            tuple(k + s for k, s in zip(inner.counts, spared, strict=True)),
            None if inner.features is None else _spread(inner.features, place, n),
            None if inner.features is None else _spread(inner.mask, place, n),
            None if inner.size is None else _spread(inner.size, place, n),
            order,
            inner.counts,
        )


@dataclass(frozen=True)
class Kept:
    """What is left behind a step.

    Attributes:
        mask: bool [G, N].
        counts: how many of each image (host integers).
        features: float [G, N, d], new values at places of ``written``, ``None`` where nothing is merged.
        written: bool [G, N], the places that have a new value.
        size: float32 [G, N], how many tokens those places stand for, ``None``: as before.
        order: LongTensor [G, K], the places that the method chose, in its own order; ``None`` if it has none.
        chosen: how many of a row of ``order`` are meant (host integers): newlines that stayed unasked are not among
            them.
    """

    mask: Tensor
    counts: tuple[int, ...]
    features: Tensor | None = None
    written: Tensor | None = None
    size: Tensor | None = None
    order: Tensor | None = None
    chosen: tuple[int, ...] = ()

    @classmethod
    def of(cls, found: Reduction, tokens: VisualTokens) -> Kept:
        """From a reduction that was looked at."""
        counts, n = found.counts, tokens.features.shape[1]
        assert counts is not None
        order = found.index[:, : max([0, *counts])]
        place, width = read_of(order, counts, n), order.shape[1]
        mask = marked(place, n)
        features = None if found.features is None else _spread(found.features[:, :width], place, n)
        size = None if found.size is None else _spread(found.size[:, :width], place, n)
        written = None if features is None else mask
        return cls(mask, counts, features, written, size, order if found.ordered else None, counts)


def steps_of(method: Method, facts: ModelFacts, idle: bool = False) -> tuple[Step, ...]:
    """The stages of a settled method on a model, by place.

    Args:
        method: settled.
        facts: of the model.
        idle: also those before the language model that keep everything, which the engine leaves out.

    Raises:
        ValueError: a schedule does not fit the model, or two parts of a chain act at the same place.
    """
    steps = []
    for member in method.members:
        for stage in check_stages(member, member.stages(facts), facts.depth):
            if idle or not (stage.at.before_the_model and keeps_all(member)):
                steps.append(Step(member, stage))
    return tuple(sorted(steps, key=lambda step: step.stage.at))


def _spread(values: Tensor, place: Tensor, n: int) -> Tensor:
    """[G, K, ...] at LongTensor [G, K] places of [G, n, ...]; place n stands for none, and nothing is zero."""
    out = values.new_zeros(len(values), n + 1, *values.shape[2:])
    index = place.view(*place.shape, *(1,) * (values.dim() - 2)).expand(*place.shape, *values.shape[2:])
    return out.scatter(1, index, values)[:, :n]
