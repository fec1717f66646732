"""Which columns of an embedded prompt are which picture, from the numbers that came back in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.engine.locate import runs
from vtc_llava.probe import Numbers


@dataclass(frozen=True)
class Picture:
    """One picture (or video) where it stands in a prompt.

    Attributes:
        row: sample.
        columns: LongTensor [n], consecutive.
        entry: which entry of ``images`` it is, ``None`` if that is not known.
        tiles: how many tiles that has.
        first: its first tile.
        number: LongTensor [n], as :class:`Numbers` has it, counted from its own first token; -1 at newlines.
        exact: every column is one patch, or a newline.
    """

    row: int
    columns: Tensor
    entry: int | None
    tiles: int
    first: int
    number: Tensor
    exact: bool


def tile_counts(images: Any) -> list[int] | None:
    """Tiles of each entry of what the caller gave for images, ``None`` where that cannot be told."""
    if isinstance(images, Tensor) and images.dim() == 4:
        return [1] * len(images)
    if isinstance(images, (Tensor, list, tuple)) and all(isinstance(one, Tensor) for one in images):
        return [len(one) if one.dim() == 4 else 1 for one in images]
    return None


def find(visual: Tensor, numbers: Numbers, counts: Sequence[int], each: int) -> list[Picture]:
    """The pictures of a prompt, by row and column.

    Text between two pictures need not be there, and an entry may stand in a prompt twice.

    Args:
        visual: bool [B, N] on the host: columns that are neither text nor padding.
        numbers: of its columns.
        counts: tiles of each entry of ``images``.
        each: tokens of a tile.
    """
    ends = torch.tensor(counts).cumsum(0)
    found = []
    for row, where in enumerate(visual):
        for run in runs(where.nonzero()[:, 0]):
            number, patch, exact = (x[row, run] for x in (numbers.number, numbers.patch, numbers.exact))
            # a newline goes with the patch before it; in front of the first patch there is none
            last = torch.where(patch, torch.arange(len(run)), patch.int().argmax()).cummax(0).values
            entry = torch.searchsorted(ends, number[last] // each, right=True)
            first = (ends - torch.tensor(counts))[entry]
            begins = exact & (number == first * each)
            begins[0] = True
            begins[1:] |= entry[1:] != entry[:-1]
            starts = begins.nonzero()[:, 0].tolist()
            for start, stop in zip(starts, [*starts[1:], len(run)], strict=True):
                of, tile = int(entry[start]), int(first[start])
                part = slice(start, stop)
                own = (number[part] - tile * each).masked_fill(~patch[part], -1)
                alone = bool((exact | ~patch)[part].all())
                found.append(Picture(row, run[part], of, counts[of], tile, own, alone))
    return found


def find_by_text(visual: Tensor, expected: Sequence[int]) -> list[Picture]:
    """The same where no numbers came back: a picture is a run of columns without text in it.

    Args:
        visual: bool [B, N] on the host.
        expected: pictures that the ids of each row ask for.

    Raises:
        ValueError: pictures stand side by side, and nothing tells where one ends.
    """
    found = []
    for row, where in enumerate(visual):
        parts = runs(where.nonzero()[:, 0])
        if len(parts) != expected[row]:
            raise ValueError(
                f"row {row} asks for {expected[row]} pictures, and its visual tokens stand in {len(parts)} runs: this "
                "model does not encode through encode_images, so that nothing tells where one picture ends and the "
                "next begins. Put text between them"
            )
        found += [Picture(row, part, None, 0, 0, torch.full_like(part, -1), False) for part in parts]
    return found
