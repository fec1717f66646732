"""Folding: tokens that leave go into the most similar ones that stay."""

from __future__ import annotations

from dataclasses import replace

import torch

from vtc.methods.base import Reduction, marked, read_of
from vtc.ops import cosines_to, gathered, nearest
from vtc.ops.merging import ENTRIES, unit_rows
from vtc.tokens import VisualTokens


def folded(found: Reduction, tokens: VisualTokens) -> Reduction:
    """The same places with means: of what stands there and of all that leaves and is most similar to it (cosine).

    Newlines, and tokens without a direction, join and take nobody. A token counts as many as it stands for.

    Args:
        found: what stays, with its counts.
        tokens: what it was chosen from.
    """
    assert found.counts is not None
    x, n = tokens.features.detach(), tokens.mask.shape[1]
    place, turn = read_of(found.index, found.counts, n).sort(1)  # [G, K], ascending: ties go to the lowest index
    at, k = place.clamp(max=n - 1), place.shape[1]
    able = tokens.mask & tokens.where("image", "thumbnail", "crops", "frame") & (unit_rows(x) != 0).any(-1)
    joins, takes = able & ~marked(place, n), able.gather(1, at) & (place < n)
    group = torch.cat([nearest(like, joins[:, part], takes) for part, like in cosines_to(x, at)], 1)

    weight = torch.ones_like(x[..., :1], dtype=torch.double) if tokens.size is None else tokens.size[..., None].double()
    weighed = torch.cat([x.double() * weight, weight], -1)
    some = max(1, ENTRIES // max(1, n * k))  # images at a time
    parts = zip(weighed.split(some), group.split(some), strict=True)
    total = weighed.gather(1, at[..., None].expand(-1, -1, weighed.shape[-1]))
    total = total + torch.cat([gathered(values, to, k)[0] for values, to in parts])
    total = total.gather(1, turn.argsort(1)[..., None].expand_as(total))  # in the selector's order again
    features = (total[..., :-1] / total[..., -1:]).to(x)
    return replace(found, index=found.index[:, :k], features=features, size=total[..., -1].float())
