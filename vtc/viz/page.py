"""A patched prompt as HTML: tokens in every layer as bars, and the pictures, in one self-contained piece of text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from vtc.viz.panels import panels
from vtc.viz.picture import import_pillow
from vtc.viz.prompt import save_animation, sheet
from vtc.viz.seen import Seen

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.report import Report

_CELLS = 8192
"""Tokens of a sample above which a report draws no cells: long videos."""
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 24px; color: #22262e; background: #fff }}
img {{ max-width: 100%; height: auto }}</style></head>
<body><h1 style="font-size: 20px">{title}</h1>
{body}
</body></html>
"""
_TABLE = """\
<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">
<tr><th style="text-align: left; padding: 2px 12px 2px 0">layers</th>
<th style="text-align: right; padding: 2px 12px 2px 0">visual tokens</th><th></th></tr>
{rows}
</table>
"""
_ROW = """\
<tr><td style="text-align: left; padding: 2px 12px 2px 0">{layers}</td>
<td style="text-align: right; padding: 2px 12px 2px 0">{count:g}</td>
<td style="text-align: left"><div style="width: 240px; background: #e3e6ea">\
<div style="width: {share:.1%}; height: 12px; background: #21918c"></div></div></td></tr>"""


def report_html(report: Report) -> str:
    """A report as a notebook shows it: its line of text, a bar for each run of equal layers, the kept cells.

    The report does not know the picture: tokens are drawn as cells of their grid, for the first sample with images.
    Without Pillow there are no cells.
    """
    rows = []
    start = 0
    for count, run in groupby(report.tokens_per_layer):
        stop = start + len(list(run)) - 1
        layers = f"{start}" if start == stop else f"{start} - {stop}"
        rows.append(_ROW.format(layers=layers, count=count, share=min(1.0, count / report.visual_tokens)))
        start = stop + 1
    parts = [f"<p>{html.escape(str(report))}</p>", _TABLE.format(rows="\n".join(rows))]
    if (cells := _cells(report)) is not None:
        parts.append(image_html(cells, "kept visual tokens, as cells"))
    return f'<div style="max-width: 100%">{"".join(parts)}</div>'


def page(title: str, report: Report, drawings: Sequence[tuple[str, Image | Sequence[Image]]]) -> str:
    """A whole page that needs no other file: drawings with their descriptions, then the report without its cells.

    Args:
        title: shown on top.
        report: of the prompt.
        drawings: (description, drawing, or the drawings of an animation).
    """
    body = [f"<p>{image_html(drawing, text)}</p>" for text, drawing in drawings]
    body.append(report_html(replace(report, layouts=(), stages=())))
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def image_html(drawing: Image | Sequence[Image], text: str) -> str:
    """A drawing as an ``img`` element that carries its pixels; several of them as an animation."""
    buffer = io.BytesIO()
    if isinstance(drawing, Sequence):
        kind = "gif"
        save_animation(drawing, buffer)
    else:
        kind = "png"
        drawing.save(buffer, "png", optimize=True)
    pixels = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{pixels}">'


def _cells(report: Report) -> Image | None:
    sample = next((g for g, own in enumerate(report.layouts) if own), None)
    if sample is None or sum(layout.length for layout in report.layouts[sample]) > _CELLS:
        return None
    try:
        import_pillow()
    except ImportError:
        return None
    images = [Seen(layout, tuple((panel, None) for panel in panels(layout))) for layout in report.layouts[sample]]
    return sheet(images, [(after, kept[sample]) for after, kept in report.stages], size=200)
