"""Charts of measurements, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vtc.files import replacing

if TYPE_CHECKING:
    from vtc.profiling.measure import Measurement

PARTS = {"vision": "#4c72b0", "select": "#c44e52", "prefill": "#8c8c8c"}
"""Parts of the time to first token and their colours."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, with a canvas of its own: pyplot's global state stays as it is."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_of(measurement: Measurement) -> str:
    """``unpruned``, or the method and its keep."""
    return "unpruned" if measurement.config is None else f"{measurement.method} {measurement.keep}"


def bars(measured: Sequence[Measurement], title: str = "") -> Figure:
    """Time to first token as stacked bars, a panel for each batch size; each bar with its speed-up."""
    batches = sorted({each.batch for each in measured})
    rows = max(sum(each.batch == batch for each in measured) for batch in batches)
    figure = new_figure(8.0, 0.9 + len(batches) * (0.7 + 0.28 * rows))
    panels = figure.subplots(len(batches), squeeze=False)[:, 0]
    for panel, batch in zip(panels, batches, strict=True):
        here = [each for each in measured if each.batch == batch]
        labels, left = [label_of(each) for each in here], [0.0] * len(here)
        for part, color in PARTS.items():
            widths = [1e3 * getattr(each, part).median for each in here]
            panel.barh(labels, widths, left=left, color=color, label=part if panel is panels[0] else None)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, each in enumerate(here):
            panel.annotate(_note(each), (left[row], row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.35 * max(left))
        panel.set_title(f"batch {batch}", loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time to first token, ms (median)", fontsize=9)
    figure.legend(loc="outside upper right", ncols=len(PARTS), fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def save_bars(measured: Sequence[Measurement], path: Path, title: str = "") -> None:
    """Write :func:`bars`; the name's ending decides about the format."""
    with replacing(path) as written:
        bars(measured, title).savefig(written, dpi=150)


def _note(measurement: Measurement) -> str:
    if measurement.faults:
        return "wrong result"
    if measurement.speedup is None or measurement.realised is None:
        return ""
    return f"{measurement.speedup.median:.2f}x, {measurement.realised.median:.0%} of ideal"
