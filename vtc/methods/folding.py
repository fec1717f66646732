"""Folding: tokens that leave go into the most similar ones that stay."""

from __future__ import annotations

from dataclasses import replace

import torch

from vtc.methods.base import Reduction
from vtc.ops import cosines, gathered, nearest
from vtc.tokens import VisualTokens, column


def folded(found: Reduction, tokens: VisualTokens) -> Reduction:
    """The same places with means: of what stands there and of all that leaves and is most similar to it (cosine).

    A token counts as many as it stands for, where something was merged before. Image by image, in float64.

    Args:
        found: who stays, with counts, as from ``Reduction.of_mask``: no index twice, even where it is not read.
        tokens: what it was chosen from.
    """
    assert found.counts is not None
    there = torch.arange(found.index.shape[1], device=found.index.device) < column(found.counts, found.index.device)
    weight = torch.ones_like(tokens.mask, dtype=torch.double) if tokens.size is None else tokens.size.double()
    features, sizes = [], []
    parts = (tokens.features.detach(), weight, tokens.mask, found.index, there)
    for x, w, mask, at, stays in zip(*(part.split(1) for part in parts), strict=True):
        x = x.double().masked_fill(~mask[..., None], 0.0)
        leaves = mask.scatter(1, at, mask.gather(1, at) & ~stays)
        kept = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        group = nearest(cosines(x, kept), leaves, stays)
        total, joined = (gathered(v, group, at.shape[1])[0] for v in (x * w[..., None], w[..., None]))
        own = w.gather(1, at)[..., None]
        features.append((kept * own + total) / (own + joined))
        sizes.append((own + joined)[..., 0])
    return replace(found, features=torch.cat(features).to(tokens.features.dtype), size=torch.cat(sizes).float())
