"""How much the language model's layers change a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.signals.base import DecoderSignal


@dataclass(frozen=True)
class Transitions(DecoderSignal):
    """Token transition variation (TransPrune, section 3.2), summed over both modules of some layers: [G, N].

    Attributes:
        layer: the first layer watched, counted from 0.
        until: the layer behind the last one watched.
        absolute: as in the paper: ``1 - |cos|``, and the softmax over visual tokens; else, as in its code, ``1 - cos``
            and the softmax over all tokens.
    """

    until: int
    absolute: bool = False

    kind: ClassVar[str] = "transition"
    needs_rows: ClassVar[bool] = False

    def watched(self) -> Iterator[int]:
        """From ``layer`` to the one before ``until``."""
        return iter(range(self.layer, self.until))

    @property
    def scorer(self) -> Transitions:
        """Which layers are summed up makes no difference to one of them."""
        return replace(self, layer=0, until=0)

    def score(self, before: Tensor, after: Tensor, real: Tensor, visual: Tensor) -> Tensor:
        """Of one module; the softmax runs over the tokens of each sample."""
        among = real & visual if self.absolute else real
        return ops.transition_variation(before, after, mask=among, absolute=self.absolute)
