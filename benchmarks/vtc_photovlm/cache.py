"""Where what is fetched lies, and checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

VARIABLE = "VTC_PHOTOVLM_CACHE"


class Unavailable(OSError):
    """Something that this package needs is not here and cannot be had; the message says what would work."""


def folder() -> Path:
    """The cache folder: ``$VTC_PHOTOVLM_CACHE``, or ``vtc_photovlm`` in the user's cache. It need not exist."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtc_photovlm"


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(path)


def _slow(path: Path) -> str:
    """As Python 3.10 has it."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
