"""The self-check of an engine: the first prompt with images is watched on its way through vLLM.

Where its tokens stand is compared with where an unpruned vLLM puts them: as our positions are written down, and once
more as they reach the language model, whichever runner and version of vLLM carried them. What differs ends the engine.
No vLLM in here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.values import shortened

logger = logging.getLogger("vllm.vtc")


@dataclass(frozen=True)
class Place:
    """One image of the pruned prompt.

    Attributes:
        start: of its first placeholder.
        kept: how many placeholders it has.
        whole: how many tokens it has unpruned.
    """

    start: int
    kept: int
    whole: int


def unpruned(ids: Sequence[int], places: Sequence[Place]) -> tuple[list[int], list[int]]:
    """The prompt with the placeholders of all tokens, and where each image then begins."""
    found: list[int] = []
    starts, at = [], 0
    for place in places:
        found += ids[at : place.start]
        starts.append(len(found))
        found += [ids[place.start]] * place.whole
        at = place.start + place.kept
    return [*found, *ids[at:]], starts


class Watch:
    """Of one model; what it is told is one prompt at a time, the latest.

    Args:
        rows: of positions that mean something, 3 with M-RoPE and 1 without.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.done = rows, False
        self._ids: list[int] = []
        self._places: list[Place] = []
        self._positions, self._following = torch.zeros(rows, 0, dtype=torch.long), 0
        self._window: Tensor | None = None
        self._last = False

    def prompt(self, ids: Sequence[int], places: Sequence[Place], positions: Tensor, following: int) -> None:
        """A prompt begins.

        Args:
            ids: with placeholders of kept tokens.
            places: of its images, in order; none: there is nothing to see.
            positions: LongTensor [rows, M] that an unpruned vLLM gives :func:`unpruned` of it.
            following: the position behind the prompt there.
        """
        self._ids, self._places, self._window = list(ids), list(places), None
        self._positions, self._following = positions[: self.rows].cpu(), following

    def chunk(self, ids: Sequence[int] | Tensor, now: Tensor, delta: int, delivered: int, start: int) -> None:
        """Positions of a prompt were written down for a chunk.

        Args:
            ids: of the prompt.
            now: LongTensor [3, N].
            delta: what is added to an index behind the prompt.
            delivered: how many image tokens the chunk holds.
            start: its first token.

        Raises:
            RuntimeError: they are not those of an unpruned vLLM.
        """
        if not self._places or not delivered or torch.as_tensor(ids).tolist() != self._ids:
            return
        now = now[: self.rows].cpu()
        images = [i for place in self._places for i in range(place.start, place.start + place.kept)]
        ours = [i for i in images if i >= start][:delivered]
        end = len(self._ids) if ours[-1] == images[-1] else ours[-1] + 1
        _, wholes = unpruned(self._ids, self._places)
        at = then = 0
        for place, whole in zip([*self._places, Place(len(self._ids), 0, 0)], [*wholes, None], strict=True):
            text = self._positions[:, then : then + place.start - at]
            self._same(now[:, at : place.start], text, at, max(at, start), min(place.start, end))
            if whole is not None:
                table = self._positions[:, whole : whole + place.whole]
                first, last = max(place.start, start), min(place.start + place.kept, end)
                self._ascending(now[:, first:last], table)
                at, then = place.start + place.kept, whole + place.whole
        if end == len(self._ids) and delta + end != self._following:
            raise _wrong(f"decoding goes on at {delta + end}", f"{self._following}")
        self._window, self._last = now[:, start : ours[-1] + 1], ours[-1] == images[-1]

    def _same(self, now: Tensor, text: Tensor, offset: int, first: int, last: int) -> None:
        now, text = now[:, first - offset : last - offset], text[:, first - offset : last - offset]
        if first < last and not now.equal(text):
            raise _wrong(f"text at {now.tolist()}", f"{text.tolist()}")

    def _ascending(self, now: Tensor, table: Tensor) -> None:
        known = {tuple(column): i for i, column in enumerate(table.T.tolist())}
        found = [known.get(tuple(column), -1) for column in now.T.tolist()]
        if -1 in found or found != sorted(set(found)):
            raise _wrong(f"an image's tokens at {now.tolist()}", f"{table.tolist()} for all of it")

    def forward(self, positions: Tensor) -> None:
        """The language model is about to run.

        Args:
            positions: LongTensor [T] or [rows or more, T] of all prompts in this step, one after the other.

        Raises:
            RuntimeError: those that were written down are not among them.
        """
        if self.done or not self._places:
            return
        seen = (positions[None] if positions.ndim == 1 else positions)[: self.rows].cpu()
        window, self._window = self._window, None
        if window is None:
            if (seen < 0).any():
                raise _wrong("image tokens without positions", "vLLM to ask for them: recompute_mrope_positions")
            return
        length = window.shape[1]  # up to the chunk's last image token
        if length > seen.shape[1] or not (seen.unfold(1, length, 1) == window[:, None]).all(dim=(0, 2)).any():
            raise _wrong(f"in the language model positions {seen.tolist()}", f"{window.tolist()} among them")
        if self._last:
            self.done = True
            self._told()

    def _told(self) -> None:
        before, after = sum(p.whole for p in self._places), sum(p.kept for p in self._places)
        logger.info("self-check passed: %d -> %d visual tokens, where an unpruned vLLM has them", before, after)
        self._ids, self._places = [], []


def _wrong(found: str, expected: str) -> RuntimeError:
    return RuntimeError(
        f"the self-check of vtc found {shortened(found)} where an unpruned vLLM has {shortened(expected)}: answers "
        "would be wrong, so this ends here. What would work: the version of vLLM that vtc is tested with"
    )
