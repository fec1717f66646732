"""What a method is: a frozen dataclass that turns visual tokens into picks. One paper, one file, one subclass."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from vtc.budget import Keep, check_keep, count
from vtc.tokens import InsideTokens, VisualTokens

Newlines = Literal["candidates", "keep"]
M = TypeVar("M", bound="type[Method]")

_REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Stage:
    """A place between two decoder layers where tokens may leave.

    Attributes:
        after: how many layers run before, 1 <= after < depth (papers count layers from 1: "after layer 7").
        signals: names of ``InsideTokens.signals`` that :meth:`Method.keep_inside` reads there.
        attention: index, from 0, of the layer whose attention rows make ``instruction``, ``last`` and the two shares;
            its q and k projections are applied to what enters it. Default: the next layer, ``after``.
        transitions: indices, from 0, of the layers whose transitions are summed up to here.
    """

    after: int
    signals: frozenset[str] = frozenset()
    attention: int | None = None
    transitions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods.

    Attributes:
        keep: float in (0, 1], the fraction of each image's tokens that stays, or int >= 1, the tokens per image.
        newlines: ``candidates``: newline tokens compete with the others and count in the budget; ``keep``: they all
            stay, and the budget is that of the other tokens.
    """

    keep: Keep = 0.25
    newlines: Newlines = "candidates"

    name: ClassVar[str]
    query_aware: ClassVar[bool] = False
    """True when the question decides what stays; such a keep-set does not fit the next question."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))  # a NumPy number becomes a plain one
        if self.newlines not in ("candidates", "keep"):
            raise ValueError(f"newlines={self.newlines!r} is neither 'candidates' nor 'keep'")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the signals (see ``VisualTokens.signals``) without which :meth:`select` cannot run."""
        return frozenset()

    @property
    def remedy(self) -> str:
        """What to write instead when a needed signal is not to be had; completes the error message."""
        return "methods that need no such signal: " + ", ".join(
            n for n, m in sorted(_REGISTRY.items()) if not m().needs
        )

    def budget(self, tokens: VisualTokens) -> tuple[int, ...]:
        """Tokens kept of each image; a later allocator may move the shares between images."""
        return tuple(count(self.keep, n) for n in tokens.lengths)

    def stages(self, depth: int) -> tuple[Stage, ...]:
        """Where tokens leave inside a language model of ``depth`` layers, in order; nowhere by default.

        Raises:
            ValueError: the schedule does not fit a model of that depth.
        """
        return ()

    def transition(self, before: Tensor, after: Tensor, real: Tensor, visual: Tensor) -> Tensor:
        """Score how one module (attention or MLP) changes each token; for stages that ask for ``transition``.

        Args:
            before: [B, L, d], the module's input, after its norm.
            after: [B, L, d], its output, before the residual addition.
            real: bool [B, L], False for padding.
            visual: bool [B, L], True for visual tokens.

        Returns:
            Float32 [B, L].
        """
        raise NotImplementedError(f"{type(self).__name__} asks for transitions but does not score them")

    def keep_inside(self, index: int, tokens: InsideTokens) -> tuple[Tensor, tuple[int, ...]]:
        """Which tokens survive stage ``index`` of :meth:`stages`.

        Returns:
            Bool [G, N], a subset of ``tokens.alive``, and how many that is for each image (host integers).
        """
        raise NotImplementedError(f"{type(self).__name__} has stages but does not choose in them")

    @abstractmethod
    def select(self, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
        """Pick tokens.

        Args:
            tokens: G images, padded to N tokens.
            budget: how many to pick of each, 1 <= budget[g] <= tokens.lengths[g].

        Returns:
            LongTensor [G, max(budget)]: token indices in pick order, without repeats among the first ``budget[g]``
            entries of row g, which alone are read. Equal for an image alone and beside any others.
        """

    def keep_mask(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
        """Which tokens stay: the one call the engine makes. Never waits for the device if :meth:`budget` does not.

        Returns:
            Bool [G, N], True for the tokens that stay (False for padding), and how many that is for each image.

        Raises:
            ValueError: :meth:`select` returned another shape than promised.
        """
        candidates, index = tokens.without_newlines() if self.newlines == "keep" else (tokens, None)
        budget = self.budget(candidates)
        device = tokens.features.device
        if budget == candidates.lengths:
            return tokens.mask, tokens.lengths
        picks = self.select(candidates, budget)
        if picks.ndim != 2 or picks.shape[0] != len(budget) or picks.shape[1] < max(budget):
            raise ValueError(
                f"{type(self).__name__}.select returned picks of shape {tuple(picks.shape)}, "
                f"not ({len(budget)}, {max(budget)})"
            )
        picks = picks[:, : max(budget)]
        if index is not None:
            picks = index.gather(1, picks)
        counts = torch.tensor(budget).to(device, non_blocking=True)
        unread = torch.arange(picks.shape[1], device=device) >= counts[:, None]
        n = tokens.features.shape[1]
        mask = torch.zeros(len(budget), n + 1, dtype=torch.bool, device=device)  # the last column takes the unread
        mask = mask.scatter(1, picks.masked_fill(unread, n), True)[:, :n]
        if index is None:
            return mask, budget
        newlines = tokens.mask & ~tokens.where("image", "thumbnail", "crops", "frame")
        return mask | newlines, tuple(
            b + n - m for b, n, m in zip(budget, tokens.lengths, candidates.lengths, strict=True)
        )


def image_seed(seed: int, ordinal: int, length: int) -> int:
    """A 63-bit seed for what a method draws for one image: the same on every machine and in every batch.

    Args:
        seed: the user's, any int.
        ordinal: index of the image inside its sample.
        length: its number of tokens.
    """
    digest = hashlib.blake2b(f"{seed} {ordinal} {length}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def register_method(cls: M) -> M:
    """Class decorator: make a :class:`Method` known under its ``name`` (to ``vtc.patch``, configs and the CLI).

    Raises:
        ValueError: the name is taken, not lower case, or missing.
    """
    name = getattr(cls, "name", None)
    if not name or name != name.lower():
        raise ValueError(f"{cls.__name__}.name={name!r}: a method needs a lower-case name")
    if _REGISTRY.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"a method named {name!r} exists already: {_REGISTRY[name].__qualname__}")
    _REGISTRY[name] = cls
    return cls


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        ValueError: unknown; the message suggests the nearest names.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        near = difflib.get_close_matches(str(name).lower(), _REGISTRY, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(list_methods())}"
        raise ValueError(f"unknown method {name!r}; {hint}") from None


def make_method(name: str, **options: Any) -> Method:
    """Build a method by name; options it does not have are refused by name."""
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{name} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known)}")
    return cls(**options)


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_REGISTRY)
