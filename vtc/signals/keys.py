"""Keys: of a layer of the vision tower, or of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect.towers import Heard, Tower
from vtc.signals.base import DecoderSignal, LayerView, TowerSignal


@dataclass(frozen=True, kw_only=True)
class TowerKeys(TowerSignal):
    """What a layer's key projection makes of a patch, averaged over heads: [G, N, dh], before any rotation."""

    kind: ClassVar[str] = "keys"
    recomputes: ClassVar[bool] = True

    def module(self, tower: Tower) -> nn.Module | None:
        """The layer's attention."""
        return tower.attention(self.layer)

    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """One projection."""
        return inner.project_in_tower(module, hidden, "k").float().mean(1)[:, tower.special :]


@dataclass(frozen=True)
class LayerKeys(DecoderSignal):
    """Keys in a layer of the language model, after RoPE, heads side by side: [G, N, Hkv * dh], or [G, T, Hkv * dh].

    Attributes:
        layer: counted from 0.
        of: ``visual``: of the images' tokens; ``text``: of the text behind the last image, as in :class:`LayerText`.
    """

    of: Literal["visual", "text"] = "visual"

    kind: ClassVar[str] = "layer_keys"

    @property
    def key(self) -> str:
        """``layer_keys``, or ``text_layer_keys``."""
        return self.name or (f"text_{self.kind}" if self.of == "text" else self.kind)

    @property
    def axes(self) -> dict[str, int | None]:
        """Text has none of visual tokens."""
        return {self.key: None} if self.of == "text" else {}

    def read(self, view: LayerView) -> Tensor:
        """Those that the layer's attention rows are made with."""
        keys = view.rows("text").new_keys.transpose(1, 2).flatten(2).float()  # [B, M, Hkv * dh]
        return view.per_text(keys) if self.of == "text" else view.per_token(keys)
