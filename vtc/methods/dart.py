"""DART: stop looking for important tokens, duplication matters more (EMNLP 2025, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.budget import share, truncated
from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage, first_of, highest, keeps_all
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.ops import cosines
from vtc.places import Layer
from vtc.signals import Columns, LayerKeys, LayerText
from vtc.tokens import VisualTokens, column
from vtc.values import flag, whole

PIVOTS = 4  # of the image, and as many of the text


@register_method
@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Keep a few pivots and the tokens that duplicate them least, early in the language model (after ``layer`` layers).

    1. Pivots: the 4 visual tokens, and the 4 text tokens behind the image, with the largest keys in the layer just
       done (L1 norm over all heads, after RoPE).
    2. One pivot after the other takes, of the visual tokens that are left, those with the lowest cosine to it, as many
       as every other pivot: the budget without the image's pivots, over 8; what remains goes to the first.
    3. The image's pivots and all that was taken stay.

    Published: ``layer=2``; LLaVA-1.5 with 64, 128 and 192 tokens. The code (read from a port of it) keeps
    4 + 8 * int(N * keep / 8) tokens, here the budget is met exactly; it takes pivots in the order in which a Python
    set of their columns is read, here the largest key goes first, the image's before the text's. ``released=True``
    does both as the code, with columns as a sample has them without padding; that waits for the device. The port puts
    the language model's last norm over the states that it compares; here its weights are left out. L1 norms of rotated
    keys depend on positions: a padded batch needs ``position_ids``, as ``generate`` makes them. With less than 4 text
    tokens there are fewer pivots; where the image ends the prompt, its own take everything.

    Headline: LLaVA-1.5-7B with 64 of 576 tokens keeps 93.7 % of its accuracy. To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme,mmbench_en_dev
    --model_args base=llava_hf,pretrained=llava-hf/llava-1.5-7b-hf,method=dart,keep=0.1112,method.released=true

    Attributes:
        layer: how many layers run before, at least 1.
        released: count and order as the released code has them.
    """

    layer: int = option(2, whole, "it counts the layers before", least=1)
    released: bool = option(False, flag)

    name: ClassVar[str] = "dart"
    paper: ClassVar[Paper] = Paper(
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        "EMNLP",
        2025,
        "2502.11494",
    )
    query_aware: ClassVar[bool] = True

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """With keys of the layer before it, and the text's states there."""
        k = self.layer
        columns = (Columns(k), Columns(k, of="text")) if self.released else ()
        return (Stage(Layer(k), needs=(LayerKeys(k - 1), LayerKeys(k - 1, of="text"), LayerText(k), *columns)),)

    def quota(self, n: int, stage: Stage) -> int:
        """Exact, or as released, which is some tokens more or fewer."""
        if not self.released or keeps_all(self):
            return super().quota(n, stage)
        return min(n, PIVOTS + 2 * PIVOTS * truncated(share(self.keep, n) / (2 * PIVOTS), n))

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """The three steps."""
        assert budget is not None
        x, mask, words = tokens.features, tokens.mask, tokens.signals["text_mask"]
        firsts = tuple(min(PIVOTS, k) for k in budget)
        own = highest(_sizes(tokens.signals["layer_keys"], mask), PIVOTS)
        others = highest(_sizes(tokens.signals["text_layer_keys"], words), PIVOTS)
        there = torch.arange(own.shape[1], device=x.device) < column(firsts, x.device)
        there = torch.cat([there, words.gather(1, others)], 1)  # [G, 8]
        pivots = torch.cat([_rows(x, own), _rows(tokens.signals["text"], others)], 1)
        if self.released:
            columns = (tokens.signals["columns"].gather(1, own), tokens.signals["text_columns"].gather(1, others))
            order = _as_a_set_reads(torch.cat(columns, 1), there)
            pivots, there = _rows(pivots, order), there.gather(1, order)
        rest, many = column([max(0, k - PIVOTS) for k in budget], x.device), there.sum(1, keepdim=True).clamp_min(1)
        takes = (rest // many + (there.cumsum(1) <= rest % many)) * there
        free = mask & ~first_of(own, firsts, mask.shape[1])
        for like, n in zip(cosines(x, pivots).unbind(-1), takes.split(1, 1), strict=True):
            rank = like.masked_fill(~free, torch.inf).argsort(dim=1, stable=True).argsort(1)
            free = free & (rank >= n)
        return Reduction.of_mask(mask & ~free, budget)


def _sizes(keys: Tensor, there: Tensor) -> Tensor:
    """L1 norms [G, N] of keys [G, N, c]."""
    return keys.double().abs().sum(-1).float().nan_to_num().masked_fill(~there, -torch.inf)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[G, K, d] of [G, N, d]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def _as_a_set_reads(columns: Tensor, there: Tensor) -> Tensor:
    """LongTensor [G, P]: the pivots that are there in the order of ``list(set(columns))``, then the others; waits."""
    orders = []
    for row in columns.masked_fill(~there, -1).tolist():
        read = [row.index(column) for column in {c for c in row if c >= 0}]
        orders.append(read + [i for i, c in enumerate(row) if c < 0])
    return torch.tensor(orders).to(columns.device, non_blocking=True)
