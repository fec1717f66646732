"""`vtc methods` and `vtc models`: what there is, as tables for the terminal and for the README."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vtc.commands.shared import clear_errors

Markdown = Annotated[bool, typer.Option("--markdown", help="As the table of the README.")]


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's page.")] = None, markdown: Markdown = False
) -> None:
    """List the methods, or show the page of one."""
    from vtc.methods import list_methods, method_class
    from vtc.methods.base import Method

    if name is not None:
        with clear_errors():
            _show_page(method_class(name))
        return
    every = [method_class(each) for each in list_methods()]

    def row(cls: type[Method]) -> tuple[str, ...]:
        paper = cls.paper
        venue, year = (paper.venue, str(paper.year)) if paper else ("", "")
        if markdown:
            file = cls.__module__.replace(".", "/")
            link = f"[{venue} {year}](https://arxiv.org/abs/{paper.arxiv})" if paper and paper.arxiv else venue
            return f"[`{cls.name}`]({file}.py)", _paragraph(cls), link, _places(cls), _signals(cls)
        return cls.name, venue, year, _places(cls), _signals(cls)

    header = ("method", "what it does", "paper", "place", "signals")
    _print(header if markdown else ("method", "venue", "year", "place", "signals"), map(row, every), markdown)


def models(markdown: Markdown = False) -> None:
    """List the supported model families and the signals each offers to the methods."""
    from vtc.models import families

    header = ("model type", "modalities", "signals", "notes")
    rows = [(f.model_type, ", ".join(f.modalities), ", ".join(f.signals), f.notes) for f in families()]
    if markdown:
        rows = [(f"`{name}`", *rest) for name, *rest in rows]  # type: ignore[misc]
    _print(header, rows, markdown)


def _show_page(cls: type) -> None:
    options = "\n".join(f"    {field.name} = {field.default!r}" for field in dataclasses.fields(cls))
    page = (_paragraph(sys.modules[cls.__module__]), _reflow(inspect.getdoc(cls) or ""), "Options:\n" + options)
    Console().print("\n\n".join(page).replace("``", ""), markup=False, highlight=False)


def _places(cls: type) -> str:
    """Where tokens leave, in the order of the way from pixels to logits."""
    from vtc.methods.base import ANY_MODEL

    stages = [stage for member in cls().members for stage in member.stages(ANY_MODEL)]
    return ", ".join(dict.fromkeys(type(stage.at).__name__.lower() for stage in stages))


def _signals(cls: type) -> str:
    return ", ".join(sorted({signal.key for signal in cls().signals()}))


def _print(header: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool) -> None:
    if markdown:
        for row in (header, ("---",) * len(header), *rows):
            typer.echo(f"| {' | '.join(row)} |")
        return
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _paragraph(documented: object) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].replace("`", "").split())


def _reflow(text: str) -> str:
    """Join the lines of each paragraph and list item, so that the terminal may wrap them anew."""
    return re.sub(r"(?<=\S)\n( {0,3}| {8})(?=\S)(?!\d+\. |- )", " ", text)
