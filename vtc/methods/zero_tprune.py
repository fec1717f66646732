"""Zero-TPrune: zero-shot token pruning through leveraging of the attention graph (CVPR 2024, arXiv 2305.17328)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage, highest
from vtc.methods.inside import TowerSchedule, tuple_of
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.ops.graph import over_heads, pagerank, without_similar
from vtc.places import Tower
from vtc.signals import KeysWide, SpecialHeads, TowerHeads
from vtc.tokens import VisualTokens
from vtc.values import interval, one_of, share, whole

EARLY, MIDDLE, LATE = 40, 8, 1  # votes; published: 30 to 50 in the first quarter of the blocks, 5 to 10, 1 at the end


@register_method
@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(TowerSchedule):
    """Let patches leave inside the vision tower that few look at, and those that are like a more important one.

    A stage before block ``after`` sees attention and keys of the block in front of it:

    1. I': one vote of weighted PageRank. In each head a token gives what it has to whom it attends (s becomes A^T s, A
       after the softmax, CLS among the tokens). At first CLS has sqrt(N), all others 1. Heads by root mean square.
    2. S: the less important half is compared with the other half, by the cosine of keys before rotation. The most
       alike leave: ``similar`` of all that leave at this stage, at most that half.
    3. I: PageRank with ``votes`` on the graph of those that are left; what was paid to the others is shared out again,
       as the softmax over those left does. The highest stay. Ties go to the lowest index.

    The layer decides everything. On tinyvlm at a quarter, a stage after 1, 2 and 3 of 4 blocks answers 54, 98 and 29 %
    of 300 questions: votes can end on background that serves as sinks. Look before you trust it: ``vtc show`` draws it.

    The paper prunes classifiers, as ``vtc.patch`` does, and searches stages by model; no code, nor results on VLMs.
    Its filter of heads by variance, in [0.01, 0.7], cannot mean that of probabilities, 1e-5 to 5e-4: it leaves no head.
    Here it is off; ``variance`` is that of N s. Headline: DeiT-S, 34.7 % fewer FLOPs, 45.3 % faster, -0.4 points.

    Attributes:
        keep: of the patches of each picture after the last stage; ``None``: the last ratio, or 0.25.
        after: how many blocks run before each stage, ints or shares of the depth, as of ``vtc.InTower``.
        ratios: of all patches, what each stage keeps, bent for another ``keep``; ``None``: in even steps.
        restore: bring patches back behind the tower; ``None``: where a token is made of several.
        votes: in step 3, of all stages or each; ``None``: 40 in the first quarter of the blocks, 1 in the last, else 8.
        start: ``cls``: as above; ``uni``: CLS has no more than others; ``None``: ``cls`` where there is a CLS token.
        similar: share of what leaves at a stage that leaves in step 2, of all stages or each.
        variance: least and most variance of N s in heads that count; all do where none is left. ``None``: all.
    """

    votes: int | tuple[int, ...] | None = None
    start: Literal["cls", "uni"] | None = option(None, one_of, "cls", "uni")
    similar: float | tuple[float, ...] = 0.5
    variance: tuple[float, float] | None = option(None, interval, "it must be least and most, such as (0.01, 0.7)")

    name: ClassVar[str] = "zero-tprune"
    paper: ClassVar[Paper] = Paper(
        "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
        "CVPR",
        2024,
        "2305.17328",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spread("similar", share, "shares of what leaves, in [0, 1]")
        if self.votes is not None:
            self.spread("votes", partial(whole, least=1), "whole numbers of at least 1")

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses what was left open by the tower: the start, and votes by depth."""
        early, late = facts.tower_depth / 4, facts.tower_depth * 3 / 4
        votes = tuple(EARLY if b <= early else MIDDLE if b <= late else LATE for b in self.blocks(facts))
        start: Any = "cls" if "special_heads" in facts.signals else "uni"
        chosen = replace(self, votes=self.votes or votes, start=self.start or start)
        return super(ZeroTPrune, chosen).settle(facts)

    def check(self, facts: ModelFacts) -> None:
        """A CLS token for a start from it."""
        if self.start == "cls" and "special_heads" not in facts.signals:
            raise ValueError(f"start='cls' needs a CLS token, which {facts.model_type} does not have; use start='uni'")

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Each with queries and keys of the block before."""
        kinds: list[type[TowerHeads | KeysWide]] = [TowerHeads, KeysWide]
        kinds += [SpecialHeads] if "special_heads" in model.signals else []
        return tuple(Stage(Tower(b, self.restore), tuple(k(layer=b - 1) for k in kinds)) for b in self.blocks(model))

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Picture by picture, those that are there: no map is as large as a batch, and no picture sees another."""
        assert budget is not None
        similar = tuple_of(self.similar)[stage.number]
        votes = MIDDLE if self.votes is None else tuple_of(self.votes)[stage.number]
        heads, keys = tokens.signals["heads"].detach(), tokens.signals["keys"].detach()
        special = tokens.signals.get("special_heads", heads[:, :0]).detach()
        order, rows = (~tokens.mask).to(torch.int8).argsort(dim=1, stable=True), []
        for g, (n, k) in enumerate(zip(tokens.counts, budget, strict=True)):
            left = order[g, :n]
            if drop := min(round(similar * (n - k)), n // 2):
                left = left[without_similar(keys[g, left], self._importance(heads[g, left], special[g], 1), drop)]
            last = self._importance(heads[g, left], special[g], votes)
            rows.append(pad(left[highest(last[None], k)[0]], (0, max(budget) - k)))
        return Reduction(torch.stack(rows))

    def _importance(self, heads: Tensor, special: Tensor, votes: int) -> Tensor:
        """[N] of patches [N, 2, heads, c], beside special tokens [S, 2, heads, c]."""
        query, key = torch.cat([special, heads]).movedim(0, 2)
        start = (key[0, :, -1] >= 0).float()  # padding has nothing to give
        if self.start != "uni" and len(special):
            start[0] = math.sqrt(len(heads))
        scores = pagerank(query, key, start / start.sum().clamp(min=1), votes)[:, len(special) :]
        return over_heads(scores * len(start), self.variance)
