"""What the stages of all vision towers have in common, however a tower lays its patches out."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from vtc.dialect import attention
from vtc.dialect.arguments import HIDDEN
from vtc.dialect.towers import Given, Tower, given_to, rewrite_states
from vtc.engine.context import Recording, recording_of
from vtc.methods.stages import Step
from vtc.models import Adapter, Parts
from vtc.signals import LEFT, TowerSignal

Hook = tuple[nn.Module, Callable[..., Any], bool]
"""Module, hook, and whether it comes before the module runs."""


class StagesOfTower(ABC):
    """A method's stages in one vision tower.

    All state is in the recording of the encoder that runs (:class:`vtc.engine.context.Recording`). Without one, nobody
    would hear what left: then the tower runs whole.
    """

    def __init__(
        self, adapter: Adapter, parts: Parts, tower: Tower, steps: Sequence[Step], passing: Sequence[TowerSignal]
    ) -> None:
        """Look.

        Args:
            adapter: of the family.
            parts: of the model.
            tower: one of its towers.
            steps: inside it, in order.
            passing: signals that nobody asks for behind it.
        """
        self.adapter, self.parts, self.tower = adapter, parts, tower
        self.steps, self.passing = tuple(steps), tuple(passing)

    def hooks_on_blocks(self) -> Iterator[Hook]:
        """Before each block from the first stage on."""
        first = self.steps[0].stage.at.depth
        for index, block in enumerate(self.tower.layers[first:], first):
            yield block, functools.partial(self.before_block, index), True

    def hooks(self) -> Iterator[Hook]:
        """Of the tower."""
        yield from self.hooks_on_blocks()
        assert self.tower.module is not None
        yield self.tower.module, self.after_tower, False
        yield from self.hooks_behind()

    def before_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let patches leave, and cut what the block was given for all of them."""
        if (recording := recording_of(self.parts)) is None:
            return None
        if attention.is_checkpointed(block):
            raise NotImplementedError(
                "training runs the vision tower a second time for its gradients (gradient checkpointing), and what "
                "left in it would have to leave again; switch that off for the tower, or use a method that drops "
                "tokens behind it, e.g. 'divprune'"
            )
        call = given_to(block, args, kwargs)
        hidden = call[HIDDEN]
        for step in self.steps:
            if step.stage.at.depth == index:
                hidden = self.reduced(step, recording, hidden)
        if recording.passage is None or recording.passage.there is None:
            return None
        call[HIDDEN] = hidden
        self.cut(index, call, recording)
        return call.positional

    def after_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """All places in every state that was recorded, and word of those that left."""
        if (recording := recording_of(self.parts)) is None or recording.passage is None:
            return
        rewrite_states(output, recording.passage.whole)
        recording.setdefault(LEFT, []).append(self.gone(recording))
        for signal in self.passing:
            recording.pop(signal, None)
        recording.passage = None

    @abstractmethod
    def reduced(self, step: Step, recording: Recording, hidden: Tensor) -> Tensor:
        """The rows of hidden states that stay at a step."""

    @abstractmethod
    def cut(self, index: int, call: Given, recording: Recording) -> None:
        """What else a block is given for all rows, for those that are there."""

    @abstractmethod
    def gone(self, recording: Recording) -> Tensor:
        """The signal :data:`vtc.signals.LEFT` of a run that is over, which ``recording.left`` counts."""

    def hooks_behind(self) -> Iterator[Hook]:
        """On modules behind the blocks."""
        return iter(())
