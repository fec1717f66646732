"""A vision tower that no language model stands behind: an image classifier, whose patches leave on the way.

Nothing has to be there again behind the tower. Its head reads the CLS token, or the mean of the patches that are left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vtc.engine.choosing import Chooser
from vtc.engine.context import Recording, current, during
from vtc.engine.passage import Passage
from vtc.engine.tower import TowerStages
from vtc.methods import Method, ModelFacts
from vtc.models import Adapter, Parts


class AloneStages(TowerStages):
    """Hooks on the blocks of a classifier."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, facts: ModelFacts) -> None:
        """Look. ``method`` is settled, and has stages inside the tower alone."""
        chooser = Chooser(adapter, parts, method, facts)
        super().__init__(adapter, parts, chooser.tower, ())
        self.method, self.signals = method, chooser.overheard
        self.last: None = None
        """What a language model was given: none is there."""
        self.passage: Passage | None = None
        """The last run of the tower, if patches left in it."""

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
        """As those of a tower in front of a language model; behind it, only what is restored."""
        wanted = (self.before_block, self.after_last_block)
        for module, hook, before in super().hooks():
            if getattr(hook, "func", hook) in wanted:
                yield module, hook, before

    def after_last_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """All places again, if that was asked for."""
        recording = current().recording
        if recording is None or recording.passage is None or not recording.passage.restores:
            return None
        return super().after_last_block(block, args, kwargs, output)

    def recording(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What goes around the base model's ``forward``: somebody hears what leaves."""

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if current().bypassed:
                return forward(*args, **kwargs)
            recording = Recording(self.parts, "image")
            with during(recording=recording):
                output = forward(*args, **kwargs)
            self.passage = recording.passage
            return output

        return call

    def kept(self) -> list[list[Tensor]] | None:
        """The patches that were left of each picture, ascending, on the host; ``None`` where none has left yet."""
        if self.passage is None or self.passage.there is None:
            return None
        return [[row] for row in self.passage.there.cpu()]
