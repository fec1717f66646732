"""The forward pass of the original code, which is older than the words that transformers calls it with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vtc.dialect.arguments import CACHE, EMBEDS, Spelling


def mended(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap it, so that ``generate`` can hand it the cache; the signature stays, since ``generate`` reads it.

    From 5.24 on transformers calls the cache by a name that the original code does not know. Whoever drops it instead
    generates from one token at a time, and gets wrong text without a message.
    """
    spelling = Spelling(forward, "the forward pass of the original LLaVA code", (CACHE, EMBEDS))

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = spelling.bind((), kwargs)
        if (cache := given[CACHE]) is not None:
            given[CACHE] = cache  # under the name that it knows
        if spelling.extra is None:  # what says nothing may be left out; of anything else Python complains, rightly
            known = spelling.parameters
            given.named = {name: v for name, v in given.named.items() if v is not None or name in known}
        whole = spelling.bind(args, given.named)
        if whole[EMBEDS] is not None and whole.named.get("images") is not None:
            raise ValueError(
                "embeddings and images were given together: the original LLaVA code would ignore the images. Give "
                "token ids and images, or embeddings alone"
            )
        return forward(*args, **given.named)

    return call
