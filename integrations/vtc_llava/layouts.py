"""The structure of a picture's tokens: thumbnail, mosaic of crops, newlines, frames. Plain arithmetic on numbers.

Nothing of the configuration is computed again (best resolution, unpadding): where each patch went is read off.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from vtc.models.base import square
from vtc.tokens import Layout, Segment
from vtc_llava.pictures import Picture


def layout(picture: Picture, each: int, *, flat: bool, video: bool) -> Layout | None:
    """The layout of a picture, ``None`` where its numbers make no structure that is known.

    Args:
        picture: of which numbers came back.
        each: tokens of a tile.
        flat: tiles follow each other as they are.
        video: tiles are frames.
    """
    number = picture.number
    if video:
        return _frames(number, each)
    if picture.tiles == 1:
        return _one(number, each) if picture.exact else None
    if flat:
        return Layout.plain(len(number))
    thumbnail = Segment("thumbnail", 0, each, square(each))
    if len(number) < each or not torch.equal(number[:each], torch.arange(each)):
        return None
    crops = _mosaic(number[each:], each, picture)
    return None if crops is None else Layout(len(number), (thumbnail, crops))


def _one(number: Tensor, each: int) -> Layout | None:
    """A picture of one tile, perhaps with a newline at its end."""
    if not torch.equal(number[:each], torch.arange(each)):
        return None
    picture = Segment("image", 0, each, square(each))
    behind = len(number) - each
    return Layout(len(number), (picture, Segment("newline", each, behind)) if behind else (picture,))


def _frames(number: Tensor, each: int) -> Layout | None:
    """Frames in order, with newlines in their rows, between them, at the end, or nowhere."""
    tile = number // each  # -1 at newlines
    rows = [(key, len([*run])) for key, run in groupby(tile.tolist())]
    segments: list[Segment] = []
    at = 0
    for frame, lines in _of_frames(rows):
        columns, count = lines[0], len(lines)
        in_rows = count > 1 and len(set(lines)) == 1 and all(newline == 1 for newline in frame)
        if in_rows:
            segments.append(Segment("frame", at, count * (columns + 1), (count, columns), True))
        elif count == 1:
            segments.append(Segment("frame", at, columns, square(columns)))
            if frame[0]:
                segments.append(Segment("newline", at + columns, frame[0]))
        else:
            return None
        at += sum(lines) + sum(frame)
    return Layout(at, tuple(segments)) if at == len(number) else None


def _of_frames(rows: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """For each frame the lengths of its newlines, and of the runs of patches before them."""
    found: list[tuple[list[int], list[int]]] = []
    before = None
    for tile, length in rows:
        if tile < 0:
            if found:
                found[-1][0][-1] = length
        elif tile == before:
            found[-1][0].append(0)
            found[-1][1].append(length)
        else:
            found.append(([0], [length]))
            before = tile
    return found


def _mosaic(number: Tensor, each: int, picture: Picture) -> Segment | None:
    """The crops behind a thumbnail, row by row, with a newline after each row or without."""
    newlines = (number < 0).nonzero()[:, 0]
    columns = int(newlines[0]) if len(newlines) else _row_length(number, each)
    width = columns + bool(len(newlines))
    if not columns or len(number) % width:
        return None
    rows = number.reshape(-1, width)
    if len(newlines) and not ((rows[:, -1] < 0).all() and (rows[:, :-1] >= 0).all()):
        return None
    rows, start = rows[:, :columns], each
    crop_rows, crop_columns, mosaic = (), (), None
    if picture.exact:
        found = _crops(rows - each, each, picture.tiles - 1)
        if found is None:
            return None
        mosaic, crop_rows, crop_columns = found
    grid = (len(rows), columns)
    return Segment("crops", start, len(number), grid, bool(len(newlines)), mosaic, crop_rows, crop_columns)


def _row_length(number: Tensor, each: int) -> int:
    """Columns of a mosaic without newlines: a row ends where the row inside the crops changes. 0 if it never does."""
    side = square(each)
    if side is None:
        return 0
    row = number % each // side[1]
    other = (row != row[:1]).nonzero()[:, 0]
    return int(other[0]) if len(other) else 0


def _crops(number: Tensor, each: int, count: int) -> tuple | None:
    """The mosaic's (rows, columns), and the row and column of the crop for each row and column of patches.

    Unpadding cuts rows or columns away, never both, so that whole rows or columns of crops may be out of sight. Where
    what is left fits two mosaics, there is none to tell (``None``, and no rows and columns).

    Args:
        number: LongTensor [rows, columns], of each patch, counted from the first of the first crop.
        each: patches of a crop.
        count: crops of the mosaic.

    Returns:
        ``None`` where the patches make no mosaic.
    """
    side = square(each)
    if side is None:
        return None
    crop = number // each
    down, across = crop[:, 0].unique(), crop[0].unique()
    if len(down) > 1:
        fits = {int(down[1] - down[0])}
    else:  # one row of crops: all columns are there, or all rows
        fits = {len(across)} if crop.shape[1] == len(across) * side[1] else set()
        fits |= {count} if crop.shape[0] == side[0] else set()
    fits = {columns for columns in fits if columns and count % columns == 0}
    if len(fits) != 1:
        return (None, (), ()) if fits else None
    (columns,) = fits
    y, x = crop // columns * side[0] + number % each // side[1], crop % columns * side[1] + number % side[1]
    down, across = y[0, 0] + torch.arange(len(y)), x[0, 0] + torch.arange(x.shape[1])
    if not (y == down[:, None]).all() or not (x == across).all():
        return None
    return (count // columns, columns), tuple((down // side[0]).tolist()), tuple((across // side[1]).tolist())
