"""What methods for videos share: frames of one size, one video after the other, pictures that stay whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtc.budget import count
from vtc.methods.base import Method, ModelFacts, Newlines, Reduction, Stage, keeps_all
from vtc.methods.options import option
from vtc.methods.saliency import Salient
from vtc.places import Entry
from vtc.tokens import Layout, VisualTokens
from vtc.values import one_of


@dataclass(frozen=True)
class Video:
    """One video, its newlines taken out.

    Attributes:
        x: float [T, P, d], T frames of P tokens.
        signals: what the stage asked for, [T, P, ...]; what is not one for each token as it is.
    """

    x: Tensor
    signals: Mapping[str, Tensor]

    def scores(self, signal: str) -> Tensor:
        """One of them as float32 [T, P], finite."""
        return self.signals[signal].detach().float().nan_to_num()


@dataclass(frozen=True)
class Cut:
    """What is left of one video.

    Attributes:
        keeps: bool [T, P].
        count: how many those are (a host integer).
        values: float [T, P, d], what stands there now, where the method merges.
        size: float [T, P], how many tokens that stands for.
    """

    keeps: Tensor
    count: int
    values: Tensor | None = None
    size: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VideoMethod(Method):
    """Base of the methods for videos.

    Pictures stay whole, and so does a video of one frame where the method compares frames. Frames of different sizes,
    and videos that have lost tokens before, are refused. Newlines stay, and are never looked at. Videos are worked off
    one by one: they are few and long, and each is then the same alone and beside others, to the bit.
    """

    newlines: Newlines = option("keep", one_of, "keep", rule="a newline belongs to no frame")

    compares: ClassVar[bool] = True
    """Whether it takes two frames to choose."""

    @property
    def by_content(self) -> bool:
        """Whether the content of a video decides how many of its tokens stay."""
        return False

    @abstractmethod
    def total(self, frames: int, size: int) -> int:
        """How many tokens stay of a video of so many frames of one size; asked where content does not decide."""

    @abstractmethod
    def cut(self, video: Video, k: int | None) -> Cut:
        """Choose in one video.

        Args:
            video: the video; of two or more frames, if the method compares them.
            k: how many tokens to keep, not all; ``None`` where content decides.
        """

    def counts(
        self, layouts: Sequence[Layout], stage: Stage | None = None, given: Sequence[int] | None = None
    ) -> tuple[int, ...] | None:
        """All of a picture; of a video :meth:`total` and its newlines."""
        numbers = [layout.length for layout in layouts] if given is None else given
        shapes = [self._frames(layout) for layout in layouts]
        for layout, n, shape in zip(layouts, numbers, shapes, strict=True):
            if shape is not None and n != layout.length:
                raise ValueError(
                    f"{self.name} has to see whole frames, and {n} of a video's {layout.length} tokens are left. What "
                    f"would work: {self.name} first, or alone"
                )
        if self.by_content:
            return None
        return tuple(
            n if shape is None else self.spared(layout, n) + self.total(*shape)
            for layout, n, shape in zip(layouts, numbers, shapes, strict=True)
        )

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        """One video after the other."""
        wanted = (None,) * len(tokens.layouts) if budget is None else budget
        cuts = [self._of(tokens, g, k) for g, k in enumerate(wanted)]
        n = tokens.features.shape[1]
        found = Reduction.of_mask(_rows([cut.keeps for cut in cuts], n), tuple(cut.count for cut in cuts))
        if not self.merges:
            return found
        images = torch.arange(len(cuts), device=found.index.device)[:, None]
        dtype = tokens.features.dtype
        features = _rows([cut.values.to(dtype) for cut in cuts if cut.values is not None], n)
        sizes = _rows([cut.size.float() for cut in cuts if cut.size is not None], n)
        return replace(found, features=features[images, found.index], size=sizes[images, found.index])

    def _of(self, tokens: VisualTokens, g: int, k: int | None) -> Cut:
        layout, n = tokens.layouts[g], tokens.counts[g]
        shape = self._frames(layout)
        if shape is None or k == n or not n:
            if k not in (None, n):
                what = "one frame" if layout.of_kind("frame") else "a picture without frames"
                raise ValueError(
                    f"{self.name} chooses between the frames of a video, and image {g} is {what}, which stays whole: "
                    f"{k} of its {n} tokens cannot be chosen. What would work: features [frames, n, d], or a layout "
                    "with frames; for pictures divprune"
                )
            keeps, x = tokens.mask[g, : layout.length], tokens.features[g, : layout.length]
            return Cut(keeps, n, x, torch.ones_like(keeps, dtype=torch.float32))
        signals = {
            name: signal[g, : layout.length].unflatten(0, shape) if tokens.axis(name) == 1 else signal[g]
            for name, signal in tokens.signals.items()
        }
        found = self.cut(Video(tokens.features[g, : layout.length].unflatten(0, shape), signals), k)
        values = None if found.values is None else found.values.flatten(0, 1)
        size = None if found.size is None else found.size.flatten()
        return Cut(found.keeps.flatten(), found.count, values, size)

    def _frames(self, layout: Layout) -> tuple[int, int] | None:
        """Frames and tokens of each; ``None`` for what stays whole."""
        shape = frames_of(layout, self.name)
        return None if shape is None or (self.compares and shape[0] == 1) else shape


@dataclass(frozen=True, kw_only=True)
class Melting(VideoMethod, Salient):
    """Base of those that merge, and ask what the tower looks at. A float ``keep`` counts as released, by content."""

    merges: ClassVar[bool] = True
    compares: ClassVar[bool] = False

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        """At the entrance, with what the tower looks at."""
        return (Stage(Entry(), needs=(self.salience(),)),)

    @property
    def by_content(self) -> bool:
        """A share, but not 1.0."""
        return isinstance(self.keep, float) and not keeps_all(self)

    def total(self, frames: int, size: int) -> int:
        """An integer, exactly; or all."""
        return count(self.keep, frames * size)


def frames_of(layout: Layout, name: str) -> tuple[int, int] | None:
    """How many frames a video has, and of how many tokens, newlines left out; ``None`` for a picture.

    Raises:
        ValueError: its frames are of different sizes, or it has other tokens beside them.
    """
    bare = layout.without_newlines()
    frames = bare.of_kind("frame")
    if not frames:
        return None
    sizes = sorted({segment.length for segment in frames})
    if len(sizes) > 1 or len(frames) < len(bare.segments):
        what = f"of {sizes[0]} to {sizes[-1]} tokens" if len(sizes) > 1 else "beside tokens of other kinds"
        raise ValueError(
            f"{name} compares frames of one size, and a video has frames {what}. What would work: "
            'vtc.Allocate(by="frame"), or videos whose frames are of one size'
        )
    return len(frames), sizes[0]


def _rows(parts: Sequence[Tensor], n: int) -> Tensor:
    """[n0, ...], [n1, ...], ... side by side: [G, n, ...], 0 behind the end of each."""
    rows = torch.nn.utils.rnn.pad_sequence([*parts], batch_first=True)
    behind = rows.new_zeros(len(rows), n - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, behind], 1)
