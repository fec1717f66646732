"""Pictures of a whole prompt: every view of its images, at every stage, with what was kept there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from vtc.viz.panels import Panel
from vtc.viz.picture import ACCENT, SHADE, colour, draw, import_pillow
from vtc.viz.seen import Seen, seen
from vtc.viz.sheet import finished, flow, titled

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.patching import Patch

Ranks = dict[int, "int | None"]
Orders = Sequence["Tensor | None"]
_STEPS = 12  # frames of an animation in which picks appear


def show(
    handle: Patch,
    inputs: Mapping[str, Any],
    processor: Any = None,
    *,
    sample: int = 0,
    order: bool = False,
    size: int | None = None,
    caption: str = "",
) -> Image:
    """Draw what was kept of a sample's images in the last prompt, over what the model saw of them.

    A thumbnail and its mosaic of crops, tiles, frames of a video have a panel each; bars behind the rows are newline
    tokens. A method that drops tokens inside the language model gets one drawing for each stage. Tokens of a model
    that does not tell its grid are drawn in their order.

    Args:
        handle: of the patched model, behind the prompt.
        inputs: what the model was called with.
        processor: the one that made them, which knows how colours were normalised.
        sample: of the batch.
        order: a dot on each kept token has the colour of its place in the pick order, where the method has one
            (``handle.last_order``).
        size: at least so many pixels has the longer side of a panel, and half as many more that of a mosaic of crops;
            by default what fits.
        caption: text below, behind the name of the method.

    Returns:
        A new RGB image.

    Raises:
        ImportError: Pillow is missing.
        ValueError: no prompt with images was run, there is no such sample, or ``inputs`` belong to another prompt.
    """
    import_pillow()
    images = seen(handle, inputs, processor, sample)
    stages = [(after, kept[sample]) for after, kept in handle.last_stages]
    orders = _orders(handle, sample) if order else None
    return sheet(images, stages, orders, size=size, caption=_caption(handle, caption))


def animate(
    handle: Patch,
    inputs: Mapping[str, Any],
    processor: Any = None,
    *,
    sample: int = 0,
    order: bool = False,
    size: int | None = None,
    caption: str = "",
) -> list[Image]:
    """As :func:`show`, but one drawing after the other, all of a size: all tokens, then what is left of them.

    Methods that drop inside the language model have one drawing for each stage; others, with ``order``, let the
    picks appear in their order. :func:`save_animation` writes them.
    """
    import_pillow()
    images = seen(handle, inputs, processor, sample)
    stages = [(after, kept[sample]) for after, kept in handle.last_stages]
    orders = _orders(handle, sample) if order else [None] * len(images)
    states: list[tuple[int | None, list[Ranks]]] = [(None, [dict.fromkeys(range(i.layout.length)) for i in images])]
    if len(stages) == 1 and any(o is not None for o in orders):
        states += [(None, state) for state in _growing(stages[0][1], orders)]
    else:
        several = len(stages) > 1
        states += [(after if several else None, list(map(_ranks, kept, orders))) for after, kept in stages]
    bar = any(o is not None for o in orders)
    size = size or _size(images)
    text = _caption(handle, caption)
    frames = [finished(flow(_blocks(images, ranks, orders, after, size), gap=20), text, bar) for after, ranks in states]
    return _same_size(frames)


def _orders(handle: Patch, sample: int) -> list[Tensor | None]:
    assert handle.last_order is not None  # or `seen` has said that there was no prompt
    return handle.last_order[sample]


def save_animation(frames: Sequence[Image], file: Path | str | BinaryIO, seconds: float = 0.8) -> None:
    """Write drawings as a GIF that starts anew when it is over; the last one stays longer.

    Raises:
        ValueError: there is no drawing.
    """
    if not frames:
        raise ValueError("an animation needs at least one drawing")
    palette = _palette(frames)
    reduced = [frame.quantize(palette=palette, dither=import_pillow().Dither.NONE) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [2500]
    reduced[0].save(file, "gif", save_all=True, append_images=reduced[1:], duration=durations, loop=0)


def _palette(frames: Sequence[Image]) -> Image:
    """256 colours for all drawings, those of the pick order among them: a GIF has no more."""
    own = [value for i in range(48) for value in colour(i / 47)] + [*ACCENT, *SHADE, 255, 255, 255, 0, 0, 0]
    found = flow([frames[0], frames[-1]]).quantize(256 - len(own) // 3).getpalette() or []
    palette = import_pillow().new("P", (1, 1))
    palette.putpalette((found + own)[:768])
    return palette


def sheet(
    images: Sequence[Seen],
    stages: Sequence[tuple[int, Sequence[Tensor]]],
    order: Orders | None = None,
    *,
    size: int | None = None,
    caption: str = "",
) -> Image:
    """One block for each image and stage: its panels under titles.

    Args:
        images: their panels and pictures.
        stages: (layers run before, kept indices of each image), in order.
        order: picks of each image at the first stage.
        size: as for :func:`show`.
        caption: text below.
    """
    order = [None] * len(images) if order is None else order
    size = size or _size(images, len(stages))
    rows = [
        _blocks(images, list(map(_ranks, kept, order)), order, after if len(stages) > 1 else None, size)
        for after, kept in stages
    ]
    blocks = [row[g] for g in range(len(images)) for row in rows]
    return finished(flow(blocks, gap=20), caption, any(o is not None for o in order))


def _size(images: Sequence[Seen], stages: int = 1) -> int:
    panels = stages * sum(len(image.views) for image in images)
    return 480 if panels <= 2 else 300 if panels <= 6 else 200


def _blocks(
    images: Sequence[Seen], states: Sequence[Ranks], order: Orders, after: int | None, size: int
) -> list[Image]:
    """The drawing of each image, under its heading."""
    blocks = []
    for g, (image, ranks) in enumerate(zip(images, states, strict=True)):
        own = order[g]
        drawn = []
        for panel, picture in image.views:
            last = None if own is None else len(own) - 1  # a colour is the same token's at every stage
            side = size * 3 // 2 if panel.row_seams or panel.column_seams else size  # a mosaic has more cells
            one = draw(panel, _reduced(picture, panel, side), ranks, side, own is not None, last=last)
            alone = len(image.views) == 1 and panel.placed
            drawn.append(one if alone else titled(one, _title(panel, ranks), 13))
        words = [f"image {g + 1}"] if len(images) > 1 else []
        words += [] if after is None else [f"from layer {after}"]
        count = f"{len(ranks)} of {image.layout.length}"
        blocks.append(titled(flow(drawn), f"{', '.join(words)}: {count}" if words else f"{count} visual tokens", 15))
    return blocks


def _title(panel: Panel, ranks: Ranks) -> str:
    text = f"{panel.name}: {sum(i in ranks for i in panel.tokens.values())} of {len(panel.tokens)}"
    if panel.newlines:
        text += f", newlines {sum(i in ranks for i in panel.newlines.values())} of {len(panel.newlines)}"
    return text


def _caption(handle: Patch, more: str) -> str:
    text = f"{handle.method.name}, keep {handle.method.keep}"
    return f"{text}\n{more}" if more else text


def _ranks(kept: Tensor, order: Tensor | None) -> Ranks:
    """Kept index -> its place in the pick order, ``None`` where it has none."""
    ranks = {} if order is None else {int(i): rank for rank, i in enumerate(order.tolist())}
    return {int(i): ranks.get(int(i)) for i in kept.tolist()}


def _growing(kept: Sequence[Tensor], order: Orders) -> list[list[Ranks]]:
    """What was kept after the first, second ... twelfth part of the picks; what was not picked is there at once."""
    full = list(map(_ranks, kept, order))
    longest = max(len(o) for o in order if o is not None)
    steps = sorted({-(-longest * step // _STEPS) for step in range(1, _STEPS + 1)})
    return [[{i: r for i, r in ranks.items() if r is None or r < step} for ranks in full] for step in steps]


def _reduced(picture: Image | None, panel: Panel, size: int) -> Image | None:
    """A picture not much larger than asked for, with cells large enough for a dot."""
    if picture is None:
        return None
    limit = max(2 * size, 12 * max(panel.rows, panel.columns))
    if max(picture.size) <= limit:
        return picture
    width, height = (max(1, round(side * limit / max(picture.size))) for side in picture.size)
    return picture.resize((width, height), import_pillow().Resampling.LANCZOS)


def _same_size(frames: Sequence[Image]) -> list[Image]:
    width, height = max(f.width for f in frames), max(f.height for f in frames)
    pages = [import_pillow().new("RGB", (width, height), (255, 255, 255)) for _ in frames]
    for page, frame in zip(pages, frames, strict=True):
        page.paste(frame, (0, 0))
    return pages
