"""Listen to a vision tower: what its modules get and return becomes the signals that a method needs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.dialect import attention
from vtc.dialect.towers import Heard, Tower
from vtc.engine.context import recording_of
from vtc.models import Adapter, Parts
from vtc.models.base import MODALITIES
from vtc.signals import TowerSignal


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
        hidden = hidden.detach()[None] if hidden.dim() == 2 else hidden.detach()
        heard = Heard.of(self.module, args, kwargs)
        values = self.signal.read(self.tower, self.module, hidden, heard)
        if found.passage is not None and self.signal.axes.get(self.signal.key, 1) is not None:  # patches have left
            values = found.passage.spread(values)
        found.setdefault(self.signal, []).append(values)


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
_TAPS: dict[nn.Module, _Tap] = {}


@contextmanager
def listening_in(listeners: Iterable[Recorder]) -> Iterator[None]:
    """Let recorders hear their modules for a while, without hooks; calls in other threads run as ever.

    A dictionary of hooks must not change while another thread runs through it; an instance's ``forward`` may. Only the
    first of several listeners wraps it and only the last unwraps it. A listener hears the other threads too, but
    leaves what its owner does not record (:class:`Recorder`).
    """
    listeners = tuple(listeners)
    with _LOCK:
        for listener in listeners:
            if listener.module not in _TAPS:
                _TAPS[listener.module] = _Tap(listener.module)
            _TAPS[listener.module].listeners += (listener,)
    try:
        yield
    finally:
        with _LOCK:
            for listener in listeners:
                tap = _TAPS[listener.module]
                tap.listeners = tuple(other for other in tap.listeners if other is not listener)
                if not tap.listeners:
                    _TAPS.pop(listener.module).remove()


class _Tap:
    """What hides an instance's ``forward`` while somebody listens."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.listeners = module, tuple[Recorder, ...]()
        self.hidden = module.__dict__.get("forward")
        real = module.forward

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            listeners = self.listeners
            for listener in listeners:
                if listener.signal.reads == "input":
                    listener(module, args, kwargs)
            output = real(*args, **kwargs)
            for listener in listeners:
                if listener.signal.reads == "output":
                    listener(module, args, kwargs, output)
            return output

        self.forward = module.__dict__["forward"] = forward

    def remove(self) -> None:
        if self.module.__dict__.get("forward") is not self.forward:  # somebody put another one there meanwhile
            return
        if self.hidden is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.hidden
