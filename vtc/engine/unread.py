"""Blocks of a vision tower whose output nobody reads: they run on one row.

LLaVA takes the state before the last block, and transformers computes that block and throws it away: 1 of 24 in CLIP-L.
A block on one row cannot change a state in front of it, so that answers are the same to the bit. It stays whole where
somebody may look: hidden states are asked for, another state is read in this call, or a signal is recorded there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.dialect.arguments import HIDDEN, MASK
from vtc.dialect.towers import Tower, all_states_asked, blocks_read, given_to, without_states
from vtc.engine.context import recording_of
from vtc.engine.recorders import Recorder
from vtc.models import Adapter, Parts
from vtc.models.base import MODALITIES


@dataclass(frozen=True, eq=False)
class Unread:
    """Hooks on one tower.

    Attributes:
        parts: of the model.
        tower: whose.
        read: how many of its blocks run before the last state that is read.
    """

    parts: Parts
    tower: Tower
    read: int

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave the first row."""
        call = given_to(block, args, kwargs)
        hidden = call[HIDDEN]
        if not self._nobody_looks() or isinstance(call[MASK], Tensor) or hidden.dim() != 3:
            return None
        call[HIDDEN] = hidden[:, :1]
        return call.positional

    def after_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """States of one row are none: who looks all the same shall not take them for more."""
        if self._nobody_looks():
            without_states(output, self.read)

    def _nobody_looks(self) -> bool:
        if (recording := recording_of(self.parts)) is None:
            return False
        given = recording.arguments
        return (
            not all_states_asked(self.parts.base, given)
            and blocks_read(self.parts.base, self.tower, given) == self.read
        )


def unread_hooks(
    adapter: Adapter, parts: Parts, recorders: Sequence[Recorder]
) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
    """Module, hook, and whether it comes before the module runs, for every tower with a block that nobody reads."""
    done: set[nn.Module] = set()
    for modality in MODALITIES:
        tower = adapter.tower(parts.base, modality)
        if tower is None or tower.module is None or tower.packed or tower.module in done:
            continue
        done.add(tower.module)
        read = blocks_read(parts.base, tower)
        behind = {module for block in tower.layers[read:] for module in block.modules()}
        if not 0 < read < len(tower.layers) or any(recorder.module in behind for recorder in recorders):
            continue
        unread = Unread(parts, tower, read)
        yield tower.layers[read], unread.before_block, True
        yield tower.module, unread.after_tower, False
