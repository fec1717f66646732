"""GlobalCom²: global compression commander, for images cut into crops (AAAI 2026, arXiv 2501.05179)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc import ops
from vtc.budget import share, truncated
from vtc.methods.allocate import Allocator, unsplit, within
from vtc.methods.base import Method, ModelFacts, Paper, Reduction, Stage, first_of, highest
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.stages import Kept
from vtc.ops.scores import claimed_shares
from vtc.places import Entry
from vtc.signals import Cls, ClsLogits, Received, TowerSignal
from vtc.tokens import Layout, Region, VisualTokens
from vtc.values import number, one_of

_SIGNAL: dict[str | None, TowerSignal] = {"logits": ClsLogits(), "probabilities": Cls(), "received": Received()}


@register_method
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Allocator):
    """Let the thumbnail command how many tokens each crop keeps, and have a say in which.

    1. Every token is scored: by the CLS token of the vision tower's last layer (see ``scores``).
    2. The thumbnail keeps its highest ``keep`` share, cut to an integer.
    3. A crop claims the sum of the thumbnail's scores over its region; with sigma the softmax of the claims divided
       by ``tau``, crop c keeps the share ``min(1, keep * (1 + sigma_c - mean sigma))``, cut to an integer.
    4. Within a crop the tokens with the highest local + global score stay: the local scores and the thumbnail's,
       enlarged bilinearly to the crops' grid, each divided by its length over the crop.
    5. All that stays keeps its place: thumbnail, then the mosaic in raster order with all its newlines.

    Defaults: LLaVA-NeXT and LLaVA-NeXT-Video score by CLS logits; LLaVA-OneVision, whose SigLIP tower has no CLS
    token, by the paper's variant for it, minus the cosine to the mean of the thumbnail or crop. ``scores="received"``,
    which is not in the paper, asks there what the tower's patches look at, in units of an even share. Newlines are
    never pruned and not part of the budget. Models without thumbnail and crops of known places are refused.

    ``scores`` is no detail. The released code takes the logits before the softmax, averaged over heads; their sums
    over a region differ by much, and the budgets become almost one-hot (with 2x2 crops the winner gets 1.75 times
    ``keep``, the others 0.75 times). The paper speaks of attention, that is ``scores="probabilities"``: they sum to
    one, and all crops get the same within a few per cent. The code also puts tokens of padded images in wrong rows
    (it computes their places and does not use them), orders the thumbnail by score, and leaves an image that is not
    cut unpruned; vtc keeps raster order, and prunes that image as if it were a thumbnail. The paper's mixture of local
    and global scores with 0.5 each ranks as their sum does. Because of step 3 and the integers, an image keeps a
    little more or less than ``keep`` of its tokens. ``positions="compact"`` is the code's.

    Video has no thumbnail. The paper's variant works with frame means, and there is no code; our reading: a token's
    local score is minus the cosine to the mean of its frame, the global one minus that to the mean of the video, and
    a frame's claim is the sum of the global ones over it.

    With ``selector``, any method chooses within the thumbnail's, crops' and frames' budgets, instead of steps 2 and 4:
    ``vtc.GlobalCom2(selector=vtc.DivPrune())``. How many tokens stay depends on their scores, so that every prefill
    waits for the device once, for the shares of all crops of all images together.

    Headline: LLaVA-NeXT-7B keeps 98.5, 96.7 and 91.6 % of its accuracy at 50, 25 and 10 % of the tokens, over 10
    benchmarks (at 25 %: GQA 61.5, TextVQA 60.9, POPE 87.6, MME 1493.5). To repeat it:

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme,vqav2_val,scienceqa_img
    --model_args base=llava_hf,pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,method=globalcom2,keep=0.25

    Attributes:
        scores: ``logits``, ``probabilities``, ``received`` or ``distance`` (minus the cosine to the mean); ``None``:
            logits where the tower has a CLS token, else distance.
        tau: temperature of the budgets.
        selector: chooses within the budgets; ``None``: the highest scores. Its own ``keep`` and ``newlines`` do not
            count.
    """

    scores: Literal["logits", "probabilities", "received", "distance"] | None = option(
        None, one_of, None, "logits", "probabilities", "received", "distance"
    )
    tau: float = option(10.0, number, "it is a temperature and must be positive", above=0.0)

    name: ClassVar[str] = "globalcom2"
    paper: ClassVar[Paper] = Paper(
        "Global compression commander: plug-and-play inference "
        "acceleration for high-resolution large vision-language models",
        "AAAI",
        2026,
        "2501.05179",
    )

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance, with the signal behind ``scores``; and those of the selector."""
        ours = (_SIGNAL[self.scores],) if self.scores in _SIGNAL else ()
        if self.selector is None:
            return (Stage(Entry(), needs=ours),)
        return tuple(
            replace(stage, needs=(*ours, *(s for s in stage.needs if s not in ours)))
            if stage.at.before_the_model
            else stage
            for stage in self.selector.stages(model)
        )

    @property
    def remedy(self) -> str:
        """The scores that need no signal."""
        without = 'vtc.GlobalCom2(scores="distance"), as the paper does without CLS'
        return without if self.scores in _SIGNAL else super().remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Chooses the scores, if they were left open."""
        settled = super().settle(facts)
        if self.scores is not None or not isinstance(settled, GlobalCom2):
            return settled
        return replace(settled, scores="logits" if ClsLogits.kind in facts.signals else "distance")

    def check(self, facts: ModelFacts) -> None:
        """Refuses a model without a thumbnail."""
        if not facts.has_thumbnail:
            raise ValueError(
                f"globalcom2 shares budgets out by the thumbnail of a cut image, and {facts.model_type!r} models have "
                "none, or do not tell where its crops are. What would work: a LLaVA-NeXT or LLaVA-OneVision model, or "
                "vtc.Allocate(selector=vtc.DivPrune()) for even budgets"
            )
        super().check(facts)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """The thumbnail decides; the selector's inside the language model are its own."""
        if stage is None or stage.at.before_the_model:
            everything = super().counts(layouts, stage, given)
            lengths = given or [layout.length for layout in layouts]
            return everything if everything == tuple(lengths) else None
        return super().counts(layouts, stage, given)

    def share_out(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 4. Waits for the device once, if there are crops or frames."""
        keeps = [share(self.keep, n) for n in tokens.lengths]
        if min(keeps, default=1.0) == 1.0:
            return Reduction.of_mask(tokens.mask, tokens.lengths)
        regions = [layout.regions() for layout in tokens.layouts]
        pieces, place = tokens.split(regions)
        local = self._local(pieces)
        whole = torch.cat([self._whole(tokens, regions, local).flatten(), local.new_zeros(1)])[place]
        budgets = self._budgets(regions, keeps, self._shares(regions, keeps, local, whole))
        if self.selector is not None:
            return within(self.selector, stage, tokens, regions, budgets)
        score = torch.where(_rows_of(regions, place.device), _unit(local) + _unit(whole), local).float()
        picks = highest(score.masked_fill(~pieces.mask, -torch.inf), score.shape[1])
        each = tuple(k for of_image in budgets for k in of_image)
        kept = Kept(first_of(picks, each, score.shape[1]), each)
        return unsplit(kept, place, tokens, tuple(map(sum, budgets)))

    def _local(self, pieces: VisualTokens) -> Tensor:
        """Step 1 for each region by itself: float64 [R, M], 0 for padding. Frames always go by distance."""
        signal = _SIGNAL.get(self.scores)
        frames = [bool(layout.of_kind("frame")) for layout in pieces.layouts]
        if signal is None or all(frames):
            return distance(pieces.features, pieces.mask)
        scores = pieces.signals[signal.key].double().nan_to_num()
        if any(frames):
            where = torch.tensor(frames).to(scores.device, non_blocking=True)
            scores = torch.where(where[:, None], distance(pieces.features, pieces.mask), scores)
        return scores

    def _whole(self, tokens: VisualTokens, regions: list[tuple[Region, ...]], local: Tensor) -> Tensor:
        """The global scores of step 4: float64 [G, N], 0 where nothing commands."""
        scores = local.new_zeros(tokens.features.shape[:2])
        row = 0
        for g, (layout, of_image) in enumerate(zip(tokens.layouts, regions, strict=True)):
            if _is_cut(of_image):
                (mosaic,) = layout.of_kind("crops")
                thumbnail = _square(local[row, : len(of_image[0].tokens)])
                enlarged = torch.nn.functional.interpolate(thumbnail[None, None], size=mosaic.grid, mode="bilinear")
                scores[g, mosaic.start : mosaic.stop] = enlarged.flatten()
            elif _is_video(of_image):
                video = tokens.features[g : g + 1, : layout.length]
                scores[g, : layout.length] = distance(video, video.new_ones(video.shape[:2], dtype=torch.bool))[0]
            row += len(of_image)
        return scores

    def _shares(
        self, regions: list[tuple[Region, ...]], keeps: list[float], local: Tensor, whole: Tensor
    ) -> list[list[float]]:
        """Step 3, on the host: the share of each crop, in raster order, or frame; nothing for other images."""
        found = []
        row = 0
        for of_image, keep in zip(regions, keeps, strict=True):
            if _is_cut(of_image):
                thumbnail = local[row, : len(of_image[0].tokens)]
                rows, columns = _mosaic(of_image)
                found.append(ops.crop_budgets(thumbnail, (columns, rows), keep, tau=self.tau))
            elif _is_video(of_image):
                found.append(claimed_shares(whole[row : row + len(of_image)].sum(-1), keep, self.tau))
            else:
                found.append(local.new_zeros(0))
            row += len(of_image)
        flat = iter(torch.cat(found).tolist())  # the one wait
        return [[next(flat) for _ in range(len(shares))] for shares in found]

    def _budgets(
        self, regions: list[tuple[Region, ...]], keeps: list[float], shares: list[list[float]]
    ) -> list[tuple[int, ...]]:
        budgets = []
        for of_image, keep, commanded in zip(regions, keeps, shares, strict=True):
            counts = [
                truncated(commanded[region.cell] if commanded and region.kind in ("crops", "frame") else keep, n)
                for region in of_image
                for n in [len(region.tokens)]
            ]
            if not any(counts):
                counts[0] = 1
            budgets.append(tuple(counts) if keep < 1.0 else tuple(len(region.tokens) for region in of_image))
        return budgets


def distance(features: Tensor, mask: Tensor) -> Tensor:
    """Minus the cosine of each token to the mean of its row's tokens: float64 [R, M], 0 for padding.

    Args:
        features: float [R, M, d]; tokens without a direction get 0.
        mask: bool [R, M], False for padding.
    """
    x = features.detach().double().masked_fill(~mask[..., None], 0.0).nan_to_num(posinf=0.0, neginf=0.0)
    mean = x.sum(1, keepdim=True)  # its length does not matter
    return -torch.nn.functional.cosine_similarity(x, mean, dim=-1, eps=1e-12)


def _unit(scores: Tensor) -> Tensor:
    return scores / torch.linalg.vector_norm(scores, dim=-1, keepdim=True).clamp_min(1e-30)


def _is_cut(regions: tuple[Region, ...]) -> bool:
    """Whether a thumbnail comes first, and crops whose places are known follow."""
    return (
        len(regions) > 1 and regions[0].kind == "thumbnail" and all(region.mosaic is not None for region in regions[1:])
    )


def _is_video(regions: tuple[Region, ...]) -> bool:
    return bool(regions) and all(region.kind == "frame" for region in regions)


def _mosaic(regions: tuple[Region, ...]) -> tuple[int, int]:
    mosaic = regions[1].mosaic
    assert mosaic is not None
    return mosaic


def _rows_of(regions: list[tuple[Region, ...]], device: torch.device) -> Tensor:
    """Bool [R, 1]: the regions that are commanded, crops and frames."""
    rows = [
        (_is_cut(of_image) and region.kind == "crops") or _is_video(of_image)
        for of_image in regions
        for region in of_image
    ]
    return torch.tensor(rows).to(device, non_blocking=True)[:, None]


def _square(scores: Tensor) -> Tensor:
    side = math.isqrt(len(scores))
    if side * side != len(scores):
        raise ValueError(f"a thumbnail of {len(scores)} tokens is no square, so that its crops have no places on it")
    return scores.reshape(side, side)
