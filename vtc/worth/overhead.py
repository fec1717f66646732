"""What the engine's own work takes: hooks, places, masks and positions, whatever the method.

Measured on a tiny model of LLaVA's shape (:mod:`vtc.zoo`), where fewer tokens save nothing, so that what a patch adds
is what it costs. Hosts differ in it more than devices do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vtc.binding import bind
from vtc.config import CompressionConfig
from vtc.engine.entry import EntryStage
from vtc.handle import Patch
from vtc.installing import install
from vtc.methods import Method
from vtc.methods.fastv import FastV
from vtc.methods.grid import Grid
from vtc.models import resolve
from vtc.worth.pace import best, known

IMAGES = 4
ROUNDS = 5
INSIDE = 2
"""Pieces of work between layers that FastV has: one signal and one stage."""
LEAST = 1e-7
"""Seconds: a clock says no less."""


@dataclass(frozen=True)
class Overhead:
    """Seconds.

    Attributes:
        once: for any batch that loses tokens before the language model.
        each: for every image on top.
        inside: for each piece of work between layers: a stage, a signal that it asks for, a layer that is watched.
    """

    once: float
    each: float
    inside: float


def overhead_of(device: torch.device, dtype: torch.dtype) -> Overhead:
    """Of a device and type of numbers: as it was found once, or measured now."""
    return Overhead(*known(device, dtype, "engine", lambda: _measured(device, dtype), 3))


def _measured(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    from vtc.zoo import models  # brings in many a family's code

    with torch.random.fork_rng(devices=[]):
        model: Any = models.llava()  # one of its own: the zoo's may be patched
    model.to(device, dtype)
    few, many = (_longer(model, Grid(keep=0.5), images) for images in (1, IMAGES))
    each = max(LEAST, (many - few) / (IMAGES - 1))
    inside = max(LEAST, (_longer(model, FastV(keep=0.5, layer=1), 1) - few) / INSIDE)
    return max(LEAST, few - each), each, inside


@torch.inference_mode()
def _longer(model: Any, method: Method, images: int) -> float:
    """Seconds that a prefill takes longer under a patch, for as many samples as images."""
    from vtc.zoo import make_batch

    adapter, parts = resolve(model)
    chosen = bind(adapter, parts, method, "original")
    batch = make_batch("llava", (1,) * images)
    inputs = {
        name: value.to(device=model.device, dtype=model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
    took: dict[bool, float] = {}
    for _ in range(ROUNDS):  # in turns: other work on the machine disturbs both
        for patched in (False, True):
            handle = Patch(parts.root, CompressionConfig.of(method), EntryStage(adapter, parts, chosen, "original"))
            if patched:
                install(handle)
            try:
                once = best(partial(model, **inputs, use_cache=True), model.device, 1)
            finally:
                if patched:
                    handle.unpatch()
            took[patched] = min(once, took.get(patched, once))
    return took[True] - took[False]
