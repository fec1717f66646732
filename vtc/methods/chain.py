"""Chain: one method before the language model, another inside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from vtc.budget import Keep
from vtc.methods.base import Method, ModelFacts, Newlines, Stage, register_method, surviving
from vtc.methods.divprune import DivPrune
from vtc.methods.transprune import TransPrune
from vtc.tokens import InsideTokens, VisualTokens
from vtc.values import shown

_HALF, _THEN = DivPrune(keep=0.5), TransPrune()


@register_method
@dataclass(frozen=True)
class Chain(Method):
    """Let one method choose before the language model, and another drop more of what is left inside it.

    1. ``first`` chooses among all visual tokens; what it does inside the model itself, it does too.
    2. ``second`` works inside the model only; its shares and counts refer to what ``first`` left.
    3. So ``vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(keep=0.25))`` ends with 12.5 % of the tokens.

    ``keep`` and ``newlines`` are those of ``first`` and, when given, replace them. The second of a chain is
    ``vtc.TransPrune()``, or ``vtc.ToDRE(keep=1.0, stage2=True)``, which is its stage 2 alone. A chain whose second
    would keep more tokens than the first leaves, or would choose where the first has chosen already, is refused.
    TransPrune's paper puts it on VisionZip and CDPruner, which leave 24 tokens of 576, with 97.2 and 97.6 % of their
    accuracy.

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme --model_args
    base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=chain,keep=0.5

    Attributes:
        first: chooses before the language model.
        second: drops inside it.
    """

    first: Method = _HALF
    second: Method = _THEN
    keep: Keep | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    newlines: Newlines | None = field(default=None, kw_only=True)  # type: ignore[assignment]

    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        for side in ("first", "second"):
            if not isinstance(getattr(self, side), Method):
                raise TypeError(f"{side}={shown(getattr(self, side))} is no vtc.Method")
        given = {n: v for n, v in (("keep", self.keep), ("newlines", self.newlines)) if v is not None}
        if any(getattr(self.first, n) != v or type(getattr(self.first, n)) is not type(v) for n, v in given.items()):
            object.__setattr__(self, "first", replace(self.first, **given))
        object.__setattr__(self, "keep", self.first.keep)
        object.__setattr__(self, "newlines", self.first.newlines)
        super().__post_init__()
        self._check_order()

    def _check_order(self) -> None:
        first, second = self.first, self.second
        if not first.enters:
            swap = (
                f"; the other way round, vtc.Chain({shown(second)}, {shown(first)}), it works" if second.enters else ""
            )
            raise ValueError(f"first={shown(first)} drops nothing before the language model{swap}")
        if second.enters:
            raise ValueError(
                f"second={shown(second)} chooses before the language model, where first={shown(first)} has chosen "
                "already; what works inside it: vtc.TransPrune(), or vtc.ToDRE(keep=1.0, stage2=True)"
            )
        if isinstance(first.keep, int) and isinstance(second.keep, int) and second.keep > first.keep:
            raise ValueError(
                f"second keeps {second.keep} tokens of an image, more than the {first.keep} that first leaves; give "
                f"second a keep of at most {first.keep}, or a fraction of what it gets"
            )
        if second.newlines == "keep" and first.newlines != "keep":
            raise ValueError("second has newlines='keep', but first may have dropped some; give first newlines='keep'")

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """If one of the two is."""
        return self.first.query_aware or self.second.query_aware

    @property
    def needs(self) -> frozenset[str]:
        """What ``first`` needs; ``second`` is never asked before the language model."""
        return self.first.needs

    @property
    def remedy(self) -> str:
        """That of ``first``."""
        return self.first.remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Settles both, and notes which stage of the chain is whose in a model of this depth."""
        settled = replace(self, first=self.first.settle(facts), second=self.second.settle(facts))
        object.__setattr__(settled, "_depth", facts.depth)
        return settled

    def check(self, facts: ModelFacts) -> None:
        """Asks both."""
        self.first.check(facts)
        self.second.check(facts)
        super().check(facts)

    def choose(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
        """What ``first`` keeps."""
        return self.first.choose(tokens)

    def budget(self, tokens: VisualTokens) -> tuple[int, ...]:
        """That of ``first``."""
        return self.first.budget(tokens)

    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """What ``first`` picks."""
        return self.first.select(tokens, budget)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Those of both, in order."""
        return tuple(stage for _, _, stage in self._stages(depth))

    def transition(self, before: Tensor, after: Tensor, real: Tensor, visual: Tensor) -> Tensor:
        """That of the one which asks for it."""
        owner = self.second if type(self.second).transition is not Method.transition else self.first
        return owner.transition(before, after, real, visual)

    def keep_inside(self, index: int, tokens: InsideTokens) -> tuple[Tensor, tuple[int, ...]]:
        """That of the one whose stage it is."""
        depth = getattr(self, "_depth", None)
        if depth is None:
            raise RuntimeError("a chain must be settled for a model before its stages run: Method.settle(facts)")
        owner, own, _ = self._stages(depth)[index]
        return surviving(owner, own, tokens)

    def _stages(self, depth: int) -> list[tuple[Method, int, Stage]]:
        both = [(owner, i, s) for owner in (self.first, self.second) for i, s in enumerate(owner.stages(depth))]
        both.sort(key=lambda one: one[2].after)
        if not any(owner is self.second for owner, _, _ in both):
            raise ValueError(f"second={shown(self.second)} drops nothing inside the language model")
        for (_, _, a), (_, _, b) in pairwise(both):
            if a.after == b.after:
                raise ValueError(
                    f"first and second both drop tokens after layer {a.after} of this model's {depth}; give one of "
                    "them another layer"
                )
        if len({id(owner) for owner, _, s in both if "transition" in s.signals}) > 1:
            raise ValueError("first and second both score transitions, and only one of them can; use it once")
        return both
