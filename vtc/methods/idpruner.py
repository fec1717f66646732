"""IDPruner: visual token pruning that balances importance and diversity (arXiv 2602.13315; Tencent AngelSlim)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage
from vtc.methods.centering import Centred
from vtc.methods.importance import ClsAttention, FeatureNorm, Importance
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.places import Entry
from vtc.signals import Cls
from vtc.tokens import VisualTokens
from vtc.values import share, shown


@register_method
@dataclass(frozen=True, kw_only=True)
class IDPruner(Centred):
    """Keep tokens that matter and do not repeat each other: maximal marginal relevance, exactly.

    1. A score for every token of an image; scaled to [0, 1] between the image's least and greatest.
    2. First pick: the highest score.
    3. Every next pick: the highest ``balance * score - (1 - balance) * (largest cosine to a pick)``.
    4. The picks stay in their old order; the question is never looked at.

    The score is that of a small scorer trained for the model: ``importance=vtc.SelectorWeights(path)``, which is what
    the paper uses and what its numbers are of. Without weights the default is ``vtc.ClsAttention()`` where the vision
    tower has a CLS token (LLaVA, InternVL) and ``vtc.FeatureNorm()`` elsewhere (Qwen-VL, SigLIP towers), where
    ``ReceivedAttention()`` of vtc.methods.importance can be asked for; none of them is in the paper. ``keep=0.25`` and
    ``0.1``, ``balance=0.5`` are published; rounding is ``round(keep * n)``, at least 1.

    Code and paper differ in the score: the paper scales the soft top-k weights ``sigmoid(s + t)`` of the scorer's
    training, the code its raw output s, as here. The code treats all images of a prompt as one pool with one budget;
    here each image (a video: all its frames) has its own, so that no image loses all its tokens to another. The code
    may take several picks at once from the same scores (near-duplicates then enter together) but ships with one, as
    here. In its LLaVA port, positions are the original ones in the prompt and compact ones in decoding;
    ``positions="original"`` keeps them consistent.

    ``centered=True`` has the geometry of Cen-Prune (:class:`vtc.methods.centering.Centred`): cosines of centred rows,
    and the scaled score times the distinctiveness. That paper does so with CDPruner's relevance (equation 8) and has
    not tried this method: the combination is our reading.

    Headline: Qwen2.5-VL-7B keeps 95.18 % of its accuracy at 25 % of the tokens and 86.47 % at 10 %, over 11
    benchmarks, with trained weights; balance 0.1 gives 90.78, 0.9 gives 94.97 (at 25 %). To repeat it without them:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks ai2d,chartqa,docvqa_val,mmbench_en_dev,mme,pope
    --model_args base=qwen2_5_vl,pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=idpruner,keep=0.25

    and with them: ``vtc.patch(model, vtc.IDPruner(keep=0.25, importance=vtc.SelectorWeights(folder)))``.

    Attributes:
        importance: where the score comes from; ``None``: the default for the model.
        balance: weight of the score against resemblance, lambda in the paper, in [0, 1].
    """

    importance: Importance | None = None
    balance: float = option(0.5, share, "it must lie in [0, 1]")

    name: ClassVar[str] = "idpruner"
    paper: ClassVar[Paper] = Paper(
        "IDPruner: harmonizing importance and diversity in visual token pruning for MLLMs", "arXiv", 2026, "2602.13315"
    )
    nested: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance is not None and not isinstance(self.importance, Importance):
            raise TypeError(f"importance={shown(self.importance)} is no vtc.Importance, such as vtc.ClsAttention()")

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance, with what the importance needs; nothing while that is open."""
        return (Stage(Entry(), needs=(*self.geometry_needs, *(self.importance.needs if self.importance else ()))),)

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """If the importance is."""
        return self.importance is not None and self.importance.query_aware

    @property
    def remedy(self) -> str:
        """The importance that needs nothing."""
        return "vtc.IDPruner() without an importance takes what this model can give; vtc.FeatureNorm() needs nothing"

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses the importance and the geometry, where that was left open."""
        settled = super().settle(facts)
        if self.importance is not None:
            return settled
        assert isinstance(settled, IDPruner)
        return replace(settled, importance=ClsAttention() if Cls.kind in facts.signals else FeatureNorm())

    def check(self, facts: ModelFacts) -> None:
        """Asks the importance."""
        super().check(facts)
        if self.importance is not None:
            self.importance.check(facts)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3; nested in the budget."""
        assert budget is not None
        scores = scaled((self.importance or FeatureNorm()).score(tokens), tokens.mask)
        rows, weights = self.geometry(tokens)
        scores = scores if weights is None else scores * weights
        picks = ops.max_marginal_relevance(rows, scores, max(budget), self.balance, mask=tokens.mask)
        return Reduction(picks)


def scaled(scores: Tensor, mask: Tensor) -> Tensor:
    """``(s - min) / (max - min + 1e-6)`` over the tokens of each image; float32 [G, N], 0 for padding."""
    scores = scores.float()
    low = scores.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return ((scores - low) / (high - low + 1e-6)).masked_fill(~mask, 0.0)
