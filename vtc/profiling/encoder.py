"""What a vision tower and its projector cost: FLOPs and bytes, by the rules of :mod:`vtc.costs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.costs import Cost, Matrices, attention_of, matrices_of, named_matrices, width_of
from vtc.dialect.towers import TOWERS
from vtc.feed import Feed
from vtc.models import Parts
from vtc.modules import MatryoshkaQueryTransformer
from vtc.profiling.towers import tower_of

_ASIDE = {*TOWERS, "video_tower", "audio_tower", "embed_audio"}
"""Modules beside the language model that are no projector."""


@dataclass(frozen=True)
class Encoder:
    """A vision tower and the projector behind it.

    Attributes:
        embedding: entries of the patch embedding.
        blocks: of each layer: matrices, width of the attention, whether it is windowed.
        merger: what the tower does with merged patches.
        pooler: a head that looks at a whole picture once, as SigLIP's; transformers runs it, though nothing
            reads its output.
        projector: what stands between tower and language model.
        size: bytes per number.
        resampler: what stands there instead, if it is one.
    """

    embedding: int
    blocks: tuple[tuple[Matrices, int, bool], ...]
    merger: Matrices
    pooler: tuple[nn.Module, ...]
    projector: Matrices
    size: int = 2
    resampler: MatryoshkaQueryTransformer | None = None

    @classmethod
    def of(cls, parts: Parts, modality: str = "image") -> Encoder:
        """Read off a model's tower for images or videos, and its projector.

        Raises:
            ValueError: it has none, or one that is built unlike all known ones.
        """
        tower = tower_of(parts, modality)
        stack = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and _attends(m)), None)
        if stack is None:
            raise ValueError(
                f"the vision tower {type(tower).__name__} has no layers with attention that vtc could count"
            )
        config: Any = tower.config
        full = getattr(config, "fullatt_block_indexes", None)
        blocks = tuple(
            (matrices_of(block, config), width_of(block), full is not None and at not in full)
            for at, block in enumerate(stack)
        )
        counted = {id(parameter) for parameter in stack.parameters()}
        pooler = tuple(m for n, m in tower.named_modules() if n.rpartition(".")[2] == "head")
        counted |= {id(parameter) for head in pooler for parameter in head.parameters()}
        embedding = {id(p): e for n, p, e in named_matrices(tower) if "patch_" in n and id(p) not in counted}
        counted |= embedding.keys()
        merger = matrices_of(tower, config, without=counted)
        others = [m for n, m in parts.base.named_children() if n not in _ASIDE and m is not parts.decoder]
        dense = sum(matrices_of(module, config).dense for module in others)
        resampler = next((m for m in others if isinstance(m, MatryoshkaQueryTransformer)), None)
        return cls(sum(embedding.values()), blocks, merger, pooler, Matrices(dense), resampler=resampler)

    def vision(
        self, feed: Feed, batch: int = 1, sequences: Sequence[tuple[int, ...]] | None = None, left: int = 0
    ) -> Cost:
        """The tower's part, for ``batch`` such images.

        Args:
            feed: of the image.
            batch: how many.
            sequences: rows that see each other under a patch, in each block that is read (those behind run on one);
                default: the feed's. Windows are taken to lose the same share each.
            left: merged rows that left before they were merged.
        """
        rows = sum(feed.sequences)
        flops = 2.0 * (self.embedding * feed.patches + self.merger.met * (feed.projected - left))
        weights: float = self.embedding + self.merger.dense
        windowed = sum(count * n * n for n, count in feed.windows)
        for at, (matrices, width, narrow) in enumerate(self.blocks):
            there = feed.sequences
            if sequences is not None:
                there = sequences[at] if at < len(sequences) else (1,) * len(there)
            pairs = windowed * (sum(there) / rows) ** 2 if narrow else sum(n * n for n in there)
            flops += 2 * matrices.met * sum(there) + 4 * pairs * width
            weights += matrices.read(sum(there) * batch)
        for head in self.pooler:
            pooling, entries = _pooler_flops(head, rows, len(feed.sequences))
            flops, weights = flops + pooling, weights + entries
        return Cost(batch * flops, self.size * weights)

    def projection(self, feed: Feed, batch: int = 1, left: int = 0) -> Cost:
        """The projector's part, for ``batch`` such images, of each of which so many rows left before."""
        if self.resampler is not None:
            products, entries = self.resampler.products(feed.projected)
            return Cost(2.0 * batch * products, self.size * entries)
        return Cost(2.0 * batch * self.projector.met * (feed.projected - left), self.size * self.projector.dense)


def _attends(stack: nn.ModuleList) -> bool:
    return bool(len(stack)) and attention_of(stack[0]) is not None


def _pooler_flops(head: nn.Module, rows: int, pictures: int) -> tuple[float, int]:
    """FLOPs and entries of an attention-pooling head: keys and values of all rows, all else once per picture."""
    attention = next((m for m in head.modules() if isinstance(m, nn.MultiheadAttention)), None)
    entries = sum(count for _, _, count in named_matrices(head))
    if attention is None:
        return 2.0 * entries * pictures, entries
    d = attention.embed_dim
    return 2.0 * (2 * d * d * rows + (entries - 2 * d * d) * pictures) + 4.0 * rows * d, entries
