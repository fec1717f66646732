"""The kept tokens of an image, shown over the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtc.tokens import Layout
from vtc.values import shown
from vtc.viz.panels import Panel, panels

if TYPE_CHECKING:
    from PIL.Image import Image

SHADE = (16, 18, 24)
"""What dropped patches sink into."""
ACCENT = (255, 196, 61)
"""The outline of what stays."""
VIRIDIS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))
"""First pick to last: five points of matplotlib's viridis, which is perceptually uniform."""
GAP = 12
"""Pixels between panels."""
_GRID = (140, 144, 152, 80)
_SEAM = (255, 255, 255, 230)
_BLANK = (214, 218, 224)  # a cell without a picture
_LEAST_CELL = 6  # pixels


def overlay(
    image: Image | Sequence[Image] | None,
    keep: Tensor | Sequence[int],
    grid: tuple[int, int] | Layout,
    *,
    size: int = 480,
    order: bool = False,
    dim: float = 0.65,
) -> Image:
    """Draw which patches stay: dropped ones dimmed and grey, kept ones clear and outlined, a thin grid over all.

    Args:
        image: the picture as the processor cut it (a centre crop, if it takes one), or one for each view; ``None``
            draws cells only. :func:`vtc.viz.show` finds the pictures itself.
        keep: indices of the kept tokens of this image, as in ``p.last_keep[sample][image]``.
        grid: (rows, columns) of the patches, or the image's layout. A layout of several views (thumbnail and crops,
            frames) gives one panel each, side by side. A newline token is a bar behind its row; one that stands
            alone is not drawn.
        size: small pictures are enlarged, by whole factors and without smoothing, until the longer side has at least
            this many pixels; large ones are left as they are.
        order: ``keep`` is in pick order: put a dot on each kept patch, from yellow (first) to violet (last).
        dim: how far dropped patches sink into the dark, 0 to 1.

    Returns:
        A new RGB image.

    Raises:
        ImportError: Pillow is missing.
        ValueError: an index outside the grid, a layout without grids and yet an image, a number of images that does
            not fit.
    """
    pillow = import_pillow()
    layout = grid if isinstance(grid, Layout) else Layout.plain(grid[0] * grid[1], (grid[0], grid[1]))
    picks = ranks(keep, layout)
    if not 0.0 <= dim <= 1.0:
        raise ValueError(f"dim={shown(dim)} must lie in [0, 1]")
    views = panels(layout)
    if not views or (image is not None and not all(view.placed for view in views)):
        raise ValueError(
            f"the layout does not tell its grid, so that its tokens have no place on an image: {layout}; image=None "
            "draws them in their order"
        )
    images = list(image) if isinstance(image, Sequence) else [image] * len(views)
    if len(images) != len(views):
        raise ValueError(f"{len(images)} images for {len(views)} views; give one image, or one for each view")

    drawn = [draw(view, one, picks, size, order, dim) for view, one in zip(views, images, strict=True)]
    if len(drawn) == 1:
        return drawn[0]
    width = sum(panel.width for panel in drawn) + GAP * (len(drawn) - 1)
    sheet = pillow.new("RGB", (width, max(panel.height for panel in drawn)), (255, 255, 255))
    x = 0
    for panel in drawn:
        sheet.paste(panel, (x, 0))
        x += panel.width + GAP
    return sheet


def import_pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ImportError: Pillow is missing; the message says what to install.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'vtc.viz draws with Pillow, which is missing: pip install "visual-token-compression[viz]"'
        ) from error
    return Image


def ranks(keep: Tensor | Sequence[int], layout: Layout) -> dict[int, int]:
    """Kept index -> its place in ``keep``.

    Raises:
        ValueError: an index that the layout does not have.
    """
    picks: list[int] = [int(i) for i in (keep.tolist() if isinstance(keep, Tensor) else keep)]
    if wrong := [i for i in picks if not 0 <= i < layout.length]:
        raise ValueError(f"keep has index {wrong[0]}, but the grid has {layout.length} tokens")
    found: dict[int, int] = {}
    for rank, i in enumerate(picks):
        found.setdefault(i, rank)
    return found


