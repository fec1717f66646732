"""In which order a method picked its tokens.

The engine keeps sets, not orders: a method's picks are turned into a mask at once, and nothing of the prompt is held.
So the order is found again afterwards: :func:`recording_picks` remembers what the method saw of the last prompt, for
as long as its block lasts, and the method is asked once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from vtc.engine.context import recording_tokens
from vtc.methods import Method
from vtc.methods.chain import Chain
from vtc.tokens import VisualTokens

if TYPE_CHECKING:
    from vtc.patching import Patch


@dataclass
class Picks:
    """What :func:`recording_picks` remembers: ``seen`` holds the visual tokens of the last prompt, or nothing."""

    seen: list[VisualTokens] = field(default_factory=list)

    def order(self, handle: Patch) -> list[list[Tensor | None]]:
        """The picks before the language model, in the order in which the method made them.

        Args:
            handle: of the patched model that the prompt went through.

        Returns:
            Over samples, over images: LongTensor on the host, a permutation of what the first entry of
            ``handle.last_stages`` keeps, without newline tokens that stayed unasked (``newlines="keep"``). ``None``
            where there is no such order: nothing was dropped there, budgets were shared out over parts of the image
            (``allocate``, ``globalcom2``), or the method would choose otherwise if asked again.

        Raises:
            ValueError: no prompt with images was seen, or it was not the last one of this handle.
        """
        last = handle.stage.last
        if last is None or not self.seen:
            raise ValueError("no pick order: run a prompt with an image through the patched model inside the block")
        tokens = self.seen[-1]
        if tokens.layouts != tuple(image.layout for image in last.plan.images):
            raise ValueError("the prompt seen last is not the last one of this handle: end the block right behind it")
        found = _asked_again(handle.method, tokens)
        samples: list[list[Tensor | None]] = [[] for _ in last.lengths]
        kept = last.kept()[0][1]
        for g, image in enumerate(last.plan.images):
            own = kept[image.row][len(samples[image.row])]
            order = None if found is None else found[g]
            unasked = set(image.layout.newlines()) if handle.method.newlines == "keep" else set()
            same = order is not None and sorted(order.tolist()) == sorted(set(own.tolist()) - unasked)
            samples[image.row].append(order if same else None)
        return samples


@contextmanager
def recording_picks() -> Iterator[Picks]:
    """Remember what a method sees, so that its pick order can be told.

    Holds the visual features of the last prompt, of any patched model in this thread, until the result is forgotten.
    Nothing is remembered outside of such a block.
    """
    with recording_tokens() as seen:
        yield Picks(seen)


def _asked_again(method: Method, tokens: VisualTokens) -> list[Tensor] | None:
    """Picks of each image, in order; ``None`` where ``select`` does not decide for whole images."""
    while isinstance(method, Chain):
        method = method.first
    if type(method).choose is not Method.choose:
        return None
    index = None
    if method.newlines == "keep":
        tokens, index = tokens.without_newlines()
    budget = method.budget(tokens)
    if budget == tokens.lengths:
        return None
    picks = method.select(tokens, budget)
    if index is not None:
        picks = index.gather(1, picks)
    return [row[:k].cpu() for row, k in zip(picks, budget, strict=True)]
