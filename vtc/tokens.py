"""What a method sees: the visual tokens of some images, never a model.

A :class:`VisualTokens` holds the tokens of G images side by side, padded to the longest, as they stand at one place of
the model. A :class:`Layout` says what each token of one image is: part of a thumbnail, of the mosaic of crops, of a
video frame, or a newline the model inserted at the end of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["image", "thumbnail", "crops", "frame", "newline"]


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one image that share a grid.

    Attributes:
        kind: ``image`` (the whole picture), ``thumbnail`` (a reduced view beside crops), ``crops`` (the mosaic of
            high-resolution crops in raster order), ``frame`` (one video frame) or ``newline`` (separator tokens).
        start: index of the first token among the image's tokens.
        length: number of tokens, newlines included.
        grid: (rows, columns) of the patches, newlines not counted; ``None`` where the model does not tell.
        newline: every row is followed by one newline token, which is then counted in ``length``.
        crops: of ``crops``, the (rows, columns) of the mosaic of crops, where the model tells.
        crop_rows: of ``crops``, the row of the mosaic that each row of ``grid`` belongs to, ascending; where padding
            was cut off, some rows of the mosaic may have lost theirs.
        crop_columns: the same for columns.
    """

    kind: Kind
    start: int
    length: int
    grid: tuple[int, int] | None = None
    newline: bool = False
    crops: tuple[int, int] | None = None
    crop_rows: tuple[int, ...] = ()
    crop_columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.crops is not None and (len(self.crop_rows), len(self.crop_columns)) != self.grid:
            raise ValueError(
                f"crop_rows and crop_columns name {len(self.crop_rows)} rows and {len(self.crop_columns)} columns "
                f"of a grid of {self.grid}"
            )

    @property
    def stop(self) -> int:
        """Index after the last token."""
        return self.start + self.length

    def newlines(self) -> list[int]:
        """Indices, among the image's tokens, of the newline tokens of this segment."""
        if self.kind == "newline":
            return list(range(self.start, self.stop))
        if not self.newline or self.grid is None:
            return []
        columns = self.grid[1]
        return list(range(self.start + columns, self.stop, columns + 1))


@dataclass(frozen=True)
class Layout:
    """The structure of one image's tokens, as host integers: ``segments`` cover ``[0, length)`` in order."""

    length: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        at = 0
        for segment in self.segments:
            if segment.start != at:
                raise ValueError(f"segment {segment} starts at {segment.start}, the one before it ends at {at}")
            at = segment.stop
        if at != self.length:
            raise ValueError(f"segments cover {at} tokens of {self.length}")

    @classmethod
    def plain(cls, length: int, grid: tuple[int, int] | None = None) -> Layout:
        """One picture without structure, or with the (rows, columns) of its patches."""
        return cls(length, (Segment("image", 0, length, grid),))

    def newlines(self) -> list[int]:
        """Ascending indices of all newline tokens."""
        return [i for segment in self.segments for i in segment.newlines()]

    def without_newlines(self) -> Layout:
        """The layout of the tokens that remain when all newline tokens are taken out."""
        segments: list[Segment] = []
        at = 0
        for segment in self.segments:
            length = segment.length - len(segment.newlines())
            if segment.kind != "newline":
                segments.append(replace(segment, start=at, length=length, newline=False))
                at += length
        return Layout(at, tuple(segments))

    def regions(self) -> tuple[Region, ...]:
        """The thumbnail, each crop with tokens, each frame, or else the whole; newline tokens belong to no region.

        In the order of their first tokens.
        """
        return _regions(self)

    def of_kind(self, kind: Kind) -> tuple[Segment, ...]:
        """The segments of this kind, in order."""
        return tuple(segment for segment in self.segments if segment.kind == kind)


