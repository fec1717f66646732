"""Cen-Prune: centred features and distinctiveness, inside methods that look at cosines (Wen et al. 2026)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vtc.methods.base import Method, ModelFacts
from vtc.methods.options import option
from vtc.ops.merging import UNIT, unit_rows
from vtc.signals import TowerFeatures, TowerSignal
from vtc.tokens import VisualTokens
from vtc.values import flag, one_of, shown

EPSILON = 1e-6  # of the paper's denominators; it names no value
BITS = 36  # of summands: sums of up to 2**17 of them are exact in float64
TINY = 1e-200  # as good as zero
ENTRIES = 2**26  # of features that are worked on at a time; an image alone may have more


@dataclass(frozen=True, kw_only=True)
class Centred(Method):
    """Base of the methods whose geometry can be that of Cen-Prune.

    Features of one image share a large common part, so that all their cosines are high. Both steps are needed: centring
    without weights lost accuracy in the paper (88.2, without both 90.4, with both 92.6; LLaVA-1.5, 32 tokens, 4 tasks).

    1. Rows y of an image (``qwen``: every channel divided by its standard deviation); centred rows: y minus their mean.
    2. Distinctiveness: minus the mean cosine of y, before centring, to all other tokens; from 0 for the least to 1 for
       the most (``llava``), or the sigmoid of its z-score (``qwen``).
    3. The method compares centred rows, and multiplies what it maximises with the distinctiveness.

    There is no released code: equations 3 to 12 decided. On Qwen the paper takes what leaves the vision tower, averaged
    over the 2 x 2 patches of a token; so does this where the model gives it (``tower_features``). A Qwen that does not
    has its embeddings centred, which the paper's numbers are not of. A centred row without an entry above 1e-6 of the
    image's greatest has no direction: its cosines are 0. Sums are exact: a batch does not change a bit.

    Attributes:
        centered: whether to; ``False``: the method as published.
        variant: ``llava`` or ``qwen``, as above; ``None``: ``qwen`` for models of that name, else ``llava``.
        source: of the rows, with ``centered``: ``entry`` (what enters the language model) or ``tower`` (what leaves the
            vision tower's last layer); ``None``: ``tower`` with ``qwen`` where the model gives it, else ``entry``.
    """

    centered: bool = option(False, flag)
    variant: Literal["llava", "qwen"] | None = option(None, one_of, None, "llava", "qwen")
    source: Literal["entry", "tower"] | None = option(None, one_of, None, "entry", "tower")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variant", "source"):
            if not self.centered and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={shown(value)} goes with centered=True")

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses what was left open."""
        if not self.centered:
            return self
        variant = self.variant or ("qwen" if facts.model_type.startswith("qwen") else "llava")
        own = variant == "qwen" and TowerFeatures.kind in facts.signals
        return replace(self, variant=variant, source=self.source or ("tower" if own else "entry"))

    @property
    def geometry_needs(self) -> tuple[TowerSignal, ...]:
        """The signal that rows come from."""
        return (TowerFeatures(layer=-1),) if self.source == "tower" else ()

    def geometry(self, tokens: VisualTokens) -> tuple[Tensor, Tensor | None]:
        """Rows to compare [G, N, d], and with ``centered`` the distinctiveness, float32 [G, N]."""
        if not self.centered:
            return tokens.features, None
        rows = tokens.signals["tower_features"] if self.source == "tower" else tokens.features
        return centred(rows, tokens.mask, self.variant or "llava")


def centred(rows: Tensor, mask: Tensor, variant: Literal["llava", "qwen"]) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2: centred rows float32 [G, N, d], and distinctiveness float32 [G, N], 0 for padding."""
    size = max(1, ENTRIES // max(1, rows[0].numel()))
    parts = zip(rows.split(size), mask.split(size), strict=True)
    middles, weights = zip(*(_centred(*part, variant) for part in parts), strict=True)
    return torch.cat(middles), torch.cat(weights)


def _centred(rows: Tensor, mask: Tensor, variant: Literal["llava", "qwen"]) -> tuple[Tensor, Tensor]:
    there = mask[..., None]
    y = rows.detach().double().masked_fill(~there, 0.0).nan_to_num(0.0, 0.0, 0.0)
    middle = y - mean(y, mask)
    if variant == "qwen":
        sigma = (mean(middle.square(), mask) + EPSILON).sqrt()
        y, middle = y / sigma, middle / sigma
    most = y.abs().amax((1, 2), keepdim=True)
    middle = middle.masked_fill((middle.abs().amax(-1, keepdim=True) <= EPSILON * most) | ~there, 0.0)
    z, n = unit_rows(y), mask.sum(1, keepdim=True).double()
    to_all = torch.einsum("gnd,gd->gn", z, mean(z, mask)[:, 0].round()) * UNIT**-2  # whole numbers: exact
    alone = z.ne(0).any(-1).double()  # its cosine to itself
    g = ((alone - n * to_all) / (n - 1).clamp(min=1)).masked_fill(~mask, 0.0)
    if variant == "llava":
        low = g.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
        high = g.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        weight = (g - low) / (high - low + EPSILON)
    else:
        off = g[..., None] - mean(g[..., None], mask)
        weight = (off / (mean(off.square(), mask).sqrt() + EPSILON))[..., 0].sigmoid()
    return middle.float(), weight.float().masked_fill(~mask, 0.0)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Float64 [G, 1, c], over the tokens of each image, the same bits in whatever order they are added up.

    Args:
        values: float64 [G, N, c], finite.
        mask: bool [G, N].
    """
    inside = values.masked_fill(~mask[..., None], 0.0)
    step = inside.abs().amax(1, keepdim=True).clamp(min=TINY) * 2.0**-BITS
    return (inside / step).round().sum(1, keepdim=True) * step / mask.sum(1)[:, None, None]
