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
from vtc.methods.returns import check_budget, check_kept, check_picks, check_stages
from vtc.tokens import InsideTokens, VisualTokens, column
from vtc.values import shown

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
        removes_all: a sample loses all of its visual tokens here, or none; ``Patch.last_keep`` tells what it had.
    """

    after: int
    signals: frozenset[str] = frozenset()
    attention: int | None = None
    transitions: tuple[int, ...] = ()
    removes_all: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a method may know of a model before anything of it is touched.

    Attributes:
        model_type: of the model's config, for messages.
        width: of the embeddings that enter the language model.
        depth: decoder layers of the language model.
        signals: names that ``VisualTokens.signals`` can have on this model.
        has_thumbnail: its large images are a thumbnail and crops whose places in the image are known.
        has_text_tower: it can embed a text and an image in one space, as CLIP does.
    """

    model_type: str
    width: int
    depth: int
    signals: frozenset[str] = frozenset()
    has_thumbnail: bool = False
    has_text_tower: bool = False


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
    """True when the question decides what stays; such a keep-set does not fit the next question. A class where that
    depends on the options makes it a property."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))  # a NumPy number becomes a plain one
        if self.newlines not in ("candidates", "keep"):
            raise ValueError(f"newlines={shown(self.newlines)} is neither 'candidates' nor 'keep'")

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

    @property
    def enters(self) -> bool:
        """Whether tokens leave before the language model; False for methods that only work inside it."""
        return not (isinstance(self.keep, float) and self.keep == 1.0)

    @property
    def reads_layout(self) -> bool:
        """Whether the structure of the tokens decides what stays: newlines, crops, frames."""
        return self.newlines == "keep"

    def settle(self, facts: ModelFacts) -> Method:
        """The method with what it left open decided for one model; called once, before :meth:`check`."""
        return self

    def check(self, facts: ModelFacts) -> None:
        """Refuse a model that the method cannot work on; called before anything is touched.

        That :attr:`needs` are met is checked by the caller, afterwards.

        Raises:
            ValueError: with the offending value and what would work.
        """
        check_stages(self, self.stages(facts.depth), facts.depth)

    def budget(self, tokens: VisualTokens) -> tuple[int, ...]:
        """Tokens kept of each image."""
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

    def choose(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
        """Budget, then selection. Arguments and result as :meth:`keep_mask`, but newlines are tokens like any other."""
        budget = check_budget(self, self.budget(tokens), tokens.lengths)
        if budget == tokens.lengths:
            return tokens.mask, budget
        return selection(self, tokens, budget), budget

    def keep_mask(self, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
        """Which tokens stay. Never waits for the device if :meth:`choose` does not.

        Returns:
            Bool [G, N], True for the tokens that stay (False for padding), and how many that is for each image.

        Raises:
            ValueError: :meth:`select` or :meth:`budget` returned something else than promised.
        """
        if self.newlines == "candidates":
            return self.choose(tokens)
        bare, index = tokens.without_newlines()
        chosen, counts = self.choose(bare)
        newlines = tokens.mask & ~tokens.where("image", "thumbnail", "crops", "frame")
        mask = newlines | marked(index.masked_fill(~chosen, -1), tokens.features.shape[1])
        lost = [n - m for n, m in zip(tokens.lengths, bare.lengths, strict=True)]
        return mask, tuple(k + n for k, n in zip(counts, lost, strict=True))


def selection(method: Method, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
    """Bool [G, N]: what a method's :meth:`Method.select` picks.

    Raises:
        ValueError: it returned something else than promised; on CUDA, wrong values of methods that are not vtc's own
            end in an assertion of the device.
    """
    picks = method.select(tokens, budget)
    check_picks(method, picks, budget, tokens.lengths, tokens.features)
    return first_of(picks, budget, tokens.features.shape[1])


def entering(method: Method, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
    """What a method's :meth:`Method.keep_mask` keeps: the one call the engine makes before the language model.

    Raises:
        ValueError: the method returned something else than promised.
    """
    kept = method.keep_mask(tokens)
    if type(method).keep_mask is Method.keep_mask and type(method).choose is Method.choose:
        return kept  # looked at already
    call = "choose" if type(method).keep_mask is Method.keep_mask else "keep_mask"
    return check_kept(method, call, kept, tokens.mask, tokens.lengths)


def surviving(method: Method, index: int, tokens: InsideTokens) -> tuple[Tensor, tuple[int, ...]]:
    """What a method's :meth:`Method.keep_inside` keeps.

    Raises:
        ValueError: it returned something else than promised.
    """
    return check_kept(method, "keep_inside", method.keep_inside(index, tokens), tokens.alive, tokens.counts)


def first_of(picks: Tensor, budget: tuple[int, ...], n: int) -> Tensor:
    """Bool [G, n], True at the first ``budget[g]`` entries of row g of LongTensor ``picks`` [G, K]."""
    picks = picks[:, : max(budget)]
    unread = torch.arange(picks.shape[1], device=picks.device) >= column(budget, picks.device)
    return marked(picks.masked_fill(unread, -1), n)


def marked(index: Tensor, n: int) -> Tensor:
    """Bool [G, n], True at the entries of LongTensor ``index`` [G, K]; -1 stands for none."""
    mask = torch.zeros(index.shape[0], n + 1, dtype=torch.bool, device=index.device)  # the last column takes the -1
    return mask.scatter(1, index.masked_fill(index < 0, n), True)[:, :n]


def highest(scores: Tensor, k: int) -> Tensor:
    """LongTensor [G, k]: the k highest of each row of ``scores`` [G, N], in descending order, ties by lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


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
        raise ValueError(f"{cls.__name__}.name={shown(name)}: a method needs a lower-case name")
    if _REGISTRY.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"a method named {shown(name)} exists already: {_REGISTRY[name].__qualname__}")
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
        raise ValueError(f"unknown method {shown(name)}; {hint}") from None


def make_method(name: str, **options: Any) -> Method:
    """Build a method by name; options it does not have are refused by name."""
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{name} has no option {', '.join(map(shown, unknown))}; its options: {', '.join(known)}")
    return cls(**options)


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_REGISTRY)
