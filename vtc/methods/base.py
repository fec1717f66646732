"""What a method is: a frozen dataclass that says where tokens leave and which stay. One paper, one file, one subclass.

    class FastV(Scorer):
        def stages(self, model): return (Stage(Layer(2), needs=(Rows(1, of="last"),)),)
        def score(self, stage, tokens): return tokens.signals["last"]

A method never sees a model: :meth:`Method.reduce` gets :class:`vtc.tokens.VisualTokens` and returns a
:class:`Reduction`. Budgets, newlines, tokens that left before, and whether a result is what was promised are the
business of :mod:`vtc.methods.stages`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vtc.budget import Keep, check_keep, count
from vtc.methods.options import check_options, option
from vtc.places import Entry, Place, Tower
from vtc.signals import Signal
from vtc.tokens import Layout, VisualTokens, column
from vtc.values import one_of

Newlines = Literal["candidates", "keep"]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        title: of the paper.
        venue: where it appeared, or ``arXiv``.
        year: when.
        arxiv: its number there; empty: it has none.
    """

    title: str
    venue: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        where = self.venue if self.venue.endswith(str(self.year)) else f"{self.venue} {self.year}"
        return f"{self.title} ({where}{f', arXiv {self.arxiv}' if self.arxiv else ''})"


@dataclass(frozen=True)
class Stage:
    """A place where tokens may leave.

    Attributes:
        at: the place.
        needs: what the method wants to know there, beside the features.
        all_or_nothing: an image loses all of its tokens here, or none; ``Patch.last_keep`` tells what it had.
        number: which of the method's stages it is; filled in.
    """

    at: Place
    needs: tuple[Signal, ...] = ()
    all_or_nothing: bool = False
    number: int = 0


@dataclass(frozen=True)
class Reduction:
    """What a method decided at one stage, for G images.

    Attributes:
        index: LongTensor [G, K], kept places: of row g the first ``counts[g]`` entries are read. In the order of
            picking or of falling score, if ``ordered``.
        features: float [G, K, d], what stands at those places from now on; ``None``: what stood there before.
        counts: how many of each image (host integers); ``None``: as many as the budget said.
        size: float32 [G, K], how many tokens each place stands for; ``None``: as before.
        ordered: whether the order of ``index`` means something.
    """

    index: Tensor
    features: Tensor | None = None
    counts: tuple[int, ...] | None = None
    size: Tensor | None = None
    ordered: bool = True

    @classmethod
    def of_mask(cls, mask: Tensor, counts: tuple[int, ...]) -> Reduction:
        """From bool [G, N] and the numbers of its True entries (host integers)."""
        index = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, : max([0, *counts])]
        return cls(index, counts=counts, ordered=False)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a method may know of a model before anything of it is touched.

    Attributes:
        model_type: of the model's config, for messages.
        width: of the embeddings that enter the language model.
        depth: decoder layers of the language model.
        signals: kinds of signals of the vision tower that this model can give (see :mod:`vtc.signals`).
        has_thumbnail: its large images are a thumbnail and crops whose places in the image are known.
        tower_depth: blocks of the vision tower that the language model gets to see; 0: patches cannot leave in it.
        restores: a token is made of several patches that stand apart: those that leave in the tower come back behind.
        matryoshka: the first m of an image's n tokens are, for every m, what a prompt of m tokens would have.
        projector: the class of its projector, for messages.
    """

    model_type: str
    width: int
    depth: int
    signals: frozenset[str] = frozenset()
    has_thumbnail: bool = False
    tower_depth: int = 0
    restores: bool = False
    matryoshka: bool = False
    projector: str = ""


ANY_MODEL = ModelFacts(model_type="any", width=1, depth=1 << 16, tower_depth=1 << 16)
"""For questions about a method whose answer is the same on every model."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods.

    Attributes:
        keep: float in (0, 1], the fraction of each image's tokens that stays, or int >= 1, the tokens per image.
        newlines: ``candidates``: newline tokens compete with the others and count in the budget; ``keep``: they all
            stay, and the budget is that of the other tokens.
    """

    keep: Keep = 0.25
    newlines: Newlines = option("candidates", one_of, *get_args(Newlines))

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    """Where it comes from; ``None``: a baseline, or something that serves other methods."""
    query_aware: ClassVar[bool] = False
    """True when the question decides what stays; such a keep-set does not fit the next question. A class where that
    depends on the options makes it a property."""
    merges: ClassVar[bool] = False
    """True when :meth:`reduce` returns features: new values stand in the places that stay."""
    nested: ClassVar[bool] = False
    """True when a smaller budget keeps the first of a larger: the order of picking does not depend on how many are
    asked for. Then :mod:`vtc.methods.adaptive` can stop it early."""
    trained: ClassVar[bool] = False
    """True when only models that were trained for it can take it."""
    content_decides: ClassVar[bool] = False
    """True when ``keep`` is the most that stays, 1.0 too, and the content decides how many do. Then :meth:`counts` is
    ``None`` before the language model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))  # a NumPy number becomes a plain one
        check_options(self)

    # -- what a method writes -------------------------------------------------------------------------------------

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Where tokens leave, and what must be known there; by default between projector and language model.

        Raises:
            ValueError: the schedule does not fit the model.
        """
        return (Stage(Entry()),)

    @abstractmethod
    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Decide which tokens stay, and what stands in their places.

        Args:
            stage: one of :meth:`stages`.
            tokens: G images; only those of ``tokens.mask`` may be kept.
            budget: how many to keep of each image, what :meth:`counts` comes to; ``None`` where that is ``None``. Never
                all tokens of all images inside a model: then nobody is asked; ``vtc.select`` asks, for the order.

        Returns:
            Equal for an image alone and beside any others.
        """

    def quota(self, n: int, stage: Stage) -> int:
        """How many of an image's ``n`` tokens are left after a stage; ``n`` is what there was before the first one."""
        return count(self.keep, n)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """How many tokens of each image are left after a stage, from layouts alone.

        Args:
            layouts: of the images.
            stage: default: the last one.
            given: how many of each there were before the method's first stage; default: all.

        Returns:
            Host integers; ``None`` where the content of the images decides.
        """
        stage = stage or Stage(Entry(), number=-1)
        numbers = [layout.length for layout in layouts] if given is None else given
        spared = [self.spared(layout, n) for layout, n in zip(layouts, numbers, strict=True)]
        return tuple(s + self.quota(n - s, stage) for s, n in zip(spared, numbers, strict=True))

    def settle(self, facts: ModelFacts) -> Method:
        """The method with what it left open decided for one model; called once, before :meth:`check`."""
        return self

    def check(self, facts: ModelFacts) -> None:
        """Refuse a model that the method cannot work on; called before anything is touched.

        That the signals of its stages can be had is checked by the caller, afterwards.

        Raises:
            ValueError: with the offending value and what would work.
        """
        return None

    def positions_for(self, asked: str | None) -> str:
        """Which position ids go with the method, ``original`` or ``compact``.

        Args:
            asked: what a caller wants; ``None``: the method's own default.

        Raises:
            ValueError: those asked for do not fit; with the reason.
        """
        return asked or "original"

    @property
    def remedy(self) -> str:
        """What to write instead when a signal is not to be had; empty: methods that need none are named."""
        return ""

    # -- what others ask ------------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods whose stages these are: itself, or the parts of a chain."""
        return (self,)

    def spared(self, layout: Layout, n: int) -> int:
        """Newline tokens that stay unasked, among the ``n`` tokens that an image had."""
        return min(n, len(layout.newlines())) if self.newlines == "keep" else 0

    def signals(self) -> tuple[Signal, ...]:
        """All that its stages need, on a model with room for them."""
        return tuple(signal for member in self.members for s in member.stages(ANY_MODEL) for signal in s.needs)

    @property
    def prunes_at_entry(self) -> bool:
        """Whether tokens leave before the language model; False for methods that only work inside it."""
        if keeps_all(self):
            return False
        return any(stage.at.before_the_model for member in self.members for stage in member.stages(ANY_MODEL))

    @property
    def reads_keep(self) -> bool:
        """Whether ``keep`` says how many stay, or how many at most; False: the picture alone does."""
        return self.content_decides or self.counts([Layout.plain(1 << 16)]) is not None

    @property
    def title(self) -> str:
        """Name and budget, for captions."""
        return f"{self.name}, keep {self.keep}" if self.reads_keep else self.name

    @property
    def acts_in_tower(self) -> bool:
        """Whether patches leave inside the vision tower, whatever ``keep`` says."""
        return any(isinstance(s.at, Tower) for member in self.members for s in member.stages(ANY_MODEL))

    @property
    def reads_layout(self) -> bool:
        """Whether the structure of the tokens decides what stays: newlines, crops, frames."""
        return self.newlines == "keep"


