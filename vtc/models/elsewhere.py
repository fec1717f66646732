"""Models that are no transformers model of the usual build: adapters of other packages, found by entry points.

A package names a function in the group ``vtc.models``. It is given a model that nobody here can prune, and returns its
adapter and parts, as :func:`vtc.models.resolve` does, or ``None`` if it does not know the model either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from torch import nn

GROUP = "vtc.models"


def find(model: nn.Module) -> tuple[Any, Any] | None:
    """The adapter and the parts of a model, from the first package that knows it."""
    return next((found for known in _finders() if (found := known(model)) is not None), None)


@functools.cache
def _finders() -> tuple[Callable[[nn.Module], tuple[Any, Any] | None], ...]:
    return tuple(entry.load() for entry in entry_points(group=GROUP))
