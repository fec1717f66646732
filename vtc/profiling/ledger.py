"""A CSV file that grows row by row, and that an interrupted run can go on with. Nothing in it is ever overwritten."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.values import shown


class Ledger:
    """Rows of one table in one file; every row is on the disk when :meth:`add` returns.

    Args:
        path: of the file; made with the first row.
        columns: of the table.
        tell: called with a line of text about anything unusual that was found and what was done.

    A file that is no such table (other columns, no text, lines of another width) is kept under another name, and a new
    one is begun. A last line that was cut off is dropped, as its row was never finished.

    Attributes:
        rows: those found and those added, as text.
    """

    def __init__(self, path: Path, columns: Sequence[str], tell: Callable[[str], None] = lambda message: None) -> None:
        self.path, self.columns, self._tell = path, list(columns), tell
        self.rows: list[dict[str, str]] = []
        if os.path.exists(path):
            if not os.path.isfile(path):
                raise ValueError(f"{shown(str(path))} is no regular file, and is not opened; name another")
            self._resume()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; floats with six digits, ``None`` as nothing.

        Raises:
            ValueError: its columns are not the table's.
        """
        if set(row) != set(self.columns):
            raise ValueError(f"a row of {', '.join(row)} does not fit the columns {', '.join(self.columns)}")
        text = {name: _text(row[name]) for name in self.columns}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(text)
        self.rows.append(text)

    def _resume(self) -> None:
        try:
            content = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return self._set_aside("it is not text")
        if not content:
            return None
        whole = content[: content.rfind("\n") + 1]
        try:
            lines = list(csv.reader(io.StringIO(whole, newline=""), strict=True))
        except csv.Error as error:
            return self._set_aside(f"it is not a CSV file ({error})")
        if not lines or lines[0] != self.columns:
            return self._set_aside("its columns are not those of this table")
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(self.columns):
                return self._set_aside(f"line {number} has {len(line)} fields, not {len(self.columns)}")
        if whole != content:
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole.encode()))
            self._tell(f"{self.path}: the last line was cut off and is dropped: {content[len(whole) :]!r}")
        self.rows = [dict(zip(self.columns, line, strict=True)) for line in lines[1:]]
        return None

    def _set_aside(self, reason: str) -> None:
        aside = next(
            name
            for number in range(1, 10_000)
            if not (name := self.path.with_name(f"{self.path.stem}.aside{number}{self.path.suffix}")).exists()
        )
        self.path.rename(aside)
        self._tell(f"{self.path} cannot be continued: {reason}; it is kept as {aside}, and a new file is begun")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
