"""The three kinds of signals: of the vision tower, of the prompt, of the language model."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from vtc.values import number, shown, whole

if TYPE_CHECKING:
    from vtc.dialect.towers import Heard, Tower


@dataclass(frozen=True, kw_only=True)
class Signal(ABC):
    """Something that a stage needs to know.

    Attributes:
        name: its key in ``tokens.signals``; empty: its kind. Two signals of a kind at one stage need two names.
    """

    name: str = ""

    kind: ClassVar[str]
    """What it is called where a model's offers are listed."""
    wide: ClassVar[bool] = False
    """A vector for every token, not a number."""

    @property
    def key(self) -> str:
        """Where a method finds it in ``tokens.signals``."""
        return self.name or self.kind

    def bare(self, features: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
        """What ``vtc.select`` makes of features [1, N, d] and tensors given, where this is not among them."""
        return None

    def blank(self, images: int, tokens: int) -> Tensor:
        """What it would be where there is nothing to see."""
        return torch.zeros(images, tokens)

    def drawn(self, images: int, tokens: int, width: int) -> dict[str, Tensor]:
        """Something of its shape, drawn at random, and what has to be known beside it: to see how long a method takes.

        Args:
            images: G.
            tokens: of each.
            width: of vectors.
        """
        like = self.blank(images, tokens)
        if self.wide:
            like = like[..., None].expand(*like.shape, width)
        return {self.key: torch.rand(like.shape) if like.is_floating_point() else like}

    @property
    def axes(self) -> dict[str, int | None]:
        """By key, the axis of the tokens where it is not the second of two or more."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TowerSignal(Signal):
    """A number or a vector for every patch, read from one module while the vision tower runs.

    The adapter of the family sends it the way of the features, so that a method finds it token by token: float
    [G, N] or [G, N, c], 0 for newlines and padding.

    Attributes:
        layer: of the tower. An int counts as Python does; a float in [0, 1) is a share of its depth, cut to an index:
            1/3 is index 8 of 24 layers and index 1 of 4.
    """

    layer: int | Any = -1  # or a float; what :meth:`module` sees is an int

    needs_cls: ClassVar[bool] = False
    """Only towers with a CLS token have it."""
    reads: ClassVar[Literal["input", "output"]] = "input"
    recomputes: ClassVar[bool] = False
    """It computes attention again: that is tried out when a model is patched."""
    inside: ClassVar[bool] = False
    """Only stages inside the tower can have it: it cannot go the way of the features."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", tower_layer("layer", self.layer))

    @abstractmethod
    def module(self, tower: Tower) -> nn.Module | None:
        """What it reads, ``None`` where this tower has no such thing. ``layer`` is an int here, of a layer it has."""

    @abstractmethod
    def read(self, tower: Tower, module: nn.Module, hidden: Tensor, heard: Heard) -> Tensor:
        """Make the signal.

        Args:
            tower: the tower.
            module: from :meth:`module`.
            hidden: [pictures, special + patches, width], what enters the module, or leaves it (see ``reads``); of a
                packed tower [1, patches of all pictures, width].
            heard: what the module is called with beside it: rotary embedding, mask, where sequences end.

        Returns:
            float32 [pictures, patches], or [pictures, patches, c]: special tokens (CLS) left out.
        """

    def of(self, tower: Tower | None) -> nn.Module | None:
        """The module of a tower that it reads; ``None`` where the tower cannot give it."""
        if tower is None or (self.needs_cls and not tower.special):
            return None
        index = self.index(tower)
        return replace(self, layer=index).module(tower) if 0 <= index < len(tower.layers) else None

    def index(self, tower: Tower) -> int:
        """Its layer, counted from 0; out of bounds where the tower has no such layer."""
        depth = len(tower.layers)
        if isinstance(self.layer, float):
            return int(self.layer * depth + 1e-9)
        return self.layer if self.layer >= 0 else depth + self.layer


def tower_layer(name: str, layer: float) -> float:
    """A layer of a vision tower as it is written: an int, or a float that is a share of the depth.

    Raises:
        TypeError: not a number.
        ValueError: a float outside of [0, 1).
    """
    rule = "layers of a vision tower are an int, counted as Python does, or a float in [0, 1), a share of its depth"
    if isinstance(layer, numbers.Integral):
        return whole(name, layer, rule)
    found = number(name, layer, rule)
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{name}={shown(layer)}: {rule}")
    return found


@dataclass(frozen=True, kw_only=True)
class PromptSignal(Signal):
    """Something of the prompt around the images, as it stands at the entrance of the language model."""

    @abstractmethod
    def read(self, embeds: Tensor, text: Tensor, samples: Sequence[int]) -> dict[str, Tensor]:
        """Make the signal, and what has to be known beside it.

        Args:
            embeds: [B, L, d].
            text: bool [B, L], True for text: what is neither visual nor padding.
            samples: the row of each of the G images.

        Returns:
            Tensors [G, ...] by name; the first has the signal's :attr:`key`.
        """


