"""What signals of one layer see of a prefill."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vtc.engine.inside import LayerState
from vtc.engine.rows import AttentionRows


class View:
    """The sequence in front of one layer; rows are projected once for all signals, and only if one asks for them."""

    def __init__(
        self,
        inside: LayerState,
        hidden: Tensor,
        bidirectional: bool,
        project: Callable[[Tensor, int], AttentionRows],
    ) -> None:
        self.inside, self.hidden, self.bidirectional, self._project = inside, hidden, bidirectional, project
        self.visual, self.valid = inside.visual, inside.valid
        self.text, self._longest = inside.text_behind()
        self.room = max(1, self._longest)
        self.per_token, self.per_text, self.per_image = inside.per_token, inside.per_text, inside.per_image
        self._rows: dict[str, AttentionRows] = {}

    def rows(self, which: str) -> AttentionRows:
        """``text`` or ``visual``."""
        if which not in self._rows:
            wanted = (self.text, self._longest) if which == "text" else (self.visual, max(self.inside.seen_by_row()))
            self._rows[which] = self._project(*wanted)
        return self._rows[which]
