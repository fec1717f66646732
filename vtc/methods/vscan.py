"""VScan: rethinking visual token reduction for efficient large vision-language models (TMLR 2026, arXiv 2505.22654)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.budget import count
from vtc.methods.base import ModelFacts, Newlines, Paper, Reduction, Stage, first_of, highest
from vtc.methods.folding import folded
from vtc.methods.grids import windows
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.saliency import Salient, highest_of_groups, tiered
from vtc.places import Entry, Layer
from vtc.signals import Rows
from vtc.signals.base import tower_layer
from vtc.tokens import Layout, VisualTokens, column
from vtc.values import flag, one_of, share, whole


@register_method
@dataclass(frozen=True, kw_only=True)
class VScan(Salient):
    """Keep what the vision tower looks at, everywhere and in every window, melt the rest into it; prune again inside.

    1. Local: half of the budget, divided evenly among windows of at most 6 x 6 tokens, goes to the highest CLS
       attention in an early layer (index 5 of 24).
    2. Global: the rest goes to the highest CLS attention in the layer that LLaVA takes its features from. A tower
       without a CLS token: attention received, in the early and the last layer.
    3. Each of the others joins the kept token with the most similar embedding (cosine), which becomes their mean.

    Then, with ``stage2=True``, after half of the language model's layers (stage 2): a third of these tokens stays,
    those that the prompt's last token looks at most in the next layer.

    ``keep`` is what stage 1 leaves; published: 96 of LLaVA-1.5's 576, then 32, on average 64. Stage 1 alone is the
    default: it works for later questions. In the released code what does not divide by the windows is lost (of 100
    tokens 98 stay: ``released=True``); here global tokens fill the budget. It knows 24 x 24 tokens; here a side of n is
    cut into ceil(n / 6) nearly equal parts. Windows are those of the thumbnail, each crop and each frame, but an image
    has one budget (``vtc.Allocate`` divides it); an unknown grid is cut into runs of 36 tokens. Newlines stay: they are
    in no window and no mean. For Qwen2.5-VL the code has other windows and index 7 of 32, here it is the same share, 6.
    It renumbers positions: ``positions="compact"``.

    Headline: LLaVA-NeXT-7B keeps 95.4 % of its accuracy at a tenth of the FLOPs (both stages).

    Attributes:
        window: side of the windows, in tokens.
        shallow: the early layer, an int or a share of the tower's depth.
        stage2: also do stage 2.
        then: the share of the tokens that stage 2 keeps, in (0, 1].
        released: the count of the released code.
    """

    newlines: Newlines = option("keep", one_of, "keep", rule="a newline is in no window")
    window: int = option(6, whole, "it is the side of a window", least=1)
    shallow: float = option(5 / 24, tower_layer)
    stage2: bool = option(False, flag)
    then: float = option(1 / 3, share, "it must lie in (0, 1]", zero=False)
    released: bool = option(False, flag)

    name: ClassVar[str] = "vscan"
    paper: ClassVar[Paper] = Paper(
        "VScan: rethinking visual token reduction for efficient large vision-language models",
        "TMLR",
        2026,
        "2505.22654",
    )
    merges: ClassVar[bool] = True

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """Stage 2 asks what the question looks at."""
        return self.stage2

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance, with two layers of the tower; and with one row of the layer behind stage 2."""
        first, half = Stage(Entry(), needs=(self.salience(), self.salience(self.shallow, "shallow"))), model.depth // 2
        return (first, Stage(Layer(half), needs=(Rows(half),))) if self.stage2 else (first,)

    def quota(self, n: int, stage: Stage) -> int:
        """``keep``, and a share of it."""
        first = count(self.keep, n)
        return count(self.then, first) if self.stage2 and stage.number else first

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Exact, but for those of the released code."""
        return None if self.released else super().counts(layouts, stage, given)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3, or stage 2."""
        mask, n = tokens.mask, tokens.mask.shape[1]
        keep = self.keep if stage.at.before_the_model else self.then
        budget = budget or tuple(count(keep, have) for have in tokens.counts)
        if not stage.at.before_the_model:
            looked = tokens.signals["last"].nan_to_num().masked_fill(~mask, -torch.inf)
            return Reduction(highest(looked, max(budget)), counts=budget)
        shallow, deep = (self.scores(tokens, suffix).masked_fill(~mask, -torch.inf) for suffix in ("shallow", ""))
        window, sizes = windows(tokens.layouts, n, self.window)
        each = [k // 2 // max(1, len(own)) for k, own in zip(budget, sizes, strict=True)]
        window = window.to(mask.device, non_blocking=True)
        local = highest_of_groups(shallow, window, column(each, mask.device).expand(-1, max(map(len, sizes))))
        if self.released:  # half of the budget is global, whatever windows leave of the other half
            taken = [sum(min(q, size) for size in own) for q, own in zip(each, sizes, strict=True)]
            budget = tuple(k - k // 2 + own for k, own in zip(budget, taken, strict=True))
        picks = tiered(local.long().masked_fill(~mask, -1), deep, max(budget))
        return folded(Reduction.of_mask(first_of(picks, budget, n), budget), tokens)
