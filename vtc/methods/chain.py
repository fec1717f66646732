"""Chain: one method after another: in the vision tower, before the language model, inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

from vtc.budget import Keep
from vtc.methods.base import ANY_MODEL, Method, ModelFacts, Newlines, Reduction, Stage
from vtc.methods.divprune import DivPrune
from vtc.methods.registry import list_methods, method_class, register_method
from vtc.methods.transprune import TransPrune
from vtc.methods.wrapper import take_over
from vtc.places import Layer, Tower
from vtc.tokens import Layout, VisualTokens
from vtc.values import shown

_HALF, _THEN = DivPrune(keep=0.5), TransPrune()


@register_method
@dataclass(frozen=True)
class Chain(Method):
    """Let one method choose before the language model, and another drop more of what is left further on.

    1. ``first`` chooses among all visual tokens; what it does inside the model itself, it does too.
    2. ``second`` works further on; its shares and counts refer to what ``first`` left.
    3. So ``vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(keep=0.25))`` ends with 12.5 % of the tokens, and so does
       ``vtc.Chain(vtc.ToMe(keep=0.5), vtc.DivPrune(keep=0.25))``. Patches that come back behind the tower have not
       left: there ``second`` chooses among all tokens.

    ``keep`` and ``newlines`` are those of ``first`` and, when given, replace them. Behind a ``first`` that acts inside
    the vision tower alone, ``second`` may be any that does not act there. Behind any other it is one that drops nothing
    before the model: TransPrune, PyramidDrop, FastV, SparseVLM, DART, or ``vtc.ToDRE(keep=1.0, stage2=True)``, which is
    its stage 2 alone. A chain whose second would keep more tokens than the first leaves, or would choose where the
    first has chosen already, is refused.
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
        take_over(self, "first")
        if not isinstance(self.second, Method):
            raise TypeError(f"second={shown(self.second)} is no vtc.Method")
        super().__post_init__()
        self._check_order()

    def _check_order(self) -> None:
        first, second = self.first, self.second
        in_tower = _only_in_tower(first)
        if not first.prunes_at_entry:
            swap = f"; the other way round, vtc.Chain({shown(second)}, {shown(first)}), it works"
            swap = swap if second.prunes_at_entry else ""
            raise ValueError(f"first={shown(first)} drops nothing before the language model{swap}")
        if second.acts_in_tower or (second.prunes_at_entry and not in_tower):
            raise ValueError(
                f"second={shown(second)} chooses before the language model, where first={shown(first)} has chosen "
                f"already; what works inside it: {', '.join(_inside())} or vtc.ToDRE(keep=1.0, stage2=True)"
            )
        if in_tower:
            return  # its keep is that of pictures, and newlines come later
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
    def merges(self) -> bool:  # type: ignore[override]
        """If one of the two does."""
        return self.first.merges or self.second.merges

    @property
    def content_decides(self) -> bool:  # type: ignore[override]
        """If one of the two is."""
        return self.first.content_decides or self.second.content_decides

    @property
    def reads_layout(self) -> bool:
        """If one of the two does."""
        return self.first.reads_layout or self.second.reads_layout

    @property
    def members(self) -> tuple[Method, ...]:
        """The parts, which have the stages."""
        return (*self.first.members, *self.second.members)

    def positions_for(self, asked: str | None) -> str:
        """As ``first`` does, if the other can do with it."""
        return self.second.positions_for(self.first.positions_for(asked))

    @property
    def remedy(self) -> str:
        """That of ``first``."""
        return self.first.remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Settles both."""
        return replace(self, first=self.first.settle(facts), second=self.second.settle(facts))

    def check(self, facts: ModelFacts) -> None:
        """Asks both; they must not act at the same place."""
        self.first.check(facts)
        self.second.check(facts)
        if not self.second.prunes_at_entry and not _inside_model(self.second, facts):
            raise ValueError(f"second={shown(self.second)} drops nothing inside the language model")
        for a, b in pairwise(self.stages(facts)):
            if a.at == b.at and isinstance(a.at, Layer):
                raise ValueError(
                    f"first and second both drop tokens after layer {a.at.after} of this model's {facts.depth}; give "
                    "one of them another layer"
                )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Those of both, by place; what they do there is theirs."""
        return tuple(sorted((s for member in self.members for s in member.stages(model)), key=lambda stage: stage.at))

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """What ``second`` leaves of what ``first`` left."""
        if (left := self.first.counts(layouts, None, given)) is None:
            return None
        return self.second.counts(layouts, None, left)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Never asked: its members are."""
        raise NotImplementedError("the stages of a chain are those of its parts; see Method.members")


def _only_in_tower(method: Method) -> bool:
    """Whether patches leave inside the vision tower, and nothing between it and the language model."""
    places = [s.at for member in method.members for s in member.stages(ANY_MODEL) if s.at.before_the_model]
    return all(isinstance(at, Tower) for at in places)


def _inside_model(method: Method, facts: ModelFacts) -> bool:
    return any(isinstance(s.at, Layer) for member in method.members for s in member.stages(facts))


def _inside() -> list[str]:
    """Vtc's own methods that drop nothing before the language model."""
    own = [cls for cls in map(method_class, list_methods()) if cls.__module__.startswith("vtc.methods.")]
    return [f"vtc.{cls.__name__}()" for cls in own if not cls().prunes_at_entry]
