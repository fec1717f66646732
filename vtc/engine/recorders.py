"""Listen to a vision tower: what its modules get and return becomes the signals that a method needs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.dialect import attention
from vtc.dialect.towers import Tower
from vtc.models import Adapter, Parts
from vtc.models.base import MODALITIES
from vtc.signals import TowerSignal


class Recording(dict[TowerSignal, list[Tensor]]):
    """What was recorded while an encoder ran: by signal, [pictures, patches, ...] for each call of the tower."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner


_RECORDING: ContextVar[Recording | None] = ContextVar("vtc_recording", default=None)


@contextmanager
def recording(owner: Any) -> Iterator[Recording]:
    """Collect what the recorders of ``owner`` make while the vision tower runs."""
    found = Recording(owner)
    token = _RECORDING.set(found)
    try:
        yield found
    finally:
        _RECORDING.reset(token)


def recording_of(owner: Any) -> Recording | None:
    """Where recorders of ``owner`` put what they make, or ``None`` when it did not ask."""
    found = _RECORDING.get()
    return found if found is not None and found.owner is owner else None


@dataclass(frozen=True, eq=False)
class Recorder:
    """A forward hook on a module of a vision tower.

    Attributes:
        owner: whose.
        signal: what it makes.
        tower: of which tower.
        module: the module, as :meth:`TowerSignal.module` said.
    """

    owner: Any
    signal: TowerSignal
    tower: Tower
    module: nn.Module

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Leave the signal with its owner, if that is recording."""
        if (found := recording_of(self.owner)) is None:
            return
        if self.signal.reads == "input":
            hidden = attention.hidden_states(args, kwargs)
        else:
            hidden = output[0] if isinstance(output, tuple) else output
        found.setdefault(self.signal, []).append(self.signal.read(self.tower, self.module, hidden.detach()))


def recorders(
    adapter: Adapter, parts: Parts, signals: Iterable[TowerSignal], modalities: Iterable[str] = MODALITIES
) -> list[Recorder]:
    """A recorder for each signal on each tower that images or videos go through."""
    found: dict[tuple[TowerSignal, nn.Module], Recorder] = {}
    for modality in modalities:
        tower = adapter.tower(parts.base, modality)
        for signal in signals:
            if tower is not None and (module := signal.of(tower)) is not None:
                found.setdefault((signal, module), Recorder(parts, signal, tower, module))
    return list(found.values())


# ------------------------------------------------------------------------------------------------------ without hooks

_LOCK = threading.Lock()
_TAPPED: dict[nn.Module, list[int]] = {}


@contextmanager
def listening_in(listeners: Iterable[Recorder]) -> Iterator[None]:
    """Let recorders hear their modules for a while, without hooks; calls in other threads run as ever.

    A dictionary of hooks must not change while another thread runs through it; an instance's ``forward`` may. Only the
    first of several listeners wraps it and only the last unwraps it.
    """
    listeners = tuple(listeners)
    modules = [listener.module for listener in listeners]
    with _LOCK:
        for module in modules:
            _TAPPED.setdefault(module, [0])[0] += 1
            if _TAPPED[module][0] == 1:
                _wrap_forward(module)
    token = _LISTENERS.set((*_LISTENERS.get(), *listeners))
    try:
        yield
    finally:
        _LISTENERS.reset(token)
        with _LOCK:
            for module in modules:
                _TAPPED[module][0] -= 1
                if not _TAPPED[module][0]:
                    del _TAPPED[module]
                    _unwrap_forward(module)


_LISTENERS: ContextVar[tuple[Recorder, ...]] = ContextVar("vtc_listeners", default=())


def _wrap_forward(module: nn.Module) -> None:
    real = module.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ours = [listener for listener in _LISTENERS.get() if listener.module is module]
        for listener in ours:
            if listener.signal.reads == "input":
                listener(module, args, kwargs)
        output = real(*args, **kwargs)
        for listener in ours:
            if listener.signal.reads == "output":
                listener(module, args, kwargs, output)
        return output

    forward._vtc_hides = module.__dict__.get("forward")  # type: ignore[attr-defined]
    module.__dict__["forward"] = forward


def _unwrap_forward(module: nn.Module) -> None:
    forward: Any = module.__dict__.get("forward")
    if not hasattr(forward, "_vtc_hides"):  # somebody put another one there meanwhile
        return
    if forward._vtc_hides is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward._vtc_hides
