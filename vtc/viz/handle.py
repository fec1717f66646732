"""What drawing asks of a patched model's handle, so that nothing here needs to know who patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from vtc.engine.entry import EntryStage
    from vtc.methods import Method


class Handle(Protocol):
    """The part of :class:`vtc.Patch` that is read here; its docstrings say more."""

    @property
    def method(self) -> Method:
        """The method that selected."""

    @property
    def stage(self) -> EntryStage:
        """What knows the model and its last prompt."""

    @property
    def last_stages(self) -> list[tuple[int, list[list[Tensor]]]]:
        """(layers run before, kept indices by sample and image) along the last prompt."""

    @property
    def last_order(self) -> list[list[Tensor | None]] | None:
        """Picks in their order, by sample and image."""
