"""A patched prompt as HTML: tokens in every layer as bars, and the pictures, in one self-contained piece of text."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vtc.tokens import Layout
from vtc.viz.animation import save_animation
from vtc.viz.panels import panels
from vtc.viz.picture import import_pillow
from vtc.viz.prompt_images import PromptImage
from vtc.viz.stages import stage_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

_CELLS = 8192
"""Tokens of a sample above which a report draws no cells: long videos."""
_TEMPLATES = {
    "drawing": """\
{% macro element(drawing) %}\
<img alt="{{ drawing.text }}" src="data:image/{{ drawing.kind }};base64,{{ drawing.pixels }}">\
{% endmacro %}""",
    "report": """\
{% from "drawing" import element %}\
{% set left = "text-align: left; padding: 2px 12px 2px 0" %}\
{% set right = "text-align: right; padding: 2px 12px 2px 0" %}\
<div style="max-width: 100%"><p>{{ report }}</p>\
<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">
<tr><th style="{{ left }}">layers</th>
<th style="{{ right }}">visual tokens</th><th></th></tr>
{% for run in runs %}\
<tr><td style="{{ left }}">{{ run.first }}{% if run.last > run.first %} - {{ run.last }}{% endif %}</td>
<td style="{{ right }}">{{ "%g" | format(run.count) }}</td>
<td style="text-align: left"><div style="width: 240px; background: #e3e6ea">\
<div style="width: {{ "%.1f" | format(100 * run.share) }}%; height: 12px; background: #21918c"></div></div></td></tr>
{% endfor %}\
</table>
{% if cells %}{{ element(cells) }}{% endif %}\
</div>""",
    "page": """\
{% from "drawing" import element %}\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>body { font: 15px/1.5 system-ui, sans-serif; margin: 24px; color: #22262e; background: #fff }
img { max-width: 100%; height: auto }</style></head>
<body><h1 style="font-size: 20px">{{ title }}</h1>
{% for drawing in drawings %}<p>{{ element(drawing) }}</p>
{% endfor %}\
{% include "report" %}
</body></html>
""",
}


class Counts(Protocol):
    """What is shown of a report; as text it is one line."""

    @property
    def visual_tokens(self) -> float:
        """Those that the images had."""

    @property
    def tokens_per_layer(self) -> Sequence[float]:
        """Those that are left in each layer."""


def report_html(
    report: Counts,
    layouts: Sequence[Sequence[Layout]] = (),
    stages: Sequence[tuple[int, Sequence[Sequence[Tensor]]]] = (),
) -> str:
    """A report as a notebook shows it: its line of text, a bar for each run of equal layers, the kept cells.

    The report does not know the picture: tokens are drawn as cells of their grid, for the first sample with images.
    Without Pillow there are no cells, and without jinja2 there is only the line of text.

    Args:
        report: the numbers.
        layouts: structure of each sample's images.
        stages: (layers run before, kept indices by sample and image), in order.
    """
    try:
        template = _templates().get_template("report")
    except ImportError:
        return f"<p>{html.escape(str(report))}</p>"
    return template.render(report=str(report), runs=_runs(report), cells=_cells(layouts, stages))


def page(title: str, report: Counts, drawings: Sequence[tuple[str, Image | Sequence[Image]]]) -> str:
    """A whole page that needs no other file: drawings with their descriptions, then the report without its cells.

    Args:
        title: shown on top.
        report: of the prompt.
        drawings: (description, drawing, or the drawings of an animation).

    Raises:
        ImportError: jinja2 is missing; the message says what to install.
    """
    template = _templates().get_template("page")
    embedded = [_Embedded.of(drawing, text) for text, drawing in drawings]
    return template.render(title=title, drawings=embedded, report=str(report), runs=_runs(report), cells=None)


def import_jinja() -> Any:
    """The module ``jinja2``.

    Raises:
        ImportError: it is missing; the message says what to install.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            'a page of vtc is written with jinja2, which is missing: pip install "visual-token-compression[demo]"'
        ) from error
    return jinja2


@functools.cache
def _templates() -> Any:
    jinja2 = import_jinja()
    return jinja2.Environment(
        loader=jinja2.DictLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True)
class _Run:
    """Layers next to each other that have equally many tokens; ``share`` of those that the images had."""

    first: int
    last: int
    count: float
    share: float


def _runs(report: Counts) -> list[_Run]:
    runs, start = [], 0
    for count, layers in groupby(report.tokens_per_layer):
        stop = start + len(list(layers))
        runs.append(_Run(start, stop - 1, count, min(1.0, count / report.visual_tokens)))
        start = stop
    return runs


@dataclass(frozen=True)
class _Embedded:
    """A drawing that carries its pixels: a picture, or several as an animation."""

    text: str
    kind: str
    pixels: str

    @classmethod
    def of(cls, drawing: Image | Sequence[Image], text: str) -> _Embedded:
        buffer = io.BytesIO()
        if isinstance(drawing, Sequence):
            kind = "gif"
            save_animation(drawing, buffer)
        else:
            kind = "png"
            drawing.save(buffer, "png", optimize=True)
        return cls(text, kind, base64.b64encode(buffer.getvalue()).decode("ascii"))


def _cells(
    layouts: Sequence[Sequence[Layout]], stages: Sequence[tuple[int, Sequence[Sequence[Tensor]]]]
) -> _Embedded | None:
    sample = next((g for g, images in enumerate(layouts) if images), None)
    if sample is None or sum(layout.length for layout in layouts[sample]) > _CELLS:
        return None
    try:
        import_pillow()
    except ImportError:
        return None
    images = [PromptImage(layout, tuple((panel, None) for panel in panels(layout))) for layout in layouts[sample]]
    drawing = stage_sheet(images, [(after, kept[sample]) for after, kept in stages], size=200)
    return _Embedded.of(drawing, "kept visual tokens, as cells")
