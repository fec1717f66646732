"""`python docs/site/tables.py`: write the tables of README.md anew, from the registries and from the measured rows.

Each stands between `<!-- table: NAME -->` and `<!-- end -->`. `tests/test_packaging.py` fails while one is out of date.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from typer.testing import CliRunner

from vtc.cli import app
from vtc.methods import method_class

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ROWS = ROOT / "benchmarks" / "results" / "profile_cpu.csv"
COLUMNS = (
    ("tinyvlm, keep 0.5", "tinyvlm", 0.5),
    ("tinyvlm, keep 0.25", "tinyvlm", 0.25),
    ("LLaVA-NeXT shape, keep 0.5", "random:benchmarks/configs/llava_next_small", 0.5),
)
"""What the table of speed-ups has: a heading, and the model and the keep of its rows."""
ALWAYS = ("random", "divprune", "idpruner", "fastervlm", "visionzip")
"""Beside these the table has whoever gains least and most in a column, so that no choice of ours flatters it."""


def methods() -> str:
    """What `vtc methods --markdown` prints, without methods that someone else registered."""

    def is_ours(line: str) -> bool:
        name = re.match(r"\| \[`(.+?)`]", line)
        return name is None or method_class(name[1]).__module__.startswith("vtc.")

    return "\n".join(filter(is_ours, _printed("methods").splitlines()))


def models() -> str:
    """What `vtc models --markdown` prints."""
    return _printed("models").rstrip()


def _printed(command: str) -> str:
    return CliRunner().invoke(app, [command, "--markdown"], catch_exceptions=False).stdout


def profile() -> str:
    """Speed-up of the time to the first token and realised share of the ideal, of the rows that passed their checks."""
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    with ROWS.open() as file:
        for row in csv.DictReader(file):
            for heading, model, keep in COLUMNS:
                right = row["correct"] == "True" and row["device"].startswith("cpu")
                if right and row["speedup"] and (row["model"], float(row["keep"])) == (model, keep):
                    shown = f"{float(row['speedup']):.2f}x, {float(row['realised']):.0%}".replace("%", " %")
                    cells.setdefault(row["method"], {})[heading] = float(row["speedup"]), shown
    chosen = set(ALWAYS)
    for heading, _, _ in COLUMNS:
        has = {method: found[heading][0] for method, found in cells.items() if heading in found}
        chosen |= {min(has, key=has.__getitem__), max(has, key=has.__getitem__)}
    rows = [("method", *(heading for heading, _, _ in COLUMNS)), ("---",) * (1 + len(COLUMNS))]
    rows += [
        (f"`{method}`", *(cells[method].get(heading, (0, "-"))[1] for heading, _, _ in COLUMNS))
        for method in sorted(chosen)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(text: str) -> str:
    """The text with each of its tables as it should be now.

    Raises:
        KeyError: it names a table that is none of these.
    """
    tables = {"methods": methods, "models": models, "profile": profile}

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{tables[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