@dataclass(frozen=True)
class Region:
    """Some tokens of one image that have a budget of their own.

    Attributes:
        kind: of the segment they come from.
        tokens: their indices among the image's tokens, ascending.
        layout: their structure.
        cell: of a crop, its number in the raster order of the mosaic; of a frame, its number.
        mosaic: of a crop, the (rows, columns) of crops.
    """

    kind: Kind
    tokens: tuple[int, ...]
    layout: Layout
    cell: int = 0
    mosaic: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of its tokens; one row where the model does not tell."""
        grid = self.layout.segments[0].grid if len(self.layout.segments) == 1 else None
        return grid or (1, len(self.tokens))


@functools.lru_cache(maxsize=256)
def _regions(layout: Layout) -> tuple[Region, ...]:
    found: list[Region] = []
    frames = 0
    for segment in layout.segments:
        if segment.kind == "newline":
            continue
        newlines = set(segment.newlines())
        own = [i for i in range(segment.start, segment.stop) if i not in newlines]
        if segment.kind == "crops" and segment.crops is not None:
            found += _crops(segment, own)
            continue
        whole = Layout(len(own), (Segment(segment.kind, 0, len(own), segment.grid),))
        found.append(Region(segment.kind, tuple(own), whole, frames if segment.kind == "frame" else 0))
        frames += segment.kind == "frame"
    return tuple(found)


def _crops(segment: Segment, own: list[int]) -> list[Region]:
    assert segment.crops is not None
    columns = len(segment.crop_columns)
    crops = []
    for cell in range(segment.crops[0] * segment.crops[1]):
        row, column = divmod(cell, segment.crops[1])
        rows = [i for i, r in enumerate(segment.crop_rows) if r == row]
        cols = [j for j, c in enumerate(segment.crop_columns) if c == column]
        if rows and cols:
            tokens = tuple(own[i * columns + j] for i in rows for j in cols)
            whole = Layout(len(tokens), (Segment("crops", 0, len(tokens), (len(rows), len(cols))),))
            crops.append(Region("crops", tokens, whole, cell, segment.crops))
    return crops


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of G images at one place of the model: what a method sees.

    Attributes:
        features: [G, N, d], any float dtype, as they stand at the place; rows that are not in :attr:`mask` (padding, or
            tokens that left before) have unspecified content.
        layouts: one per image, as it was encoded: index n means the same token at every place. ``layouts[g].length`` is
            the number of its tokens (host integers, so that budgets are known without waiting for the device).
        ordinals: index of each image inside its sample. A method that draws random numbers seeds them with it, and
            with nothing that depends on the rest of the batch.
        signals: what the stage asked for, by :attr:`vtc.signals.Signal.key`: per token [G, N] or [G, N, c] (0 outside
            of the mask), per image [G].
        axes: of signals where that is not so, the axis of the tokens, or ``None`` if there is none.
        samples: sample of each image; some decisions are made for a whole sample.
        alive: bool [G, N], tokens that are still there; ``None``: all that the layouts count.
        alive_counts: how many those are (host integers), ``None`` with ``alive``.
        entered: how many there were before the method's first stage, which published schedules refer to; ``None``: as
            many as now.
        size: float32 [G, N], how many tokens a place stands for after merging; ``None``: one each.
    """

    features: Tensor
    layouts: tuple[Layout, ...]
    ordinals: tuple[int, ...]
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, int | None] = field(default_factory=dict)
    samples: tuple[int, ...] = ()
    alive: Tensor | None = None
    alive_counts: tuple[int, ...] | None = None
    entered: tuple[int, ...] | None = None
    size: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image as it was encoded."""
        return tuple(layout.length for layout in self.layouts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each image that are there (host integers)."""
        return self.lengths if self.alive_counts is None else self.alive_counts

    @property
    def given(self) -> tuple[int, ...]:
        """Tokens of each image before the method's first stage (host integers)."""
        return self.counts if self.entered is None else self.entered

    @property
    def mask(self) -> Tensor:
        """Bool [G, N]: True where there is a token, False where there is padding or one has left."""
        if self.alive is not None:
            return self.alive
        device = self.features.device
        return torch.arange(self.features.shape[1], device=device) < column(self.lengths, device)

    def where(self, *kinds: Kind) -> Tensor:
        """Bool [G, N]: True for the tokens inside segments of these kinds, newline tokens left out.

        By the layouts alone: tokens that left are among them.
        """
        rows = torch.zeros(self.features.shape[:2], dtype=torch.bool)
        for g, layout in enumerate(self.layouts):
            for segment in layout.segments:
                if segment.kind in kinds:
                    rows[g, segment.start : segment.stop] = True
            if newlines := layout.newlines():
                rows[g, newlines] = False
        return rows.to(self.features.device, non_blocking=True)

    def split(self, regions: Sequence[Sequence[Region]]) -> tuple[VisualTokens, Tensor]:
        """Parts of the images, each as an image of its own.

        Args:
            regions: of each image. All tokens must still be there.

        Returns:
            The R regions, and LongTensor [R, M]: where each token stands in ``features`` flattened to [G * N, d] (G * N
            for padding). A region's ordinal is different from that of every other region and image of the sample.
        """
        n = self.features.shape[1]
        every = [(g, region) for g, of_image in enumerate(regions) for region in of_image]
        place = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(region.tokens, dtype=torch.long) + g * n for g, region in every],
            batch_first=True,
            padding_value=len(self.layouts) * n,
        ).to(self.features.device, non_blocking=True)
        inside = place.clamp(max=len(self.layouts) * n - 1)
        pieces = VisualTokens(
            self.features.flatten(0, 1)[inside],
            tuple(region.layout for _, region in every),
            tuple(self.ordinals[g] + (at << 20) for g, of_image in enumerate(regions) for at in range(len(of_image))),
            axes=self.axes,
            samples=tuple(self.samples[g] for g, _ in every) if self.samples else (),
        )
        rows = torch.tensor([g for g, _ in every]).to(place.device, non_blocking=True)
        within = inside - rows[:, None] * n

        def cut(name: str, signal: Tensor) -> Tensor:
            return _columns(signal[rows], within.clamp(0, n - 1), pieces.mask, self.axis(name))

        return replace(pieces, signals={name: cut(name, s) for name, s in self.signals.items()}), place

    def without_newlines(self) -> tuple[VisualTokens, Tensor]:
        """The same images with their newline tokens taken out.

        Returns:
            The remaining tokens, and LongTensor [G, M]: where each of them stood (0 for padding).
        """
        layouts = tuple(layout.without_newlines() for layout in self.layouts)
        index = torch.zeros(len(layouts), max([0, *(layout.length for layout in layouts)]), dtype=torch.long)
        for g, layout in enumerate(self.layouts):
            newlines = set(layout.newlines())
            stays = [i for i in range(layout.length) if i not in newlines]
            index[g, : len(stays)] = torch.tensor(stays, dtype=torch.long)
        index = index.to(self.features.device, non_blocking=True)
        spared = [n - bare.length for n, bare in zip(self.lengths, layouts, strict=True)]

        def fewer(counts: tuple[int, ...] | None) -> tuple[int, ...] | None:
            return None if counts is None else tuple(max(0, n - s) for n, s in zip(counts, spared, strict=True))

        ends = column([layout.length for layout in layouts], index.device)
        there = torch.arange(index.shape[1], device=index.device) < ends
        bare = replace(
            self,
            features=_columns(self.features, index, None),
            layouts=layouts,
            signals={name: _columns(s, index, there, self.axis(name)) for name, s in self.signals.items()},
            alive=None if self.alive is None else self.alive.gather(1, index) & there,
            alive_counts=fewer(self.alive_counts),
            entered=fewer(self.entered),
            size=None if self.size is None else self.size.gather(1, index),
        )
        return bare, index

    def with_signals_cleared(self) -> VisualTokens:
        """The same with signals 0 wherever there is no token."""
        gone = ~self.mask

        def cleared(name: str, signal: Tensor) -> Tensor:
            if (axis := self.axis(name)) is None:
                return signal
            shape = [1] * signal.dim()
            shape[0], shape[axis] = gone.shape
            return signal.masked_fill(gone.view(shape), 0)

        return replace(self, signals={name: cleared(name, signal) for name, signal in self.signals.items()})

    def axis(self, signal: str) -> int | None:
        """Which axis of a signal is that of the tokens; ``None``: it has none."""
        return self.axes.get(signal, 1 if self.signals[signal].dim() > 1 else None)


def _columns(tensor: Tensor, index: Tensor, there: Tensor | None, axis: int | None = 1) -> Tensor:
    """The tokens LongTensor [G, M] along an axis of [G, ...]; 0 where bool [G, M] ``there`` is False."""
    if axis is None:
        return tensor
    moved = tensor.movedim(axis, 1)
    shape = (*index.shape, *(1,) * (moved.dim() - 2))
    moved = moved.gather(1, index.view(shape).expand(-1, -1, *moved.shape[2:]))
    if there is not None:
        moved = moved.masked_fill(~there.view(shape), 0)
    return moved.movedim(1, axis)


def column(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as LongTensor [G, 1]; nothing is copied where all are equal, so that a CUDA graph can hold it."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers), 1), numbers[0], device=device)
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)[:, None]
