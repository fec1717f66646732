"""A picture as its size, and what a model is fed of it, as counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtc.values import shown

SHARPEST = 10_000
"""Pixels per side beyond which a size is taken for a slip."""


@dataclass(frozen=True)
class Picture:
    """What is asked about: an image, or a video of ``frames`` such images; sides in pixels."""

    width: int
    height: int
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames"):
            value = getattr(self, name)
            if value is None and name == "frames":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={shown(value)} is no whole number")
            if not 1 <= value <= SHARPEST:
                raise ValueError(f"{name}={value} must lie in [1, {SHARPEST}]; an image is WIDTHxHEIGHT pixels")

    @property
    def modality(self) -> str:
        """``image`` or ``video``."""
        return "image" if self.frames is None else "video"

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + ("" if self.frames is None else f" x {self.frames} frames")


@dataclass(frozen=True)
class Feed:
    """One image or video on its way to the language model, as counts.

    Attributes:
        sequences: rows of the vision tower that see each other: one entry for each picture or frame, CLS included.
        patches: patches embedded, over all pictures.
        projected: rows that the projector gets, as does a merger at the end of the tower.
        lengths: visual tokens, by entry of the encoder's output, as the adapter's layouts expect them.
        words: what becomes of the picture, for people.
        windows: of windowed layers: (rows, how many windows have so many).
        arguments: what the encoder is called with, as far as the adapter's layouts ask for it.
    """

    sequences: tuple[int, ...]
    patches: int
    projected: int
    lengths: tuple[int, ...]
    words: str
    windows: tuple[tuple[int, int], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
