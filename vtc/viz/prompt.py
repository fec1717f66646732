"""Pictures of a whole prompt: every view of its images, at every stage, with what was kept there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vtc.viz.animation import same_size
from vtc.viz.handle import Handle
from vtc.viz.picture import import_pillow
from vtc.viz.prompt_images import prompt_images
from vtc.viz.sheet import finished, flow
from vtc.viz.stages import Orders, Ranks, blocks, panel_size, ranks_of, stage_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

_STEPS = 12  # frames of an animation in which picks appear


def show(
    handle: Handle,
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
        size: pixels that the longer side of a panel has at least, and half as many more for a mosaic of crops; by
            default what fits.
        caption: text below, behind the name of the method.

    Returns:
        A new RGB image.

    Raises:
        ImportError: Pillow is missing.
        ValueError: no prompt with images was run, there is no such sample, or ``inputs`` belong to another prompt.
    """
    import_pillow()
    images = prompt_images(handle, inputs, processor, sample)
    stages = [(after, kept[sample]) for after, kept in handle.last_stages]
    orders = _orders(handle, sample) if order else None
    return stage_sheet(images, stages, orders, size=size, caption=_caption(handle, caption))


def animate(
    handle: Handle,
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
    picks appear in their order. :func:`vtc.viz.save_animation` writes them.
    """
    import_pillow()
    images = prompt_images(handle, inputs, processor, sample)
    stages = [(after, kept[sample]) for after, kept in handle.last_stages]
    orders = _orders(handle, sample) if order else [None] * len(images)
    states: list[tuple[int | None, list[Ranks]]] = [(None, [dict.fromkeys(range(i.layout.length)) for i in images])]
    in_order = any(picks is not None for picks in orders)
    if len(stages) == 1 and in_order:
        states += [(None, state) for state in _growing(stages[0][1], orders)]
    else:
        several = len(stages) > 1
        states += [(after if several else None, list(map(ranks_of, kept, orders))) for after, kept in stages]
    size = size or panel_size(images)
    text = _caption(handle, caption)
    return same_size(
        [finished(flow(blocks(images, state, orders, after, size), gap=20), text, in_order) for after, state in states]
    )


def _growing(kept: Sequence[Tensor], orders: Orders) -> list[list[Ranks]]:
    """What was kept after the first, second ... twelfth part of the picks; what was not picked is there at once."""
    full = list(map(ranks_of, kept, orders))
    longest = max(len(picks) for picks in orders if picks is not None)
    steps = sorted({-(-longest * step // _STEPS) for step in range(1, _STEPS + 1)})
    return [[{i: r for i, r in ranks.items() if r is None or r < step} for ranks in full] for step in steps]


def _orders(handle: Handle, sample: int) -> list[Tensor | None]:
    assert handle.last_order is not None  # or `prompt_images` has said that there was no prompt
    return handle.last_order[sample]


def _caption(handle: Handle, more: str) -> str:
    return f"{handle.method.title}\n{more}" if more else handle.method.title
