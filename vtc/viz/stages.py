"""The images of a prompt at the stages of its pruning: one block for each, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vtc.viz.panels import Panel
from vtc.viz.picture import draw, import_pillow
from vtc.viz.prompt_images import PromptImage
from vtc.viz.sheet import finished, flow, titled

if TYPE_CHECKING:
    from PIL.Image import Image

Ranks = dict[int, "int | None"]
"""Kept index -> its place in the pick order, ``None`` where it has none."""
Orders = Sequence["Tensor | None"]
"""Picks of each image, in their order."""


def stage_sheet(
    images: Sequence[PromptImage],
    stages: Sequence[tuple[int, Sequence[Tensor]]],
    orders: Orders | None = None,
    *,
    size: int | None = None,
    caption: str = "",
) -> Image:
    """One block for each image and stage: its panels under titles.

    Args:
        images: their panels and pictures.
        stages: (layers run before, kept indices of each image), in order.
        orders: picks of each image at the first stage.
        size: as for :func:`vtc.viz.show`.
        caption: text below.
    """
    orders = [None] * len(images) if orders is None else orders
    size = size or panel_size(images, len(stages))
    rows = [
        blocks(images, list(map(ranks_of, kept, orders)), orders, after if len(stages) > 1 else None, size)
        for after, kept in stages
    ]
    by_image = [row[g] for g in range(len(images)) for row in rows]
    return finished(flow(by_image, gap=20), caption, any(picks is not None for picks in orders))


def panel_size(images: Sequence[PromptImage], stages: int = 1) -> int:
    """Pixels of a panel, so that all of them fit."""
    panels = stages * sum(len(image.views) for image in images)
    return 480 if panels <= 2 else 300 if panels <= 6 else 200


def ranks_of(kept: Tensor, picks: Tensor | None) -> Ranks:
    """What was kept of one image, with its places in the pick order."""
    ranks = {} if picks is None else {int(i): rank for rank, i in enumerate(picks.tolist())}
    return {int(i): ranks.get(int(i)) for i in kept.tolist()}


def blocks(
    images: Sequence[PromptImage], states: Sequence[Ranks], orders: Orders, after: int | None, size: int
) -> list[Image]:
    """The drawing of each image, under its heading.

    Args:
        images: their panels and pictures.
        states: what is there of each image.
        orders: picks of each image.
        after: the layers that ran before, for the heading.
        size: of a panel, in pixels.
    """
    headed = []
    for g, (image, ranks) in enumerate(zip(images, states, strict=True)):
        picks = orders[g]
        last = None if picks is None else len(picks) - 1  # a colour is the same token's at every stage
        drawn = []
        for panel, picture in image.views:
            side = size * 3 // 2 if panel.row_seams or panel.column_seams else size  # a mosaic has more cells
            one = draw(panel, _reduced(picture, panel, side), ranks, side, picks is not None, last=last)
            alone = len(image.views) == 1 and panel.placed
            drawn.append(one if alone else titled(one, _title(panel, ranks), 13))
        words = [f"image {g + 1}"] if len(images) > 1 else []
        words += [] if after is None else [f"from layer {after}"]
        count = f"{len(ranks)} of {image.layout.length}"
        headed.append(titled(flow(drawn), f"{', '.join(words)}: {count}" if words else f"{count} visual tokens", 15))
    return headed


def _title(panel: Panel, ranks: Ranks) -> str:
    text = f"{panel.name}: {sum(i in ranks for i in panel.tokens.values())} of {len(panel.tokens)}"
    if panel.newlines:
        text += f", newlines {sum(i in ranks for i in panel.newlines.values())} of {len(panel.newlines)}"
    return text


def _reduced(picture: Image | None, panel: Panel, size: int) -> Image | None:
    """A picture not much larger than asked for, with cells large enough for a dot."""
    if picture is None:
        return None
    limit = max(2 * size, 12 * max(panel.rows, panel.columns))
    if max(picture.size) <= limit:
        return picture
    width, height = (max(1, round(side * limit / max(picture.size))) for side in picture.size)
    return picture.resize((width, height), import_pillow().Resampling.LANCZOS)
