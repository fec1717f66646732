"""A processor's own budget beside pruning: fewer pixels spare the vision tower its work too, and need no method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vtc.feed import Feed, Picture
from vtc.methods import Method
from vtc.models import Adapter, Parts
from vtc.profiling.feed import feed_of

HALF = 0.55
"""At most this share of the visual tokens counts as half of them: tiles and rows come whole."""


@dataclass(frozen=True)
class Way:
    """One way to about half the visual tokens.

    Attributes:
        words: how it is asked for.
        tokens: visual tokens that the language model starts with.
        ttft_ratio: FLOPs to the first token, unpruned over this, vision tower and projector included.
        seconds: floor of the time to the first token.
    """

    words: str
    tokens: int
    ttft_ratio: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.words}: {self.tokens} tokens, {1e3 * self.seconds:.3g} ms, {self.ttft_ratio:.2f}x"


def smaller_feed(
    adapter: Adapter, parts: Parts, picture: Picture, settings: Mapping[str, Any], tokens: int
) -> tuple[str, Feed] | None:
    """The largest budget of the processor that leaves about half of ``tokens``, in words, and what it makes of a
    picture; ``None`` where the processor has no such budget.
    """
    if picture.frames is not None:
        return None
    for words, changed in adapter.budgets(parts, picture, settings):
        feed = feed_of(parts, picture, {**settings, **changed})
        if sum(feed.lengths) <= HALF * tokens:
            return words, feed
    return None


def half_kept(method: Method) -> Method | None:
    """The same method with ``keep=0.5``; ``None`` where it looks at no ``keep`` of its own."""
    if not method.reads_keep or "keep" not in {field.name for field in fields(method)}:
        return None
    return replace(method, keep=0.5)
