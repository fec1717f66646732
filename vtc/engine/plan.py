"""The decision about one batch of prompts: which images are where, what the method keeps, what stands there now."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtc.engine.compaction import Compaction, StageResult
from vtc.engine.locate import Located
from vtc.engine.verdict import Verdict


def columns_of(tokens: Tensor, place: Tensor, batch: int, length: int, other: float = 0) -> Tensor:
    """Values [G, N] of tokens at their columns [batch, length]; LongTensor ``place`` [G, N] says where each sits.

    Places count in the flattened sequence; its end stands for none. Columns of no token have ``other``.
    """
    columns = tokens.new_full((batch * length + 1,), other)
    return columns.scatter(0, place.flatten(), tokens.flatten())[:-1].view(batch, length)


def written_into(sequence: Tensor, place: Tensor, written: Tensor, values: Tensor) -> Tensor:
    """A sequence [B, L, d] with values [G, N, d] where bool [G, N] ``written`` says so; ``place`` as above."""
    rows = torch.cat([sequence.flatten(0, 1), sequence.new_zeros(1, sequence.shape[2])])
    place = place.masked_fill(~written, len(rows) - 1).flatten()
    return rows.index_copy(0, place, values.flatten(0, 1).to(rows.dtype))[:-1].view_as(sequence)


def check_no_gradient(name: str, sequence: Tensor) -> None:
    """Refuse to merge where somebody trains.

    Raises:
        NotImplementedError: a gradient is wanted, and would be lost.
    """
    if sequence.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name} merges tokens, and no gradient flows through that; run it under torch.no_grad(), or train with a "
            "method that only drops tokens"
        )


@dataclass(frozen=True)
class Merged:
    """New values of visual tokens, in the embedding space of the language model.

    Attributes:
        features: float [G, N, d]; old values where nothing was written.
        written: bool [G, N], where there is a new one.
        size: float32 [G, N], how many tokens a place stands for.
    """

    features: Tensor
    written: Tensor
    size: Tensor

    def into(self, embeds: Tensor, flat: Tensor) -> Tensor:
        """Write them into embeddings [B, L, d]; LongTensor ``flat`` [G, N] says where each token sits."""
        return written_into(embeds, flat, self.written, self.features)


@dataclass(frozen=True)
class Plan:
    """The decision for one batch of prompts.

    Attributes:
        images: what was found, by row.
        keep: bool [G, N], which of each image's tokens stay (on the model's device).
        counts: how many (host integers).
        merged: what stands in the places of those that stay, where the method merges.
        order: LongTensor [G, K], the tokens that the method chose, in its own order; ``None``: it has none.
        chosen: how many of each image's row of ``order`` are meant (host integers).
        entered: how many there were before a method's first stage, by the identity of the method.
        flat: LongTensor [G, N], where each token sits in the flattened batch; padding points past its end.
        size: float32 [G, N], how many tokens a place stands for; ``None``: one each.
        given: tokens of each image that can be seen at all: those that the mask does not hide (host integers).
        verdict: whether pruning pays, where somebody asked.
    """

    images: list[Located]
    keep: Tensor
    counts: tuple[int, ...]
    flat: Tensor
    given: tuple[int, ...]
    merged: Merged | None = None
    order: Tensor | None = None
    chosen: tuple[int, ...] = ()
    entered: dict[int, tuple[int, ...]] = field(default_factory=dict)
    size: Tensor | None = None
    verdict: Verdict | None = None

    @classmethod
    def of_all(cls, images: list[Located], flat: Tensor, verdict: Verdict) -> Plan:
        """All stay."""
        counts = tuple(image.layout.length for image in images)
        keep = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        return cls(images, keep.to(flat.device, non_blocking=True), counts, flat, counts, verdict=verdict)

    @property
    def left_alone(self) -> bool:
        """Nothing is done to this prompt, since it would not pay."""
        return self.verdict is not None and not self.verdict.pays

    @property
    def drops(self) -> bool:
        """Whether anything goes."""
        return self.counts != self.given

    def without_hidden(self, mask: Tensor) -> Plan:
        """The same of what a mask [B, N] does not hide; a host sync, and only where a caller hides image tokens.

        What a method chooses does not depend on the mask; what is hidden leaves with the padding.
        """
        seen = torch.cat([mask.bool().flatten(), mask.new_zeros(1, dtype=torch.bool)]).to(self.flat.device)[self.flat]
        keep = self.keep & seen
        return replace(self, keep=keep, counts=tuple(keep.sum(1).tolist()), given=tuple(seen.sum(1).tolist()))

    def kept(self, batch: int, keep: Tensor | None = None) -> list[list[Tensor]]:
        """Kept indices among each image's tokens, by sample and image; or those of another bool [G, N]."""
        samples: list[list[Tensor]] = [[] for _ in range(batch)]
        for image, row in zip(self.images, (self.keep if keep is None else keep).cpu(), strict=True):
            samples[image.row].append(row.nonzero()[:, 0])
        return samples


@dataclass(frozen=True)
class Prefill:
    """What the last prompt with images came to, to look at afterwards.

    Attributes:
        plan: the entry stage's decision.
        compaction: the columns it left, ``None`` if nothing was dropped.
        lengths: real columns of each sample's prompt, before anything was dropped (host integers).
        history: what was left after each stage inside the model.
    """

    plan: Plan
    compaction: Compaction | None
    lengths: tuple[int, ...]
    history: list[StageResult]

    def kept(self) -> list[tuple[int, list[list[Tensor]]]]:
        """(layers run before, kept indices by sample and image): at entry, and after each stage."""
        batch = len(self.lengths)
        inside = [(stage.after, self.plan.kept(batch, stage.alive)) for stage in self.history]
        return [(0, self.plan.kept(batch)), *inside]
