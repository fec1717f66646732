"""Budget allocators: who shares a budget with whom, whatever method then chooses within it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vtc.budget import apportioned
from vtc.methods.base import Method, ModelFacts, Newlines, Reduction, Stage
from vtc.methods.divprune import DivPrune
from vtc.methods.options import option
from vtc.methods.registry import register_method
from vtc.methods.returns import check_reduction
from vtc.methods.stages import Kept
from vtc.methods.vcast import curvature, directions
from vtc.methods.vidcom2 import frame_weights, likeness
from vtc.methods.video import VideoMethod, frames_of
from vtc.methods.wrapper import refuse_inside_tower
from vtc.ops.frames import in_shares
from vtc.tokens import Layout, Region, VisualTokens
from vtc.values import one_of, shown


@dataclass(frozen=True, kw_only=True)
class Allocator(Method):
    """Base of the methods that share out a budget and let another method, the selector, choose within each share.

    Attributes:
        selector: the method that chooses; its own ``keep`` and ``newlines`` do not count. What it does inside the
            language model it does there as ever.
    """

    newlines: Newlines = option("keep", one_of, "keep", rule="newlines belong to no region of an image")
    selector: Method | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector is None:
            return
        if not isinstance(self.selector, Method):
            raise TypeError(f"selector={shown(self.selector)} is no vtc.Method, such as vtc.DivPrune()")
        if isinstance(self.selector, VideoMethod):
            raise ValueError(
                f"selector={shown(self.selector)} chooses in whole videos and shares out their frames itself. What "
                "would work: vtc.DivPrune()"
            )
        if not self.selector.prunes_at_entry:
            raise ValueError(
                f"selector={shown(self.selector)} does not choose before the language model, where {self.name} shares "
                "out budgets. What would work: vtc.DivPrune(), or with it "
                f"vtc.Chain(vtc.{type(self).__name__}(), second)"
            )
        refuse_inside_tower(type(self).__name__, self.selector)
        if len(self.selector.members) > 1 or isinstance(self.selector, Allocator):
            raise ValueError(
                f"selector={shown(self.selector)} is several methods, or shares out budgets itself. What would work: "
                f"vtc.DivPrune(), and to prune on, vtc.Chain(vtc.{type(self).__name__}(), second)"
            )
        if self.selector.content_decides:
            raise ValueError(
                f"selector={shown(self.selector)} decides by the content of an image how many tokens stay, so that no "
                "budget can be shared out. What would work: vtc.DivPrune()"
            )

    @property
    def query_aware(self) -> bool:  # type: ignore[override]
        """As the selector is."""
        return self.selector is not None and self.selector.query_aware

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """As the selector does."""
        return self.selector is not None and self.selector.merges

    @property
    def remedy(self) -> str:
        """That of the selector."""
        return super().remedy if self.selector is None else self.selector.remedy

    def settle(self, facts: ModelFacts) -> Method:
        """Settles the selector."""
        return self if self.selector is None else replace(self, selector=self.selector.settle(facts))

    def check(self, facts: ModelFacts) -> None:
        """Asks the selector."""
        super().check(facts)
        if self.selector is not None:
            self.selector.check(facts)

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """Those of the selector."""
        return super().stages(model) if self.selector is None else self.selector.stages(model)

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """Before the language model as ``keep`` says; inside it as the selector says."""
        if stage is None or stage.at.before_the_model or self.selector is None:
            return super().counts(layouts, stage, given)
        return self.selector.counts(layouts, stage, given)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Before the language model within shares; inside it the selector decides."""
        if stage.at.before_the_model:
            return self.share_out(stage, tokens, budget)
        assert self.selector is not None
        return self.selector.reduce(stage, tokens, budget)

    @abstractmethod
    def share_out(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Divide the budget and let the selector choose. Arguments and result as those of :meth:`reduce`."""


def within(
    selector: Method,
    stage: Stage,
    tokens: VisualTokens,
    regions: Sequence[Sequence[Region]],
    budgets: Sequence[Sequence[int]],
) -> Reduction:
    """Let a method choose within regions of images.

    Args:
        selector: the method.
        stage: where it does so.
        tokens: G images, of which nothing has left.
        regions: of each image.
        budgets: of each part; where it is 0 the selector is not asked.
    """
    asked = [[(p, k) for p, k in zip(*of_image, strict=True) if k] for of_image in zip(regions, budgets, strict=True)]
    pieces, place = tokens.split([[region for region, _ in pairs] for pairs in asked])
    budget = tuple(k for pairs in asked for _, k in pairs)
    found = check_reduction(selector, selector.reduce(stage, pieces, budget), budget, pieces)
    return unsplit(Kept.of(found, pieces), place, tokens, tuple(sum(k for _, k in pairs) for pairs in asked))


def unsplit(kept: Kept, place: Tensor, tokens: VisualTokens, counts: tuple[int, ...]) -> Reduction:
    """What was kept of the regions of :meth:`VisualTokens.split`, as a reduction of the images they come from."""
    shape = tokens.features.shape[:2]

    def back(values: Tensor) -> Tensor:  # [R, M, ...] to [G, N, ...]
        flat = values.new_zeros(shape.numel() + 1, *values.shape[2:])
        flat[place.masked_fill(~kept.mask, shape.numel()).flatten()] = values.flatten(0, 1)
        return flat[:-1].view(*shape, *values.shape[2:])

    found = Reduction.of_mask(back(kept.mask), counts)
    if kept.features is None:
        return found
    rows = torch.arange(len(counts), device=found.index.device)[:, None]
    size = None if kept.size is None else back(kept.size)[rows, found.index]
    return replace(found, features=back(kept.features)[rows, found.index], size=size)


_SELECTOR = DivPrune()
Frames = Literal["even", "curvature", "unique"]


@register_method
@dataclass(frozen=True, kw_only=True)
class Allocate(Allocator):
    """Share a budget out, evenly or by what changes in a video, and let any method choose within each share.

    1. ``by="image"``: one budget for each image, as every method has by itself. ``by="uniform"``: one for the
       thumbnail, each crop and each frame. ``by="frame"``: one for each frame of a video; pictures stay whole.
    2. The image's total is that of ``keep``, rounded once, and divided in proportion to the sizes of its regions; the
       largest remainders get what is left over. Frames of a video may be weighed: ``frames="curvature"`` as V-CAST
       does, by how sharply the video turns there, ``"unique"`` as VidCom², by how little a frame is like the video; a
       token for each frame comes first, and what a full frame cannot take is divided among the others.
    3. The selector chooses within each region, as if it were an image of its own.

    ``uniform`` is the baseline that GlobalCom² is 1.4 points better than in its paper's ablation (LLaVA-NeXT-7B);
    ``vtc.GlobalCom2(selector=...)`` is its allocation with any selector. Newlines always stay.

    python -m lmms_eval eval --model vtc --batch_size 1 --tasks gqa,textvqa_val,pope,mme --model_args
    base=llava_hf,pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,method=allocate,keep=0.25

    Attributes:
        by: what has a budget of its own.
        frames: how those of a video share it; other than "even" they must be of one size, and the host waits once for
            each video.
        selector: the method that chooses; its own ``keep`` and ``newlines`` do not count.
    """

    selector: Method = _SELECTOR
    by: Literal["uniform", "image", "frame"] = option("uniform", one_of, "uniform", "image", "frame")
    frames: Frames = option("even", one_of, *get_args(Frames))

    name: ClassVar[str] = "allocate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selector is None:
            raise TypeError("allocate shares out a budget only; give a selector, such as vtc.DivPrune()")
        if self.frames != "even" and self.by == "image":
            raise ValueError(f"frames={shown(self.frames)} weighs frames, which have no budgets with by='image'")

    def share_out(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """Steps 1 to 3; does not wait for the device if the selector does not, and frames share evenly."""
        assert budget is not None
        regions = [self._regions(layout) for layout in tokens.layouts]
        budgets = [self._budgets(tokens, g, regions[g], total) for g, total in enumerate(budget)]
        return within(self.selector, stage, tokens, regions, budgets)

    def _budgets(self, tokens: VisualTokens, g: int, regions: Sequence[Region], total: int) -> Sequence[int]:
        layout = tokens.layouts[g]
        shape = None if self.frames == "even" else frames_of(layout, self.name)
        if shape is None:
            return apportioned(total, [len(region.tokens) for region in regions])
        x = tokens.features[g, : layout.length].unflatten(0, shape)
        weights = curvature(directions(x)) if self.frames == "curvature" else frame_weights(likeness(x)[0])
        least = min(1, total // shape[0])
        counts: list[int] = (least + in_shares(weights, total - least * shape[0], shape[1] - least)).tolist()
        return counts

    def _regions(self, layout: Layout) -> tuple[Region, ...]:
        split = self.by == "uniform" or (self.by == "frame" and bool(layout.of_kind("frame")))
        return layout.regions() if split else (Region("image", tuple(range(layout.length)), layout),)
