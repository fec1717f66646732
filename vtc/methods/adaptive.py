"""Adaptive: as many tokens as an image needs, so that each one dropped has a kept one that is like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vtc.budget import Keep, check_keep
from vtc.methods.base import Method, Reduction, Stage, read_of
from vtc.methods.divprune import DivPrune
from vtc.methods.registry import register_method
from vtc.methods.wrapper import Wrapper
from vtc.ops import first_near
from vtc.tokens import Layout, VisualTokens, column
from vtc.values import number, shown

SLACK = 2.0**-20  # of cosines: what rounding may take from that of two equal rows

_HALF = DivPrune(keep=0.5)


@register_method
@dataclass(frozen=True)
class Adaptive(Wrapper):
    """Let a method pick one token after the other, and stop when every token left has a pick within a given distance.

    1. The selector picks as many tokens of an image as ``keep`` allows.
    2. Of these stay the first k, for the least k with which every other token has a cosine distance (1 - cosine) of at
       most ``radius`` to one of them. If no k is enough, all of them stay.

    So a plain picture keeps few tokens and a page of text many: ``vtc.Adaptive(vtc.DivPrune(), radius=0.3,
    at_most=0.5)``. Guaranteed, to a millionth: an image that keeps fewer tokens than ``keep`` allows has no dropped
    token farther than ``radius`` from its nearest kept one, and with one pick less it would have. An image that keeps
    all that ``keep`` allows may have some (it is what the selector alone keeps). With picks that are farthest first
    (``vtc.DivPrune()``, ``vtc.ToDRE(variant="k_center")``, ``vtc.IDPruner(balance=0.0)``) more is known, since a
    cosine distance is half the square of a distance: no set of fewer tokens covers the image within ``radius / 4``,
    and where ``keep`` cut, no set of that many within less than a quarter of the distance that is left.

    Copies of one token keep one of them. A token without a direction (zeros) has distance 1 to all, as everywhere in
    vtc, and can only be kept. Newlines are tokens like any other, and with ``newlines="keep"`` no part of this.

    Selectors are those whose picks do not depend on how many are asked for (``nested``): vtc.DivPrune, vtc.ToDRE,
    vtc.IDPruner, vtc.SCOPE and all that keep the highest of some score; the others are refused. What they do inside
    the language model they do there as ever. Features are compared where the selector sees them.

    How many stay is known on the device only: every prefill waits for it once, and vLLM, which has to know before,
    refuses. A batch is as long as its longest prompt. Costs what the selector costs at ``keep``, and as many cosines
    as it has picks and the image tokens, in parts of 256 MiB.

    ``keep`` and ``newlines`` are those of the selector and, when given, replace them.

    Attributes:
        selector: the method that picks.
        radius: the distance, in [0, 1); 0: only copies leave.
        at_most: another name of ``keep`` here, to write it by.
    """

    selector: Method = _HALF
    radius: float = field(default=0.3, kw_only=True)
    at_most: Keep | None = field(default=None, kw_only=True, repr=False)

    name: ClassVar[str] = "adaptive"
    content_decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rule = "it is a cosine distance, 1 - cosine, and must lie in [0, 1)"
        object.__setattr__(self, "radius", number("radius", self.radius, rule, least=0.0, below=1.0))
        if self.at_most is not None:
            self._rename()
        super().__post_init__()
        if not self.selector.nested or self.selector.merges:
            raise ValueError(
                f"selector={shown(self.selector)} does not pick one token after the other, the same for every budget: "
                "its picks cannot be stopped early. What would work: vtc.DivPrune(), vtc.ToDRE(), vtc.IDPruner(), "
                "vtc.SCOPE(), vtc.FasterVLM(); and to merge, vtc.Merge(vtc.Adaptive(...))"
            )

    def _rename(self) -> None:
        """``at_most`` becomes ``keep``: if both had it, a later ``replace`` could not tell which one is meant."""
        most = check_keep(self.at_most)  # type: ignore[arg-type]
        if self.keep is not None and (self.keep != most or type(self.keep) is not type(most)):
            raise ValueError(
                f"at_most={shown(most)} and keep={shown(self.keep)} are two names of the same option; give keep alone"
            )
        object.__setattr__(self, "keep", most)
        object.__setattr__(self, "at_most", None)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Of the selector inside the language model; before it, the content decides."""
        if stage is None or stage.at.before_the_model:
            return None
        return self.selector.counts(layouts, stage, given)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 and 2. Waits for the device: how many tokens are left is the decision itself."""
        if not stage.at.before_the_model:
            return self.chosen(stage, tokens, budget)
        most = self.most(stage, tokens)
        found = self.chosen(stage, tokens, most)
        assert found.counts is not None
        if not found.ordered:
            raise ValueError(f"{type(self.selector).__name__} says that it is nested, and its reduction has no order")
        picks = read_of(found.index, found.counts, tokens.mask.shape[1])
        reached = first_near(tokens.features, picks, 1.0 - self.radius - SLACK)
        needed = reached.masked_fill(~tokens.mask, 0).amax(1, keepdim=True) + 1
        counts = torch.minimum(needed, column(found.counts, needed.device))[:, 0]
        return Reduction(found.index, counts=tuple(counts.tolist()))  # the one wait
