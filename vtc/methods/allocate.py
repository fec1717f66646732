"""Budget allocators: who shares a budget with whom, whatever method then chooses within it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.budget import apportioned, count
from vtc.methods.base import Method, ModelFacts, Newlines, Stage, register_method, selection, surviving
from vtc.methods.divprune import DivPrune
from vtc.tokens import InsideTokens, Layout, Part, VisualTokens
from vtc.values import shown


@dataclass(frozen=True, kw_only=True)
class Allocator(Method):
    """Base of the methods that share out a budget and let another method, the selector, choose within each share.

    Attributes:
        selector: the method that chooses; its own ``keep`` and ``newlines`` do not count. What it does inside the
            language model it does there as ever.
    """

    newlines: Newlines = "keep"
    selector: Method | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector is None:
            return
        if not isinstance(self.selector, Method):
            raise TypeError(f"selector={shown(self.selector)} is no vtc.Method, such as vtc.DivPrune()")
        if not self.selector.enters:
            raise ValueError(
                f"selector={shown(self.selector)} does not choose before the language model, where {self.name} shares "
                "out budgets. What would work: vtc.DivPrune(), or with it "
                f"vtc.Chain(vtc.{type(self).__name__}(), second)"
            )

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """As the selector is."""
        return self.selector is not None and self.selector.query_aware

    @property
    def needs(self) -> frozenset[str]:
        """What the selector needs."""
        return frozenset() if self.selector is None else self.selector.needs

    @property
    def remedy(self) -> str:
        """That of the selector."""
        return super().remedy if self.selector is None else self.selector.remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Settles the selector."""
        return self if self.selector is None else replace(self, selector=self.selector.settle(facts))

    def check(self, facts: ModelFacts) -> None:
        """Asks the selector."""
        super().check(facts)
        if self.selector is not None:
            self.selector.check(facts)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Those of the selector."""
        return () if self.selector is None else self.selector.stages(depth)

    def transition(self, before: Tensor, after: Tensor, real: Tensor, visual: Tensor) -> Tensor:
        """That of the selector."""
        assert self.selector is not None
        return self.selector.transition(before, after, real, visual)

    def keep_inside(self, index: int, tokens: InsideTokens) -> tuple[Tensor, tuple[int, ...]]:
        """That of the selector."""
        assert self.selector is not None
        return surviving(self.selector, index, tokens)

    def budget(self, tokens: VisualTokens) -> tuple[int, ...]:
        """What :meth:`choose` comes to."""
        return self.choose(tokens)[1]

    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """What :meth:`choose` keeps, ascending; ``budget`` must be that of :meth:`budget`."""
        mask, counts = self.choose(tokens)
        if counts != tuple(budget):
            raise ValueError(f"{self.name} shares out {counts} tokens, not budget={shown(tuple(budget))}")
        return (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, : max(budget)]


def within(
    selector: Method, tokens: VisualTokens, parts: list[tuple[Part, ...]], budgets: list[tuple[int, ...]]
) -> tuple[Tensor, tuple[int, ...]]:
    """Let a method choose within parts of images.

    Args:
        selector: the method.
        tokens: G images.
        parts: of each image.
        budgets: of each part; where it is 0 the selector is not asked.

    Returns:
        Bool [G, N], and how many that is for each image.
    """
    asked = [[(p, k) for p, k in zip(*both, strict=True) if k] for both in zip(parts, budgets, strict=True)]
    pieces, place = tokens.split([[part for part, _ in own] for own in asked])
    mask = selection(selector, pieces, tuple(k for own in asked for _, k in own))
    return unsplit(mask, place, tokens), tuple(sum(k for _, k in own) for own in asked)


def unsplit(mask: Tensor, place: Tensor, tokens: VisualTokens) -> Tensor:
    """Bool [R, M] over the parts of :meth:`VisualTokens.split` to bool [G, N] over the images they come from."""
    shape = tokens.features.shape[:2]
    end = shape.numel()
    flat = torch.zeros(end + 1, dtype=torch.bool, device=mask.device)
    return flat.scatter(0, place.masked_fill(~mask, end).flatten(), True)[:-1].view(shape)


_SELECTOR = DivPrune()


@register_method
@dataclass(frozen=True, kw_only=True)
class Allocate(Allocator):
    """Share a budget out evenly, and let any method choose within each share.

    1. ``by="image"``: one budget for each image, as every method has by itself. ``by="uniform"``: one for the
       thumbnail, each crop and each frame. ``by="frame"``: one for each frame of a video; pictures stay whole.
    2. The image's total is that of ``keep``, rounded once, and divided in proportion to the sizes of its parts; the
       largest remainders get what is left over.
    3. The selector chooses within each part, as if it were an image of its own.

    ``uniform`` is the baseline that GlobalCom² is 1.4 points better than in its paper's ablation (LLaVA-NeXT-7B);
    ``vtc.GlobalCom2(selector=...)`` is its allocation with any selector. Newlines always stay.

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme --model_args
    base=llava_hf,pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,method=allocate,keep=0.25

    Attributes:
        by: what has a budget of its own.
        selector: the method that chooses; its own ``keep`` and ``newlines`` do not count.
    """

    selector: Method = _SELECTOR  # type: ignore[assignment]
    by: Literal["uniform", "image", "frame"] = "uniform"

    name: ClassVar[str] = "allocate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector is None:
            raise TypeError("allocate shares out a budget only; give a selector, such as vtc.DivPrune()")
        if self.by not in ("uniform", "image", "frame"):
            raise ValueError(f"by={shown(self.by)} is neither 'uniform' nor 'image' nor 'frame'")
        if self.newlines != "keep":
            raise ValueError(
                f"newlines={shown(self.newlines)}: newline tokens belong to no part of an image; they are kept"
            )

    def choose(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
        """Steps 1 to 3; does not wait for the device if the selector does not."""
        totals = tuple(count(self.keep, n) for n in tokens.lengths)
        if totals == tokens.lengths:
            return tokens.mask, totals
        parts = [self._parts(layout) for layout in tokens.layouts]
        budgets = [
            apportioned(total, [len(part.tokens) for part in own]) for total, own in zip(totals, parts, strict=True)
        ]
        return within(self.selector, tokens, parts, budgets)

    def _parts(self, layout: Layout) -> tuple[Part, ...]:
        split = self.by == "uniform" or (self.by == "frame" and bool(layout.of_kind("frame")))
        return layout.parts() if split else (Part("image", tuple(range(layout.length)), layout),)
