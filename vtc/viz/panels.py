"""Where on a picture each token of an image lies: one panel for each view that the model took of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vtc.tokens import Layout, Segment

STRIP = 32
"""Tokens in a row where the model does not tell its grid."""


@dataclass(frozen=True)
class Panel:
    """Tokens in rows and columns, which divide a picture evenly.

    Attributes:
        name: what the view is.
        rows: of cells.
        columns: of cells.
        tokens: index among the image's tokens, by (row, column).
        newlines: index of the newline token behind a row, by row.
        row_seams: where another crop begins, in (0, 1) from top to bottom of the picture.
        column_seams: the same from left to right.
        placed: False where the model does not tell its grid: the tokens are in order, but lie on no picture.
    """

    name: str
    rows: int
    columns: int
    tokens: Mapping[tuple[int, int], int]
    newlines: Mapping[int, int] = field(default_factory=dict)
    row_seams: tuple[float, ...] = ()
    column_seams: tuple[float, ...] = ()
    placed: bool = True


def panels(layout: Layout) -> list[Panel]:
    """One panel for each part of the layout that has tokens; newline tokens that stand alone lie nowhere.

    Raises:
        ValueError: a grid that does not have as many cells as its part has tokens.
    """
    found: list[Panel] = []
    frames = 0
    for segment in layout.segments:
        if segment.kind == "newline" or not segment.length:
            continue
        frames += segment.kind == "frame"
        name = f"frame {frames}" if segment.kind == "frame" else segment.kind
        found.append(_panel(segment, name))
    return found


def _panel(segment: Segment, name: str) -> Panel:
    n, start = segment.length, segment.start
    if segment.grid is None:
        columns = min(n, STRIP)
        tokens = {divmod(i, columns): start + i for i in range(n)}
        return Panel(f"{name}, no grid", -(-n // columns), columns, tokens, placed=False)
    rows, columns = segment.grid
    stride = columns + segment.newline
    if rows * stride != n:
        raise ValueError(f"{n} tokens do not fill a grid of {rows} x {stride}: {segment}")
    if segment.crops is not None:
        name = f"{name} {segment.crops[0]}x{segment.crops[1]}"
    return Panel(
        name,
        rows,
        columns,
        {(row, column): start + row * stride + column for row in range(rows) for column in range(columns)},
        {row: start + row * stride + columns for row in range(rows)} if segment.newline else {},
        _changes(segment.crop_rows),
        _changes(segment.crop_columns),
    )


def _changes(of: Sequence[int]) -> tuple[float, ...]:
    return tuple(i / len(of) for i in range(1, len(of)) if of[i] != of[i - 1])


def joined(tiles: Sequence[Panel], mosaic: tuple[int, int]) -> Panel:
    """Tiles of equal size, in raster order, as one panel of ``mosaic`` (rows, columns) of them."""
    high, wide = tiles[0].rows, tiles[0].columns
    tokens: dict[tuple[int, int], int] = {}
    for place, tile in enumerate(tiles):
        down, right = divmod(place, mosaic[1])
        tokens |= {(down * high + row, right * wide + column): i for (row, column), i in tile.tokens.items()}
    return Panel(
        f"{tiles[0].name} {mosaic[0]}x{mosaic[1]}",
        mosaic[0] * high,
        mosaic[1] * wide,
        tokens,
        row_seams=tuple(i / mosaic[0] for i in range(1, mosaic[0])),
        column_seams=tuple(i / mosaic[1] for i in range(1, mosaic[1])),
    )