class RowsView(Protocol):
    """Rows of one layer's attention."""

    @property
    def new_keys(self) -> Tensor:
        """[B, Hkv, M, dh], keys of the M columns, after RoPE."""
        ...

    def mean(self) -> Tensor:
        """Float32 [B, M]: attention to the columns, averaged over heads and rows that are there."""
        ...

    def last(self) -> Tensor:
        """The same of the last row alone."""
        ...

    def each(self) -> Tensor:
        """Float32 [B, T, M]: the same of every row by itself; of the last column where no row is there."""
        ...


class LayerView(Protocol):
    """What a signal of the language model sees: one layer, about to run, and the sequence in front of it."""

    hidden: Tensor
    """[B, M, d], what enters the layer."""
    visual: Tensor
    """bool [B, M]: columns of visual tokens that are still there."""
    valid: Tensor
    """bool [B, M]: columns that are no padding."""
    text: Tensor
    """bool [B, M]: real text behind the last image of each sample that has one."""
    room: int
    """T of what is made of text: the same at every layer of a prompt."""
    bidirectional: bool
    """Whether visual rows may look ahead (prefix-LM families)."""

    def rows(self, which: Literal["text", "visual"]) -> RowsView:
        """Rows of the layer's attention, from its own norm, projections and rotary embedding."""
        ...

    def per_token(self, columns: Tensor) -> Tensor:
        """Of columns [B, M, ...], those of the images' tokens [G, N, ...], 0 where they left."""
        ...

    def per_text(self, columns: Tensor) -> Tensor:
        """Of columns [B, M, ...], those of ``text`` [G, T, ...]: in order, at the end, 0 in front of them."""
        ...

    def per_image(self, samples: Tensor) -> Tensor:
        """Of samples [B, ...], those of the images [G, ...]."""
        ...


@dataclass(frozen=True)
class DecoderSignal(Signal):
    """Something that the layers of the language model do in the prefill.

    Attributes:
        layer: counted from 0; its norm and projections are applied to what enters it.
    """

    layer: int

    needs_rows: ClassVar[bool] = True
    """It recomputes queries or keys, which the layers must have projections for."""

    def watched(self) -> Iterator[int]:
        """Layers whose modules it watches while they run."""
        return iter(())

    @property
    def scorer(self) -> DecoderSignal:
        """Signals with equal scorers score a module alike, so that one does it for all."""
        return self

    def read(self, view: LayerView) -> Tensor | dict[str, Tensor]:
        """Make the signal at its layer: [G, N] or [G, N, c] by token, [G] by image, or what :attr:`axes` says.

        Where something has to be known beside it, tensors by name; the first has the signal's :attr:`key`.
        """
        raise NotImplementedError

    def score(self, before: Tensor, after: Tensor, real: Tensor, visual: Tensor) -> Tensor:
        """Score what one module (attention or MLP) of a watched layer does to each token; summed up over modules.

        Args:
            before: [B, L, d], the module's input, after its norm.
            after: [B, L, d], its output, before the residual addition.
            real: bool [B, L], False for padding.
            visual: bool [B, L], True for visual tokens.

        Returns:
            Float32 [B, L].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ColumnSignal(DecoderSignal):
    """Something that every column of a layer's sequence has: of visual tokens [G, N, ...], or of text [G, T, ...].

    Attributes:
        layer: counted from 0.
        of: ``visual``: of the images' tokens; ``text``: of the text behind the last image, as in :class:`LayerText`.
    """

    of: Literal["visual", "text"] = "visual"

    @property
    def key(self) -> str:
        """Its kind, ``text_`` in front of it for text."""
        return self.name or (f"text_{self.kind}" if self.of == "text" else self.kind)

    @property
    def axes(self) -> dict[str, int | None]:
        """Text has none of visual tokens."""
        return {self.key: None} if self.of == "text" else {}

    def drawn(self, images: int, tokens: int, width: int) -> dict[str, Tensor]:
        """Of text, for one word."""
        return super().drawn(images, 1 if self.of == "text" else tokens, width)

    def chosen(self, view: LayerView, columns: Tensor) -> Tensor:
        """Of columns [B, M, ...] those that it is of."""
        return view.per_text(columns) if self.of == "text" else view.per_token(columns)


def keys_of(signals: Sequence[Signal]) -> dict[str, Any]:
    """Signals by key.

    Raises:
        ValueError: two different ones have the same.
    """
    found: dict[str, Any] = {}
    for signal in signals:
        if found.setdefault(signal.key, signal) != signal:
            raise ValueError(f"{found[signal.key]} and {signal} have the same name; give one of them another")
    return found
