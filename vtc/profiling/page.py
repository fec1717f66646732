"""The report of a sweep: one HTML file with everything in it, which no network is needed to read."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vtc.files import write_text
from vtc.profiling.chart import new_figure
from vtc.profiling.sweep import BASELINES, UNPRUNED, by_method, front

Row = dict[str, str]
Axis = tuple[Callable[[Row], float], str]


def share_of_time(row: Row) -> float:
    """Time to first token in per cent of the unpruned model's in the same rounds, so that a machine that becomes
    slower from one row to the next changes neither.
    """
    return 100 / float(row["speedup"]) if row["speedup"] else 100.0


def kept_tokens(row: Row) -> float:
    """Visual tokens of a question, averaged over the layers."""
    return float(row["kept_tokens"])


_TIME = (share_of_time, "time to first token, % of unpruned")
_TOKENS = (kept_tokens, "visual tokens per question, averaged over layers")


def pareto(rows: Sequence[Row]) -> Figure:
    """Accuracy against time, a panel for each batch size, and against tokens.

    Every method is a line over its budgets, baselines dashed. What no other point beats stands on the front, which is
    drawn as steps. Points with wrong results are left out.
    """
    rows = [row for row in rows if row["correct"] == "True"]
    batches = sorted({row["batch"] for row in rows}, key=int)
    panels: list[tuple[str, Axis, list[Row]]] = [
        (f"batch {batch}", _TIME, [row for row in rows if row["batch"] == batch]) for batch in batches
    ]
    panels.append(("tokens", _TOKENS, [row for row in rows if row["batch"] == batches[0]]))
    figure = new_figure(5.0 * len(panels), 4.6)
    for number, (axes, (title, axis, here)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        _panel(axes, title, axis, here, legend=number == 0)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, title: str, axis: Axis, rows: list[Row], legend: bool) -> None:
    cost, words = axis
    colors = matplotlib.colormaps["tab10"]
    named = [name for name, _ in by_method(rows) if name not in (*BASELINES, UNPRUNED)]
    grays = dict(zip(BASELINES, ("0.55", "0.55", "0.25", "0.25"), strict=True))
    markers = dict(zip(BASELINES, ("x", "+", "v", "s"), strict=True))
    for name, points in by_method(rows):
        x, y = [cost(row) for row in points], [100 * float(row["accuracy"]) for row in points]
        low = [b - 100 * float(row["accuracy_low"]) for row, b in zip(points, y, strict=True)]
        high = [100 * float(row["accuracy_high"]) - b for row, b in zip(points, y, strict=True)]
        style: dict[str, Any] = {"color": grays.get(name, "black"), "marker": markers.get(name, "*"), "linestyle": "--"}
        if name in named:
            style = {"color": colors(named.index(name) % 10), "marker": "o", "linestyle": "-"}
        label = "unpruned" if name == UNPRUNED else name
        bars: dict[str, Any] = {"yerr": [low, high], "elinewidth": 0.6, "capsize": 1.5}
        axes.errorbar(x, y, **bars, **style, markersize=4, linewidth=1.1, label=label if legend else None)
    best = [(cost(rows[i]), 100 * float(rows[i]["accuracy"])) for i in front_of(rows, cost)]
    steps = axes.step(*zip(*best, strict=True), where="post", color="gold", linewidth=5, alpha=0.5, zorder=0)
    steps[0].set_label("Pareto front" if legend else "_front")
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(words, fontsize=9)
    axes.set_ylabel("accuracy, %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def front_of(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[int]:
    """Indices of the rows on the front of accuracy against a cost."""
    return front([(cost(row), float(row["accuracy"])) for row in rows])


def write_report(rows: Sequence[Row], path: Path) -> None:
    """Write the page.

    Args:
        rows: of a sweep, as text.
        path: of the HTML file.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there is nothing to report: the sweep has no rows")
    right = [row for row in rows if row["correct"] == "True"]
    ahead = set()
    for batch in {row["batch"] for row in right}:
        here = [row for row in right if row["batch"] == batch]
        ahead |= {id(here[i]) for i in front_of(here, share_of_time)}
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vtc"}):
        pareto(rows).savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = buffer.getvalue()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda text: f"{100 * float(text):.1f}" if text else ""
    environment.filters["number"] = lambda text, form: format(float(text), form) if text else ""
    page = environment.from_string(PAGE).render(
        rows=rows, first=rows[0], ahead=[id(row) in ahead for row in rows], svg=drawing[drawing.index("<svg") :]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


PAGE = """\
{% macro span(low, high) %}{% if low %}<span class="range">{{ low }} to {{ high }}</span>{% endif %}{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>vtc sweep: {{ first.model }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.front td { background: #fff6d5; }
.range { color: #777; }
</style>
</head>
<body>
<h1>Accuracy against time: {{ first.model }}</h1>
<p>Task {{ first.task }}, {{ first.questions }} questions, the same for every row; {{ first.device }},
{{ first.dtype }}, torch {{ first.torch }}, transformers {{ first.transformers }}, vtc {{ first.vtc }}
({{ first.commit }}), {{ first.date }}.</p>
<figure id="pareto">{{ svg | safe }}</figure>
<p>Accuracy with 95 % Wilson intervals. Time to first token: median of {{ first.repeats }} rounds of the whole batch,
vision tower included; in the plot as a share of the unpruned model's, taken in the same rounds. Baselines are dashed:
random and grid drop tokens blindly, downsample makes the picture smaller instead, pool averages neighbouring tokens.
The band is the Pareto front: no other point is as cheap and answers better.</p>
<table>
<thead><tr><th>method</th><th>keep</th><th>batch</th><th>tokens</th><th>accuracy, %</th><th>loss, points</th>
<th>loyalty, %</th><th>hard, %</th><th>apart, %</th><th>TTFT, ms</th><th>speed-up</th><th>ideal</th>
<th>realised, %</th></tr></thead>
<tbody>
{% for row in rows %}<tr{% if ahead[loop.index0] %} class="front"{% endif %}>
<td>{{ row.method }}</td><td>{{ row.keep }}</td><td>{{ row.batch }}</td><td>{{ row.kept_tokens | number(".0f") }}</td>
<td>{{ row.accuracy | percent }} {{ span(row.accuracy_low | percent, row.accuracy_high | percent) }}</td>
<td>{{ row.loss | percent }} {{ span(row.loss_low | percent, row.loss_high | percent) }}</td>
<td>{{ row.loyalty | percent }}</td>
<td>{{ row.hard | percent }} {{ span(row.hard_low | percent, row.hard_high | percent) }}</td>
<td>{{ row.apart | percent }}</td>
<td>{{ row.ttft_ms | number(".1f") }} {{ span(row.ttft_ms_p10 | number(".1f"), row.ttft_ms_p90 | number(".1f")) }}</td>
{% if row.correct == "True" %}<td>{{ row.speedup | number(".2f") }}</td><td>{{ row.ideal | number(".2f") }}</td>
<td>{{ row.realised | percent }} {{ span(row.realised_p10 | percent, row.realised_p90 | percent) }}</td>
{% else %}<td colspan="3">wrong result: {{ row.faults }}</td>{% endif %}</tr>
{% endfor %}</tbody>
</table>
<p>Loss: on the same questions, against the unpruned model; 95 % interval for paired proportions (Newcombe). Loyalty:
answers that are word for word the unpruned model's. Hard: accuracy on those questions that the whole picture answers
and a smaller one of as many tokens (downsample) does not; empty where that baseline was not run. Apart:
questions that the task keeps out of the accuracy. Realised: measured ratio of times, divided by the ideal ratio of
FLOPs, vision tower included; times, and so ratios, are spread from the 10th to the 90th percentile. Rows on the front
of their batch size are shaded.</p>
</body>
</html>
"""
