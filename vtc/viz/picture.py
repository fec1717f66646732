"""The kept tokens of an image, shown over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtc.tokens import Layout, Segment

if TYPE_CHECKING:
    from PIL.Image import Image

_SHADE = (16, 18, 24)  # what dropped patches sink into
_ACCENT = (255, 196, 61)  # the outline of what stays
_ORDER = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))  # first pick to last
_GRID = (140, 144, 152, 80)
_GAP = 12  # between panels
_LEAST_CELL = 6  # pixels


def overlay(
    image: Image | Sequence[Image],
    keep: Tensor | Sequence[int],
    grid: tuple[int, int] | Layout,
    *,
    size: int = 480,
    order: bool = False,
    dim: float = 0.65,
) -> Image:
    """Draw which patches stay: dropped ones dimmed and grey, kept ones clear and outlined, a thin grid over all.

    Args:
        image: the picture as the processor cut it (a centre crop, if it takes one), or one for each video frame.
        keep: indices of the kept tokens of this image, as in ``p.last_keep[sample][image]``; newline tokens among
            them are not drawn.
        grid: (rows, columns) of the patches, or the image's layout. A layout of several views (thumbnail and crops,
            frames) gives one panel each, side by side.
        size: small pictures are enlarged, by whole factors and without smoothing, until the longer side has at least
            this many pixels; large ones are left as they are.
        order: ``keep`` is in pick order: put a dot on each kept patch, from yellow (first) to violet (last).
        dim: how far dropped patches sink into the dark, 0 to 1.

    Returns:
        A new RGB image.

    Raises:
        ImportError: Pillow is missing.
        ValueError: an index outside the grid, a layout without grids, a number of images that does not fit.
    """
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise ImportError(
            'vtc.viz draws with Pillow, which is missing: pip install "visual-token-compression[viz]"'
        ) from error

    layout = grid if isinstance(grid, Layout) else Layout.plain(grid[0] * grid[1], (grid[0], grid[1]))
    picks: list[int] = [int(i) for i in (keep.tolist() if isinstance(keep, Tensor) else keep)]
    if wrong := [i for i in picks if not 0 <= i < layout.length]:
        raise ValueError(f"keep has index {wrong[0]}, but the grid has {layout.length} tokens")
    if not 0.0 <= dim <= 1.0:
        raise ValueError(f"dim={dim!r} must lie in [0, 1]")

    views = [segment for segment in layout.segments if segment.kind != "newline" and segment.length]
    if not views or any(segment.grid is None for segment in views):
        raise ValueError(f"the layout does not tell its grid: {layout}")
    images = list(image) if isinstance(image, Sequence) else [image] * len(views)
    if len(images) != len(views):
        raise ValueError(f"{len(images)} images for {len(views)} views; give one image, or one for each view")

    panels = [
        _panel(picture, segment, _cells(segment, picks), len(picks), size, order, dim)
        for picture, segment in zip(images, views, strict=True)
    ]
    if len(panels) == 1:
        return panels[0]
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    sheet = pillow.new("RGB", (width, max(panel.height for panel in panels)), (255, 255, 255))
    x = 0
    for panel in panels:
        sheet.paste(panel, (x, 0))
        x += panel.width + _GAP
    return sheet


def _cells(segment: Segment, picks: list[int]) -> dict[tuple[int, int], int]:
    """(row, column) -> rank, of the picks that are patches of this segment."""
    rows, columns = segment.grid or (0, 0)
    stride = columns + segment.newline
    cells: dict[tuple[int, int], int] = {}
    for rank, i in enumerate(picks):
        row, column = divmod(i - segment.start, stride)
        if 0 <= i - segment.start < segment.length and column < columns and row < rows:
            cells.setdefault((row, column), rank)
    return cells


def _panel(
    picture: Image, segment: Segment, cells: dict[tuple[int, int], int], total: int, size: int, order: bool, dim: float
) -> Image:
    from PIL import Image as pillow
    from PIL import ImageDraw

    rows, columns = segment.grid or (1, 1)
    w, h = picture.size
    factor = math.ceil(max(1.0, size / max(w, h), _LEAST_CELL * columns / w, _LEAST_CELL * rows / h))
    clear = picture.convert("RGB").resize((w * factor, h * factor), pillow.Resampling.NEAREST)
    w, h = clear.size
    xs = [round(i * w / columns) for i in range(columns + 1)]
    ys = [round(i * h / rows) for i in range(rows + 1)]

    grey = clear.convert("L").convert("RGB")
    dropped = pillow.blend(pillow.blend(grey, clear, 0.4), pillow.new("RGB", clear.size, _SHADE), dim)
    stencil = pillow.new("L", clear.size, 0)
    pen = ImageDraw.Draw(stencil)
    for row, column in cells:
        pen.rectangle((xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1), fill=255)
    out = pillow.composite(clear, dropped, stencil)

    pen: Any = ImageDraw.Draw(out, "RGBA")
    for x in xs[1:-1]:
        pen.line((x, 0, x, h), fill=_GRID)
    for y in ys[1:-1]:
        pen.line((0, y, w, y), fill=_GRID)

    thick = 1 if min(w / columns, h / rows) < 14 else 2
    for row, column in cells:  # the outline runs inside the kept patches, along their dropped neighbours
        x0, y0, x1, y1 = xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1
        inner = thick - 1
        if (row - 1, column) not in cells:
            pen.rectangle((x0, y0, x1, y0 + inner), fill=_ACCENT)
        if (row + 1, column) not in cells:
            pen.rectangle((x0, y1 - inner, x1, y1), fill=_ACCENT)
        if (row, column - 1) not in cells:
            pen.rectangle((x0, y0, x0 + inner, y1), fill=_ACCENT)
        if (row, column + 1) not in cells:
            pen.rectangle((x1 - inner, y0, x1, y1), fill=_ACCENT)
        if order:
            x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, max(1.5, min(x1 - x0, y1 - y0) * 0.26)
            pen.ellipse(
                (x - r, y - r, x + r, y + r), fill=_colour(cells[row, column] / max(total - 1, 1)), outline=_SHADE
            )
    return out


def _colour(at: float) -> tuple[int, int, int]:
    """The order palette at 0 (first) to 1 (last)."""
    place = at * (len(_ORDER) - 1)
    low = min(int(place), len(_ORDER) - 2)
    part = place - low
    r, g, b = (round(p + (q - p) * part) for p, q in zip(_ORDER[low], _ORDER[low + 1], strict=True))
    return r, g, b
