"""The structure of a picture, read off the numbers of its patches: plain arithmetic, against canvases laid by hand."""

import itertools

import pytest
import torch

from vtc_llava.layouts import layout
from vtc_llava.pictures import Picture

SIDE = 4
EACH = SIDE * SIDE


def picture(number, tiles, exact=True):
    number = torch.tensor(number)
    return Picture(0, torch.arange(len(number)), 0, tiles, 0, number, exact)


def canvas(down, across):
    """[rows, columns] of (tile, patch), the thumbnail being tile 0."""
    rows = range(down * SIDE)
    return [
        [(1 + (y // SIDE) * across + x // SIDE) * EACH + (y % SIDE) * SIDE + x % SIDE for x in range(across * SIDE)]
        for y in rows
    ]


@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize(("down", "across"), [c for c in itertools.product((1, 2, 3), repeat=2) if c != (1, 1)])
def test_mosaics_that_lost_rows_or_columns(down, across, newline):
    for side, most in (("y", down), ("x", across)):
        for cut in range(2 * most):
            whole = canvas(down, across)
            rows = whole[cut : len(whole) - cut] if side == "y" else [row[cut : len(row) - cut] for row in whole]
            columns = len(rows[0])
            number = [*range(EACH), *(n for row in rows for n in [*row, *[-1] * newline])]
            found = layout(picture(number, 1 + down * across), EACH, flat=False, video=False)
            if not newline and len(rows) == 1:
                assert found is None  # one row of patches without an end: nothing tells it from another build
                continue
            thumbnail, crops = found.segments
            assert (thumbnail.kind, thumbnail.length, thumbnail.grid) == ("thumbnail", EACH, (SIDE, SIDE))
            assert (crops.kind, crops.grid, crops.newline) == ("crops", (len(rows), columns), newline)
            tile_rows = tuple(row[0] // EACH - 1 for row in rows)
            tile_rows = tuple(tile // across for tile in tile_rows)
            tile_columns = tuple((n // EACH - 1) % across for n in rows[0])
            told = (crops.crops, crops.crop_rows, crops.crop_columns)
            one_crop_row_and_column = len(rows) == SIDE and columns % SIDE == 0 and columns // SIDE < down * across
            if told[0] is None:  # square, and an odd number of crops in a row or column: two mosaics fit
                assert one_crop_row_and_column
            else:
                assert told == ((down, across), tile_rows, tile_columns)


def test_two_mosaics_may_fit():
    middle = [n for row in canvas(3, 1)[SIDE : 2 * SIDE] for n in [*row, -1]]
    other = [n for row in canvas(1, 3) for n in [*row[SIDE : 2 * SIDE], -1]]
    assert middle == other
    found = layout(picture([*range(EACH), *middle], 4), EACH, flat=False, video=False)
    assert found.segments[1].crops is None
    assert found.segments[1].grid == (SIDE, SIDE)


def test_tiles_in_a_row_are_no_mosaic():
    """`mm_patch_merge_type="flat"`: whether they are crops or frames, nobody says."""
    number = [*range(5 * EACH)]
    found = layout(picture(number, 5), EACH, flat=True, video=False)
    assert [s.kind for s in found.segments] == ["image"]
    assert found.segments[0].grid is None


@pytest.mark.parametrize("wrong", ["shuffled", "cut", "ragged"])
def test_what_makes_no_structure_is_none(wrong):
    rows = canvas(2, 2)
    if wrong == "shuffled":
        rows[1], rows[5] = rows[5], rows[1]
    number = [*range(EACH), *(n for row in rows for n in [*row, -1])]
    if wrong == "cut":  # tokenizer_model_max_length
        number = number[:-3]
    elif wrong == "ragged":
        del number[EACH + 3]
    assert layout(picture(number, 5), EACH, flat=False, video=False) is None
    assert layout(picture(number[: EACH - 2], 1), EACH, flat=False, video=False) is None


def test_interpolated_crops_have_a_grid_and_no_mosaic():
    number = [*range(EACH), *[EACH + 3, EACH + 7, -1] * 2]
    found = layout(picture(number, 5, exact=False), EACH, flat=False, video=False)
    assert [s.kind for s in found.segments] == ["thumbnail", "crops"]
    assert (found.segments[1].grid, found.segments[1].crops) == ((2, 2), None)
    assert found.newlines() == [EACH + 2, EACH + 5]
