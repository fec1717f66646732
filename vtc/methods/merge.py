"""Merge: what a selector drops is folded into what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.base import Reduction, Stage
from vtc.methods.folding import folded
from vtc.methods.registry import register_method
from vtc.methods.wrapper import Wrapper
from vtc.tokens import VisualTokens
from vtc.values import shown


@register_method
@dataclass(frozen=True)
class Merge(Wrapper):
    """Let a method choose, and fold each token that it drops into its most similar one that stays.

    1. The selector chooses; its places and its counts stay as they are.
    2. Every dropped token joins the kept one with the highest cosine, of features at the selector's place: embeddings
       that enter the language model, or what enters the projector. The lowest index on ties.
    3. A kept token becomes the mean of itself and of those that joined it, weighed with how many tokens each stands
       for, where something was merged before; else each counts one.

    So ``vtc.Merge(vtc.DivPrune(keep=0.25))`` has the places of DivPrune and other values. VScan merges so after its own
    selection, and RESTORE around its anchors; here any selector may. Newlines are not part of the picture: one that
    stays keeps its value, one that leaves joins nobody. Nor is a token without a direction (zeros, or a value that is
    not finite) like any other: it joins and takes nobody. A merged token keeps the position of its place, where
    RESTORE takes the median of its members'; deepstack features (Qwen3-VL) stay those of the place.

    Whether it helps depends on the model. RESTORE (ICML 2026) has for HoloV with 64 tokens of LLaVA-1.5-7B, in per cent
    of the unpruned accuracy over 8 tasks: 90.6 with original positions, 90.1 merged too, 96.5 with its calibrated
    attention on top, which is no part of this method. Text in pictures suffers (VisionZip's TextVQA 55.8 to 53.6).

    What the selector does inside the language model it does there as ever, and nothing is merged. Selectors that
    merge by themselves, and those that choose only inside the model, are refused; ``vtc.Chain`` takes a Merge as its
    first. Values are computed in float64, cosines in parts of 256 MiB; the sums take a matrix of float64, tokens times
    kept ones, of at least one image at a time.

    ``keep`` and ``newlines`` are those of the selector and, when given, replace them.

    Attributes:
        selector: the method that chooses.
    """

    name: ClassVar[str] = "merge"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector.merges:
            raise ValueError(
                f"selector={shown(self.selector)} merges by itself: use it alone, or merge for one that only drops, "
                "such as vtc.Merge(vtc.DivPrune())"
            )

    @property
    def content_decides(self) -> bool:  # type: ignore[override]
        """As the selector is."""
        return self.selector.content_decides

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Step 1, then 2 and 3; waits for the device if the selector does."""
        found = self.chosen(stage, tokens, budget)
        return folded(found, tokens) if stage.at.before_the_model else found