def draw(
    panel: Panel,
    picture: Image | None,
    kept: Mapping[int, int | None],
    size: int,
    order: bool = False,
    dim: float = 0.65,
    last: int | None = None,
) -> Image:
    """One panel: ``kept`` is index -> rank (``None``: kept, but picked in no order), ``last`` the highest rank."""
    pillow = import_pillow()
    from PIL import ImageDraw

    rows, columns = panel.rows, panel.columns
    clear = _blank(panel, size) if picture is None or not panel.placed else _enlarged(picture, rows, columns, size)
    w, h = clear.size
    xs = [round(i * w / columns) for i in range(columns + 1)]
    ys = [round(i * h / rows) for i in range(rows + 1)]
    cells = {place: kept[i] for place, i in panel.tokens.items() if i in kept}

    grey = clear.convert("L").convert("RGB")
    dropped = pillow.blend(pillow.blend(grey, clear, 0.4), pillow.new("RGB", clear.size, SHADE), dim)
    stencil = pillow.new("L", clear.size, 0)
    pen: Any = ImageDraw.Draw(stencil)
    for row, column in cells:
        pen.rectangle((xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1), fill=255)
    out = pillow.composite(clear, dropped, stencil)

    pen = ImageDraw.Draw(out, "RGBA")
    for x in xs[1:-1]:
        pen.line((x, 0, x, h), fill=_GRID)
    for y in ys[1:-1]:
        pen.line((0, y, w, y), fill=_GRID)
    for seam in panel.column_seams:
        pen.line((round(seam * w), 0, round(seam * w), h), fill=_SEAM, width=2)
    for seam in panel.row_seams:
        pen.line((0, round(seam * h), w, round(seam * h)), fill=_SEAM, width=2)
    for row in range(rows):  # the last row of a strip may be short
        for column in range(columns):
            if (row, column) not in panel.tokens:
                pen.rectangle((xs[column], ys[row], xs[column + 1], ys[row + 1]), fill=(255, 255, 255))

    thick = 1 if min(w / columns, h / rows) < 14 else 2
    last = max([r for r in kept.values() if r is not None], default=0) if last is None else last
    for (row, column), rank in cells.items():  # the outline runs inside the kept patches, along dropped neighbours
        x0, y0, x1, y1 = xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1
        inner = thick - 1
        if (row - 1, column) not in cells:
            pen.rectangle((x0, y0, x1, y0 + inner), fill=ACCENT)
        if (row + 1, column) not in cells:
            pen.rectangle((x0, y1 - inner, x1, y1), fill=ACCENT)
        if (row, column - 1) not in cells:
            pen.rectangle((x0, y0, x0 + inner, y1), fill=ACCENT)
        if (row, column + 1) not in cells:
            pen.rectangle((x1 - inner, y0, x1, y1), fill=ACCENT)
        if order and rank is not None:
            across, down = (x0 + x1) / 2, (y0 + y1) / 2
            radius = max(1.5, min(9.0, min(x1 - x0, y1 - y0) * 0.26))
            place = (across - radius, down - radius, across + radius, down + radius)
            pen.ellipse(place, fill=colour(rank / max(last, 1)), outline=SHADE)
    return _with_newlines(out, panel, kept, ys) if panel.newlines else out


def _enlarged(picture: Image, rows: int, columns: int, size: int) -> Image:
    w, h = picture.size
    factor = math.ceil(max(1.0, size / max(w, h), _LEAST_CELL * columns / w, _LEAST_CELL * rows / h))
    return picture.convert("RGB").resize((w * factor, h * factor), import_pillow().Resampling.NEAREST)


def _blank(panel: Panel, size: int) -> Image:
    side = max(_LEAST_CELL, round(size / max(panel.rows, panel.columns)))
    if not panel.placed:
        side = min(side, 24)
    return import_pillow().new("RGB", (panel.columns * side, panel.rows * side), _BLANK)


def _with_newlines(drawn: Image, panel: Panel, kept: Mapping[int, int | None], ys: list[int]) -> Image:
    """The panel and, right of it, a bar for the newline token behind each row."""
    from PIL import ImageDraw

    wide = newline_width(drawn.width, panel.columns)
    out = import_pillow().new("RGB", (drawn.width + wide, drawn.height), (255, 255, 255))
    out.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(out)
    for row, token in panel.newlines.items():
        box = (drawn.width + 3, ys[row] + 1, drawn.width + wide - 1, ys[row + 1] - 2)
        pen.rectangle(box, fill=ACCENT if token in kept else (74, 77, 84))
    return out


def newline_width(width: int, columns: int) -> int:
    """Pixels that the bars of newline tokens add to a panel, the space before them included."""
    return 3 + max(5, min(12, width // columns // 2))


def colour(at: float) -> tuple[int, int, int]:
    """The order palette at 0 (first) to 1 (last)."""
    place = at * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    part = place - low
    r, g, b = (round(p + (q - p) * part) for p, q in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True))
    return r, g, b
