"""What pruning one batch of prompts wins, and what it costs: who decides is given to the engine from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtc.engine.locate import Located


@dataclass(frozen=True)
class Verdict:
    """On one batch.

    Attributes:
        visual: its visual tokens.
        saves: seconds that the language model's prefill takes less.
        costs: seconds that choosing and shortening take.
    """

    visual: int
    saves: float
    costs: float

    @property
    def pays(self) -> bool:
        """Whether it is pruned."""
        return self.saves > self.costs

    def __str__(self) -> str:
        found = "worthwhile" if self.pays else "left alone"
        saves, costs = f"{1e3 * self.saves:.2g} ms", f"{1e3 * self.costs:.2g} ms"
        return f"{found}: {self.visual} visual tokens; pruning saves {saves} and costs {costs}"


Judge = Callable[[Sequence[Located], Sequence[int], int], Verdict]
"""From the images of a batch, the real columns of its rows and the columns with padding (host integers) to a verdict.

It may not look at the device.
"""
