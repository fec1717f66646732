"""What vtc has found out about a machine, kept between processes: small JSON files in the user's cache folder.

By surroundings (device, driver, versions), of which the latest are remembered. A file that cannot be read or written is
as good as none.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from vtc.files import write_text

CACHE = "VTC_CACHE"
"""The variable that names another folder."""
PLACES = 16
"""Surroundings that are remembered: the latest."""


def folder() -> Path:
    """``VTC_CACHE``, else a folder in the user's cache folder."""
    named = os.environ.get(CACHE, "")
    if not named:
        base = os.environ.get("XDG_CACHE_HOME", "")
        named = os.path.join(base if os.path.isabs(base) else "~/.cache", "vtc")
    return Path(os.path.expanduser(named))


def read(path: Path) -> dict[str, Any]:
    """By surroundings, what was found there; empty for a file that holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, known: dict[str, Any], around: str, found: Any) -> None:
    """Replace what is known of some surroundings. Processes that write at once may lose what one of them found.

    Args:
        path: of the file.
        known: all that was read of it, and is to stay.
        around: the surroundings, which are the latest from now on.
        found: what is known of them now.
    """
    others = [(at, there) for at, there in known.items() if at != around]
    text = json.dumps(dict([*others, (around, found)][-PLACES:]), indent=1) + "\n"
    with contextlib.suppress(OSError):  # a folder that is read-only, or full
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
