"""Overlays: which pixels stay clear."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

from vtc.tokens import Layout, Segment
from vtc.viz import overlay

WHITE = (255, 255, 255)


def white(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), WHITE)


def clear_cells(picture: Image.Image, rows: int, columns: int, x0: int = 0, width: int | None = None) -> set[int]:
    """Cells whose middle is as bright as the white picture was."""
    width = width or picture.width
    found = set()
    for row in range(rows):
        for column in range(columns):
            at = (x0 + int((column + 0.5) * width / columns), int((row + 0.5) * picture.height / rows))
            if picture.getpixel(at) == WHITE:
                found.add(row * columns + column)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (24, 24), (1, 1)])
def test_exactly_the_kept_patches_are_clear(rows, columns):
    keep = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[: max(1, rows * columns // 3)]
    picture = white(96, 80)
    drawn = overlay(picture, keep, (rows, columns))
    assert clear_cells(drawn, rows, columns) == set(keep.tolist())
    assert picture.tobytes() == white(96, 80).tobytes()


def test_small_pictures_grow_by_whole_factors_and_large_ones_stay():
    assert overlay(white(96, 96), [0], (4, 4)).size == (480, 480)
    assert overlay(white(96, 60), [0], (4, 4)).size == (480, 300)
    assert overlay(white(700, 500), [0], (4, 4)).size == (700, 500)
    assert overlay(white(10, 10), [0], (4, 4), size=1).size == (30, 30)  # a patch can always be seen


def test_dropped_patches_keep_a_trace_of_the_picture():
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    drawn = overlay(picture, [0], (2, 2))
    red, green, _ = drawn.getpixel((360, 360))
    assert green < red < 120
    assert overlay(picture, [0], (2, 2), dim=1.0).getpixel((360, 360)) == (16, 18, 24)


def test_pick_order_is_coloured():
    drawn = overlay(white(96, 96), [5, 0], (4, 4), order=True)
    assert drawn.getpixel((180, 180)) == (253, 231, 37)
    assert drawn.getpixel((60, 60)) == (68, 1, 84)


def test_a_layout_gives_one_panel_for_each_view_and_skips_newlines():
    layout = Layout(4 + 9, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 9, (3, 2), newline=True)))
    drawn = overlay(white(96, 96), [1, 4, 6, 8], layout)  # 6 is a newline
    assert drawn.size == (480 + 12 + 480, 480)
    assert clear_cells(drawn, 2, 2, 0, 480) == {1}
    assert clear_cells(drawn, 3, 2, 492, 480) == {0, 3}
    frames = Layout(8, (Segment("frame", 0, 4, (2, 2)), Segment("frame", 4, 4, (2, 2))))
    drawn = overlay([white(480, 480), Image.new("RGB", (480, 480))], [0, 4], frames)
    assert drawn.getpixel((120, 120)) == WHITE
    assert drawn.getpixel((492 + 120, 120)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("keep", "grid", "words"),
    [
        ([4], (2, 2), ["4", "4 tokens"]),
        ([-1], (2, 2), ["-1"]),
        ([0], Layout.plain(4), ["grid"]),
        ([0], Layout(0, ()), ["grid"]),
    ],
)
def test_what_cannot_be_drawn_is_named(keep, grid, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        overlay(white(96, 96), keep, grid)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(ValueError, match="dim=2"):
        overlay(white(96, 96), [0], (2, 2), dim=2)
    with pytest.raises(ValueError, match="2 images for 1"):
        overlay([white(9, 9)] * 2, [0], (2, 2))


def test_without_pillow_the_import_works_and_drawing_says_what_to_install():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from vtc.viz import overlay\n"
        "try: overlay(None, [0], (1, 1))\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "visual-token-compression[viz]" in out
