"""How much a visual token has to do with the question, by the CLIP that the vision tower comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.dialect.cliptext import Clip, load_clip
from vtc.methods.base import ModelFacts
from vtc.methods.importance import Importance, register_importance
from vtc.ops import cosines
from vtc.signals import Signal, TowerFeatures
from vtc.tokens import VisualTokens
from vtc.values import shown

_QUESTIONS: ContextVar[tuple[str, ...] | None] = ContextVar("vtc_questions", default=None)


@dataclass(frozen=True, kw_only=True)
class ClipFeatures(TowerFeatures):
    """Of a tower with a CLS token, as CLIP's has: another is refused when the model is patched."""

    needs_cls: ClassVar[bool] = True


@register_importance
@dataclass(frozen=True)
class ClipText(Importance):
    """Minus the cosine of a patch and the question in CLIP's own space: patches and texts are anti-correlated there.

    A patch is what the layer before the last of the vision tower returns, through CLIP's last norm and projection. A
    question longer than CLIP reads is cut in pieces, and cosines are averaged over them. What is no patch (a newline)
    counts as the least of its image.

    A method sees no words, so the caller says what is asked, one question for each sample of the batch::

        clip = vtc.ClipText(folder)
        with vtc.patch(model, vtc.CDPruner(keep=64, relevance=clip)), clip.asking("What colour is the car?"):
            model.generate(**inputs)

    Without it, or with another number of questions than samples, the call is refused.

    Attributes:
        path: a folder with the CLIP that the vision tower was taken from (for LLaVA-1.5: what ``hf download
            openai/clip-vit-large-patch14-336`` prints): config.json, safetensors, tokenizer. No pickle and no code in
            it is run; nothing is downloaded. That its vision tower is the model's own cannot be seen from here.
    """

    path: str

    name: ClassVar[str] = "clip_text"
    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))

    @property
    def needs(self) -> tuple[Signal, ...]:
        """What the layer before the last returns."""
        return (ClipFeatures(layer=-2, name="clip_features"),)

    @contextmanager
    def asking(self, questions: str | Sequence[str]) -> Iterator[None]:
        """Say what is asked, in this thread, until the end of the block.

        Args:
            questions: of each sample of the batch, in order; a text alone is that of the only one.
        """
        asked = (questions,) if isinstance(questions, str) else tuple(questions)
        if not asked or not all(isinstance(question, str) for question in asked):
            raise TypeError(f"questions={shown(questions)} must be a text, or one for each sample")
        token = _QUESTIONS.set(asked)
        try:
            yield
        finally:
            _QUESTIONS.reset(token)

    def check(self, facts: ModelFacts) -> None:
        """Refuses a folder it cannot read."""
        self._loaded()

    def score(self, tokens: VisualTokens) -> Tensor:
        """Float32, computed in float64 so that a batch does not change it; questions are encoded once."""
        asked, samples = _QUESTIONS.get(), 1 + max(tokens.samples, default=0)
        if asked is None or len(asked) < samples:
            raise ValueError(
                f"ClipText has {0 if asked is None else len(asked)} questions for {samples} samples; what would work: "
                "`with clip.asking(questions): model.generate(...)`, one for each sample"
            )
        clip, features = self._loaded(), tokens.signals["clip_features"].detach().double()
        if features.shape[-1] != len(clip.norm.weight):
            raise ValueError(
                f"ClipText({shown(self.path)}) has a vision tower of width {len(clip.norm.weight)}, this model's has "
                f"{features.shape[-1]}; give the folder of the CLIP that it was taken from"
            )
        patch = features.ne(0).any(-1) & tokens.mask
        weight, bias, projection = (
            part.detach().to(features.device, torch.float64, non_blocking=True)
            for part in (clip.norm.weight, clip.norm.bias, clip.projection.weight)
        )
        patches = nn.functional.layer_norm(features, weight.shape, weight, bias, clip.norm.eps) @ projection.mT
        texts = [clip.encoded(asked[sample]).to(features.device, non_blocking=True) for sample in tokens.samples]
        score = torch.stack([against(own, text) for own, text in zip(patches, texts, strict=True)])
        least = score.masked_fill(~patch, torch.inf).amin(-1, keepdim=True)
        return torch.where(patch, score, least).nan_to_num(posinf=0.0)

    def _loaded(self) -> Clip:
        folder = Path(self.path)
        files = sorted(folder.glob("*.safetensors")) if os.path.isdir(self.path) else []
        if not files or not all(map(os.path.isfile, (*files, folder / "config.json"))):
            raise ValueError(
                f"ClipText(path={shown(self.path)}) is no folder with config.json and .safetensors; run `hf download` "
                "for the CLIP that the vision tower was taken from, and give the folder it prints"
            )
        return load_clip(self.path, tuple(file.stat().st_mtime_ns for file in files))


def against(patches: Tensor, text: Tensor) -> Tensor:
    """Float32 [..., N]: minus the mean cosine of patches [..., N, e] to the pieces of a text [..., M, e]."""
    return -cosines(patches, text).mean(-1).float()
