"""CDPruner: beyond attention or similarity, maximizing conditional diversity (NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.base import ModelFacts, Paper, Reduction, Stage
from vtc.methods.centering import Centred
from vtc.methods.cliptext import against
from vtc.methods.importance import Importance
from vtc.methods.registry import register_method
from vtc.ops import max_determinant
from vtc.places import Entry
from vtc.tokens import VisualTokens
from vtc.values import shown


@register_method
@dataclass(frozen=True, kw_only=True)
class CDPruner(Centred):
    """Keep tokens that matter for the question and differ: the greedy mode of a determinantal point process.

    1. Relevance r of a token: minus its cosine to the question in CLIP's space, averaged over the question's pieces;
       scaled from 1e-6 to 1 between the least and the greatest of its image.
    2. Kernel: ``r_i * cosine(i, j) * r_j``, cosines of what enters the language model.
    3. Every pick: the token that adds most to the determinant of the picks' kernel, that is the highest
       ``r**2 * (variance of the token that those picked do not explain)``. The lowest index on ties.

    The paper calls relevance a cosine, the code takes it negative, as here. The code scales over all crops of a batch,
    so that pictures change each other's relevance; here each image is by itself. Past the rank of the kernel the code
    gets NaN and keeps fewer tokens; here those that the picks explain come last, by relevance, none twice. The code
    strips newlines and gives every crop the same number of tokens: ``newlines="keep"`` and ``vtc.Allocate``. It
    renumbers positions: ``positions="compact"``. ``centered=True``: both r and the distinctiveness of Cen-Prune weigh a
    token, and cosines are those of centred rows (its equation 8).

    Published, with the CLIP text tower: LLaVA-1.5-7B keeps 99.0, 97.0, 94.3 % at 128, 64, 32 tokens. No command repeats
    that, since a benchmark's questions do not reach a method by themselves; without relevance:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,pope,mmbench_en_dev,mme,scienceqa_img
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=cdpruner,keep=64

    Attributes:
        relevance: where r comes from: ``vtc.ClipText(folder)``, the published one, which must be told the questions, or
            another ``vtc.Importance``. ``None`` or "none": r = 1, diversity alone. ``vtc.select`` also takes signals
            ``relevance`` [N] (scaled already), or ``image_embeds`` [N, e] and ``text_embeds`` [M, e].
    """

    relevance: Importance | None = None

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[Paper | None] = Paper(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
        "NeurIPS", 2025, "2506.10967",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance == "none":
            object.__setattr__(self, "relevance", None)
        if self.relevance is not None and not isinstance(self.relevance, Importance):
            raise TypeError(f"relevance={shown(self.relevance)} is neither 'none' nor such as vtc.ClipText(folder)")

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """If the relevance is."""
        return self.relevance is not None and self.relevance.query_aware

    @property
    def remedy(self) -> str:
        """Diversity alone."""
        return "vtc.CDPruner() without relevance" if self.relevance is not None else ""

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance."""
        return (Stage(Entry(), needs=(*self.geometry_needs, *(self.relevance.needs if self.relevance else ()))),)

    def check(self, facts: ModelFacts) -> None:
        """Asks the relevance."""
        super().check(facts)
        if self.relevance is not None:
            self.relevance.check(facts)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3; nested in the budget."""
        assert budget is not None
        rows, distinct = self.geometry(tokens)
        weight = self._relevance(tokens)
        weight = weight if distinct is None else weight * distinct
        return Reduction(max_determinant(rows, weight, max(budget), mask=tokens.mask))

    def _relevance(self, tokens: VisualTokens) -> Tensor:
        """Step 1: float64 [G, N]."""
        given, mask = tokens.signals, tokens.mask
        if "relevance" in given:
            return given["relevance"].detach().double().nan_to_num()
        if "image_embeds" in given and "text_embeds" in given:
            found = against(given["image_embeds"].detach(), given["text_embeds"].detach())
        elif self.relevance is not None:
            found = self.relevance.score(tokens).detach()
        else:
            return mask.double()
        low = found.masked_fill(~mask, torch.inf).amin(-1, keepdim=True).double()
        high = found.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True).double()
        return ((found.double() - low + 1e-6) / (high - low).clamp(min=1e-6)).masked_fill(~mask, 0.0)
