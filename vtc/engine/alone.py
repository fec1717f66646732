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
from vtc.engine.patches import PatchStages
from vtc.engine.row import Row
from vtc.engine.stages import Hook
from vtc.methods import Method, ModelFacts
from vtc.models import Adapter, Parts


class _Blocks(PatchStages):
    """The blocks of a tower without anything behind it."""

    def hooks(self) -> Iterator[Hook]:
        """As those of a tower in front of a language model; behind the blocks, only what is restored."""
        yield from self.hooks_on_blocks()
        yield self.tower.layers[-1], self.after_last_block, False

    def after_last_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """All places again, if that was asked for."""
        recording = current().recording
        if recording is None or not isinstance(recording.passage, Passage) or not recording.passage.restores:
            return None
        return super().after_last_block(block, args, kwargs, output)


class AloneStages:
    """A method's stages in an image classifier."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, facts: ModelFacts) -> None:
        """Look. ``method`` is settled, and has stages inside the tower alone."""
        chooser = Chooser(adapter, parts, method, facts)
        self.adapter, self.parts, self.steps = adapter, parts, chooser.tower
        self.method, self.signals = method, chooser.overheard
        self.last: None = None
        """What a language model was given: none is there."""
        self.passage: Passage | None = None
        """The last run of the tower, if patches left in it."""

    def hooks(self) -> Iterator[Hook]:
        """Module, hook, and whether it comes before the module runs."""
        tower = self.adapter.tower(self.parts.base, "image")
        assert tower is not None  # or it was refused
        return _Blocks(self.adapter, self.parts, tower, self.steps, ()).hooks() if self.steps else iter(())

    def recording(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What goes around the base model's ``forward``: somebody hears what leaves."""

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if current().bypassed:
                return forward(*args, **kwargs)
            recording = Recording(self.parts, "image", {})
            with during(recording=recording):
                output = forward(*args, **kwargs)
            assert not isinstance(recording.passage, Row)  # a picture is a row of its own
            self.passage = recording.passage
            return output

        return call

    def kept(self) -> list[list[Tensor]] | None:
        """The patches that were left of each picture, ascending, on the host; ``None`` where none has left yet."""
        if self.passage is None or self.passage.there is None:
            return None
        return [[row] for row in self.passage.there.cpu()]