@dataclass(frozen=True, kw_only=True)
class Scorer(Method):
    """Base of the methods that score tokens and keep the highest, ties to the lowest index."""

    nested: ClassVar[bool] = True

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """The highest scores of each image."""
        assert budget is not None
        scores = self.score(stage, tokens).masked_fill(~tokens.mask, -torch.inf)
        return Reduction(highest(scores, max(budget)))

    @abstractmethod
    def score(self, stage: Stage, tokens: VisualTokens) -> Tensor:
        """Float [G, N], finite; what is outside of ``tokens.mask`` does not matter."""


def keeps_all(method: Method) -> bool:
    """Whether every token stays where the keep decides: the float 1.0."""
    return isinstance(method.keep, float) and method.keep == 1.0 and not method.content_decides


def first_of(picks: Tensor, budget: tuple[int, ...], n: int) -> Tensor:
    """Bool [G, n], True at the first ``budget[g]`` entries of row g of LongTensor ``picks`` [G, K]."""
    return marked(read_of(picks, budget, n), n)


def read_of(picks: Tensor, budget: tuple[int, ...], n: int) -> Tensor:
    """LongTensor [G, K]: the first ``budget[g]`` entries of row g of ``picks``, then ``n``, which stands for none."""
    picks = picks[:, : max([0, *budget])]
    unread = torch.arange(picks.shape[1], device=picks.device) >= column(budget, picks.device)
    return picks.masked_fill(unread, n)


def marked(index: Tensor, n: int) -> Tensor:
    """Bool [G, n], True at the entries of LongTensor ``index`` [G, K]; ``n`` stands for none."""
    mask = torch.zeros(index.shape[0], n + 1, dtype=torch.bool, device=index.device)  # the last column takes the n
    return mask.scatter(1, index, True)[:, :n]


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
