"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends; if it raises, ``path`` is as it was.

    The name is in the same folder, with the same suffix. A link goes on pointing where it does. What is no regular file
    (a pipe, a terminal) is written to directly.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        yield Path(path)
        return
    written = target.with_name(f".vtc-{secrets.token_hex(6)}{target.suffix}")
    try:
        yield written
        if os.path.exists(target):
            shutil.copymode(target, written)
        os.replace(written, target)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, in UTF-8."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")
