"""Where each image's tokens are in a batch of prompts: plain host bookkeeping over the ids.

Transformers writes features into placeholder tokens in (batch, sequence) order; an image owns as many placeholders as
it has features, whether or not text or other images stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.signals import TowerSignal
from vtc.tokens import Layout


@dataclass(frozen=True)
class Encoded:
    """What the vision side said of the images of one modality, in encoder order.

    Attributes:
        layouts: one per entry.
        signals: what the vision tower was asked for, one float tensor [n] or [n, c] per entry.
        known: the layouts were told by what the encoder was called with, not only by the number of features.
        merge: how entries that follow each other without text between make one image, ``None`` if each is one.
        left: tokens of each entry that left inside the tower (host integers), ``None`` if that is not known.
    """

    layouts: tuple[Layout, ...]
    signals: Mapping[TowerSignal, Sequence[Tensor]] = field(default_factory=dict)
    merge: Callable[[Sequence[Layout]], Layout] | None = None
    known: bool = True
    left: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Located:
    """One image in the batch.

    Attributes:
        row: sample.
        columns: LongTensor [n] on the host, ascending.
        layout: structure of its n tokens.
        modality: ``image`` or ``video``.
        sources: its entries in the encoder's output, in order; empty if that is not known.
    """

    row: int
    columns: Tensor
    layout: Layout
    modality: str
    sources: tuple[int, ...]


def ordinals(images: Sequence[Located]) -> tuple[int, ...]:
    """Of each image its number inside its sample."""
    rows = [image.row for image in images]
    return tuple(rows[:g].count(row) for g, row in enumerate(rows))


def by_row(images: Sequence[Located], numbers: Sequence[int], batch: int) -> list[int]:
    """Of numbers of images the sums of the samples."""
    sums = [0] * batch
    for image, number in zip(images, numbers, strict=True):
        sums[image.row] += number
    return sums


def locate(placeholders: Mapping[str, Tensor], encoded: Mapping[str, Encoded]) -> list[Located]:
    """Find the images of a batch.

    Args:
        placeholders: by modality, bool [B, N] on the host: True at placeholder tokens.
        encoded: by modality, what the encoder produced. Beam search repeats every row; the encoder's output is then
            for the rows before that.

    Returns:
        The images by row, then by first column.
    """
    images = [
        image for modality, mask in placeholders.items() for image in _of_modality(modality, mask, encoded[modality])
    ]
    return sorted(images, key=lambda image: (image.row, int(image.columns[0])))


def _of_modality(modality: str, mask: Tensor, encoded: Encoded) -> list[Located]:
    counts = mask.sum(1).tolist()
    columns = mask.nonzero()[:, 1].split(counts)
    shares = _share(counts, [layout.length for layout in encoded.layouts])
    if shares is None:  # lengths that do not add up to the placeholders: an image is a run without text in it
        return [
            Located(row, run, Layout.plain(len(run)), modality, ())
            for row, own in enumerate(columns)
            for run in runs(own)
        ]
    images: list[Located] = []
    for row, (own, sources) in enumerate(zip(columns, shares, strict=True)):
        parts = own.split([encoded.layouts[s].length for s in sources])
        for group in _groups(sources, parts, encoded.merge is not None):
            layouts = [encoded.layouts[s] for s, _ in group]
            layout = layouts[0] if encoded.merge is None else encoded.merge(layouts)
            images.append(Located(row, torch.cat([p for _, p in group]), layout, modality, tuple(s for s, _ in group)))
    return images


def _groups(sources: Sequence[int], parts: Sequence[Tensor], merge: bool) -> list[list[tuple[int, Tensor]]]:
    """Entries that make one image each: alone, or (``merge``) with those that touch them."""
    groups: list[list[tuple[int, Tensor]]] = []
    for source, part in zip(sources, parts, strict=True):
        if merge and groups and groups[-1][-1][1][-1] + 1 == part[0]:
            groups[-1].append((source, part))
        else:
            groups.append([(source, part)])
    return groups


def _share(counts: list[int], lengths: list[int]) -> list[list[int]] | None:
    """Which images each row holds, or ``None`` when they do not fill the rows exactly."""
    total = sum(lengths)
    if not total or sum(counts) % total:
        return None
    repeats = sum(counts) // total
    if len(counts) % repeats:
        return None
    shares: list[list[int]] = []
    at = 0
    for row in range(0, len(counts), repeats):
        if len(set(counts[row : row + repeats])) != 1:
            return None
        own, filled = [], 0
        while filled < counts[row] and at < len(lengths):
            own.append(at)
            filled += lengths[at]
            at += 1
        if filled != counts[row]:
            return None
        shares += [own] * repeats
    return shares


def runs(columns: Tensor) -> list[Tensor]:
    """Ascending columns [n], cut where one is missing."""
    if not len(columns):
        return []
    gaps = (torch.diff(columns) > 1).nonzero()[:, 0] + 1
    return list(columns.tensor_split(gaps))
