"""GlobalCom² with a count that is known beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from vtc.budget import count
from vtc.methods import Method, Stage
from vtc.methods.globalcom2 import GlobalCom2
from vtc.tokens import Layout, Region


@dataclass(frozen=True, kw_only=True)
class FixedGlobalCom2(GlobalCom2):
    """GlobalCom² whose integers add up to ``round(keep * n)``, n without newlines; not registered as a method.

    The method cuts each crop's share to an integer, so that an image keeps a few tokens more or less than ``keep``,
    depending on its content. vLLM has to know the number before it encodes. Here the same shares are met by the largest
    remainders: everything else, scores, claims and order, is inherited.
    """

    @classmethod
    def of(cls, method: Method) -> FixedGlobalCom2:
        """The same options."""
        return cls(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init})

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """As for any method."""
        return Method.counts(self, layouts, stage, given)

    def _budgets(
        self, regions: list[tuple[Region, ...]], keeps: list[float], shares: list[list[float]]
    ) -> list[tuple[int, ...]]:
        budgets = []
        for own, keep, commanded in zip(regions, keeps, shares, strict=True):
            sizes = [len(region.tokens) for region in own]
            total = count(self.keep, sum(sizes))
            claims = [
                (commanded[region.cell] if commanded and region.kind in ("crops", "frame") else keep) * size
                for region, size in zip(own, sizes, strict=True)
            ]
            budgets.append(divided(total, sizes, claims))
        return budgets


def divided(total: int, sizes: list[int], claims: list[float]) -> tuple[int, ...]:
    """Integers that add up to ``total``, each at most its size and near its claim.

    Claims are cut to integers; what is missing goes, one by one, to the largest remainders that have room, what is too
    much is taken from the smallest. Ties go to the first.
    """
    counts = [min(n, int(claim + 1e-9)) for n, claim in zip(sizes, claims, strict=True)]
    while sum(counts) != total:
        more = sum(counts) < total
        room = [i for i, (k, n) in enumerate(zip(counts, sizes, strict=True)) if (k < n if more else k > 0)]
        rest = {i: claims[i] - counts[i] for i in room}
        i = max(room, key=lambda i: (rest[i], -i)) if more else min(room, key=lambda i: (rest[i], i))
        counts[i] += 1 if more else -1
    return tuple(counts)
