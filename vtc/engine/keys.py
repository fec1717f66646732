"""What calibrated attention has to know of keys: plain tensors that live with the cache, and no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.ops.calibration import size_bias


@dataclass(frozen=True)
class Keys:
    """Some keys of one kind of layers, in the order in which they are stored.

    Attributes:
        log_size: float32 [B, P], the logarithm of how many tokens each stands for.
        visual: bool [B, P], those of images.
        turns: float32 [B, P, r], how each is rotated (:func:`vtc.ops.calibration.turns`); ``None``: nobody asks.
    """

    log_size: Tensor
    visual: Tensor
    turns: Tensor | None = None

    @classmethod
    def of(cls, size: Tensor, visual: Tensor) -> Keys:
        """From sizes [B, P]."""
        return cls(size_bias(size), visual)

    @classmethod
    def plain(cls, batch: int, length: int, device: torch.device) -> Keys:
        """Text: one token each."""
        none = torch.zeros(batch, length, device=device)
        return cls(none, none.bool())

    @property
    def length(self) -> int:
        """P."""
        return self.log_size.shape[1]

    def between(self, start: int, end: int) -> Keys:
        """Those of slots ``start .. end``."""
        turns = None if self.turns is None else self.turns[:, start:end]
        return Keys(self.log_size[:, start:end], self.visual[:, start:end], turns)

    def then(self, others: Keys) -> Keys:
        """These, and others behind them."""
        turned = self.turns is not None and others.turns is not None
        return Keys(
            torch.cat([self.log_size, others.log_size], dim=1),
            torch.cat([self.visual, others.visual], dim=1),
            torch.cat([self.turns, others.turns], dim=1) if turned else None,  # type: ignore[list-item]
        )

    def rows(self, index: Tensor) -> Keys:
        """Rows reordered, repeated or selected."""
        index = index.to(self.log_size.device)
        turns = None if self.turns is None else self.turns.index_select(0, index)
        return Keys(self.log_size.index_select(0, index), self.visual.index_select(0, index), turns)
