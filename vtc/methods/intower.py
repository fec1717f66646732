"""In the tower: a rule lets patches leave between two blocks of the vision tower, and the rest of it has less to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from vtc.budget import Keep
from vtc.methods.base import Method, ModelFacts, Newlines, Reduction, Stage, keeps_all
from vtc.methods.divprune import DivPrune
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.inside import InsideTower, block_of
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.places import Tower
from vtc.signals import Signal, TowerSignal
from vtc.signals.base import tower_layer
from vtc.tokens import Layout, VisualTokens
from vtc.values import one_of, shown

RULES: dict[str, Method] = {
    "cls": FasterVLM(saliency="cls"),
    "received": FasterVLM(saliency="received"),
    "diverse": DivPrune(),
}


@register_method
@dataclass(frozen=True, kw_only=True)
class InTower(InsideTower):
    """Let patches leave after a third of the vision tower, and another method choose among the rest behind it.

    What prunes behind the tower cannot be faster than the tower; this can. No paper of its own: the rules are those of
    published methods, asked earlier.

    1. Before block ``after`` of the tower, a rule keeps ``keep`` of every picture's patches (thumbnail and crops are
       pictures of their own): ``cls`` (what the CLS token pays in the block before), ``received`` (what a patch gets
       there from all), ``diverse`` (DivPrune, on hidden states), or another method that chooses before the language
       model, whose tower signals are read in the block before.
    2. Later blocks see only those. Where every patch is a token, the others are no tokens of the prompt either, and
       positions stay as they were. Where a token is made of several patches (Gemma3, Idefics3, SmolVLM, InternVL,
       LLaVA-OneVision), patches that left come back behind the tower, moved by the mean of what their ten nearest
       neighbours among the others became, and no token leaves by this step. In the Qwen-VL line and GLM-V the four
       patches of a token stand together and leave together, and the token leaves with them.
    3. ``then`` chooses among what there is. A float ``keep`` of it is a share of all tokens, those that left here too.

    A third of the depth, at least two blocks: after one, what the CLS token looks at tells little (on tinyvlm at a
    quarter, a stage after 1, 2 and 3 of 4 blocks answers 88, 97 and 98 % of 300 questions); later, less is saved.

    Attributes:
        keep: of the patches of each picture, inside the tower.
        rule: which stay; ``None``: ``cls`` where there is a CLS token, else ``received``.
        after: how many blocks run before, an int or a share of those that the language model gets to see.
        restore: bring patches back behind the tower; ``None``: where a token is made of several that stand apart.
        then: a method for the entrance of the language model; ``None``: all that are left enter it.
    """

    keep: Keep = 0.5
    newlines: Newlines = option("candidates", one_of, "candidates", rule="a tower has none; `then` may keep them")
    rule: Literal["cls", "received", "diverse"] | Method | None = None
    after: float = option(1 / 3, tower_layer)
    then: Method | None = None

    name: ClassVar[str] = "intower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rule, str) and self.rule not in RULES:
            known = ", ".join(map(repr, RULES))
            raise ValueError(f"rule={shown(self.rule)} is none of None, {known}, nor a vtc.Method")
        if self.rule is not None and not isinstance(self.rule, str):
            _check_inner("rule", self.rule)
        if self.then is not None:
            _check_inner("then", self.then)
        if self.then is not None and keeps_all(self):
            raise ValueError(f"keep=1.0 leaves all patches in the tower: use {shown(self.then)} alone")

    @property
    def chooser(self) -> Method:
        """The rule as a method."""
        rule = RULES[self.rule or "cls"] if self.rule is None or isinstance(self.rule, str) else self.rule
        return replace(rule, keep=self.keep)

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """As ``then`` is."""
        return self.then is not None and self.then.query_aware

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """As ``then`` does."""
        return self.then is not None and self.then.merges

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses the rule, if that was left open; says that patches come back where they do."""
        rule: Any = self.rule or ("cls" if "cls" in facts.signals else "received")
        rule = rule if isinstance(rule, str) else rule.settle(facts)
        then = None if self.then is None else self.then.settle(facts)
        settled: Any = super().settle(facts)
        return replace(settled, rule=rule, then=then)

    def check(self, facts: ModelFacts) -> None:
        """Asks both."""
        self.chooser.check(facts)
        if self.then is not None:
            self.then.check(facts)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """In the tower; and those of ``then``."""
        block = block_of(self.after, model)
        needs = tuple(_in_block(signal, block - 1) for stage in self.chooser.stages(model) for signal in stage.needs)
        return (Stage(Tower(block, self.restore), needs), *(() if self.then is None else self.then.stages(model)))

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Of pictures in the tower, and behind ``then``."""
        if self.then is None or (stage is not None and isinstance(stage.at, Tower)):
            return super().counts(layouts, stage, given)
        return self.then.counts(layouts, None if stage is None else _its_own(stage), given)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """The rule in the tower, ``then`` behind it."""
        if isinstance(stage.at, Tower):
            return self.chooser.reduce(stage, tokens, budget)
        assert self.then is not None
        return self.then.reduce(_its_own(stage), tokens, budget)

    def positions_for(self, asked: str | None) -> str:
        """As ``then`` does."""
        return super().positions_for(asked) if self.then is None else self.then.positions_for(asked)

    @property
    def reads_layout(self) -> bool:
        """As ``then`` does."""
        return self.then is not None and self.then.reads_layout

    @property
    def remedy(self) -> str:
        """The same methods behind the tower."""
        return "vtc.FasterVLM() or vtc.DivPrune(), which choose behind the tower"


def _in_block(signal: Signal, block: int) -> Signal:
    """The same signal of another block of the tower."""
    return replace(signal, layer=block) if isinstance(signal, TowerSignal) else signal


def _its_own(stage: Stage) -> Stage:
    """A stage as ``then`` numbers it: ours comes before."""
    return replace(stage, number=stage.number - 1)


def _check_inner(name: str, given: Any) -> None:
    if not isinstance(given, Method):
        raise TypeError(f"{name}={shown(given)} is no vtc.Method, such as vtc.DivPrune(keep=0.25)")
    if not given.prunes_at_entry or isinstance(given, InsideTower) or len(given.members) > 1:
        raise ValueError(f"{name}={shown(given)} does not choose before the language model, such as vtc.DivPrune()")
    if name == "rule" and (given.merges or given.content_decides or given.reads_layout):
        raise ValueError(
            f"rule={shown(given)} merges, counts by content, or reads the structure of an image, which the patches of "
            "a tower do not have. What would work: vtc.FasterVLM(), vtc.DivPrune(), vtc.SCOPE()"
        )
