"""Which releases of transformers vtc was tested with."""

from __future__ import annotations

import functools
import re
import warnings

import transformers

OLDEST, NEWEST = (5, 17), (5, 24)
"""The ends of what is tested; ``noxfile.py`` has the list, and ``pyproject.toml`` ends before the release after."""


def running_release() -> str:
    """A sentence for messages: the release that runs, and those that are known to work."""
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    return f"This is transformers {transformers.__version__}; vtc is tested with {oldest} to {newest}"


@functools.cache
def warn_if_untested() -> None:
    """Once per process: the running release is newer than any that was tested."""
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    if found and tuple(map(int, found.groups())) > NEWEST:
        warnings.warn(
            f"{running_release()}. What vtc relies on was found where it looks for it; run `vtc doctor`, or "
            "vtc.verify(model, inputs), to see whether pruned answers are right here.",
            stacklevel=3,
        )
