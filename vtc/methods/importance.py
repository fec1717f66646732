"""How much one visual token matters by itself: what IDPruner weighs against resemblance."""

from __future__ import annotations

import functools
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from vtc.methods.base import ModelFacts
from vtc.signals import Cls, Received, Signal
from vtc.tokens import VisualTokens
from vtc.values import shown

I = TypeVar("I", bound="type[Importance]")  # noqa: E741

_REGISTRY: dict[str, type[Importance]] = {}


@dataclass(frozen=True)
class Importance(ABC):
    """A score for every visual token, in any unit; more is more important. A value that a config can hold."""

    name: ClassVar[str]
    query_aware: ClassVar[bool] = False
    """True when the question decides the score."""

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Signals without which :meth:`score` cannot run."""
        return ()

    def check(self, facts: ModelFacts) -> None:
        """Refuse a model, with a ValueError that says what would work, before anything is touched."""
        return None

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """Float [G, N], finite; entries of padding are unspecified. Equal for an image alone and beside others."""


def register_importance(cls: I) -> I:
    """Class decorator: let configs name this class."""
    if _REGISTRY.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"an importance named {cls.name!r} exists already: {_REGISTRY[cls.name].__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def importance_class(name: str) -> type[Importance]:
    """The class registered under ``name``; ValueError if there is none."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown importance {shown(name)}; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


@register_importance
@dataclass(frozen=True)
class ClsAttention(Importance):
    """Attention of the vision tower's CLS token in its last layer, averaged over heads (signal ``cls``)."""

    name: ClassVar[str] = "cls_attention"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The signal of that name."""
        return (Cls(),)

    def score(self, tokens: VisualTokens) -> Tensor:
        """The signal itself."""
        return tokens.signals["cls"].nan_to_num()


@register_importance
@dataclass(frozen=True)
class ReceivedAttention(Importance):
    """Attention that patches receive in the vision tower's last layer (signal ``received``): Qwen-VL, SigLIP."""

    name: ClassVar[str] = "received_attention"

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The signal of that name."""
        return (Received(),)

    def score(self, tokens: VisualTokens) -> Tensor:
        """The signal itself."""
        return tokens.signals["received"].nan_to_num()


@register_importance
@dataclass(frozen=True)
class FeatureNorm(Importance):
    """Length of the feature as it enters the language model: needs nothing, and is worth little more than that."""

    name: ClassVar[str] = "feature_norm"

    def score(self, tokens: VisualTokens) -> Tensor:
        """Euclidean length, summed in float64 so that a batch does not change it."""
        return torch.linalg.vector_norm(tokens.features.double(), dim=-1).float().nan_to_num(posinf=0.0)


@register_importance
@dataclass(frozen=True)
class SelectorWeights(Importance):
    """The scorer that VisionSelector (arXiv 2510.16598) trains for one model, read from safetensors.

    A query and a key projection, no value: a token's score is the mean over all tokens of the image of
    ``q . k / sqrt(h)``, before any softmax. Being linear in the keys, that is one product with the mean key.

    The published files (huggingface.co/AngelSlim/Qwen2.5-VL-{3B,7B,32B}-Instruct-Selector) could not be opened when
    this was written. What is known of them from the code that reads them, and from their sizes: tensors
    ``q_proj.weight``, ``k_proj.weight`` [h, d] and ``q_proj.bias``, ``k_proj.bias`` [h], under the prefixes
    ``module.``, ``_orig_mod.`` or ``visual.importance_scorer.`` or none; d is the width of the language model and
    h = d / 2, which gives the published 4.2, 12.8 and 26.2 million parameters. Other tensors are refused by name; no
    Python file beside the weights is run. A whole VisionSelector checkpoint is read too: only the tensors under
    ``importance_scorer.`` count.

    Attributes:
        path: a .safetensors file, or a folder with one (or the shards of a whole checkpoint) and perhaps a
            config.json. Nothing is downloaded: ``hf download AngelSlim/Qwen2.5-VL-7B-Instruct-Selector`` does that.
    """

    path: str

    name: ClassVar[str] = "selector_weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))

    def check(self, facts: ModelFacts) -> None:
        """Refuses files it cannot read, and weights for embeddings of another width."""
        width = self._weights("cpu")["q_proj.weight"].shape[1]
        if width != facts.width:
            raise ValueError(
                f"SelectorWeights({shown(self.path)}) scores features of width {width}, but what enters the language "
                f"model of this {facts.model_type!r} has width {facts.width}. What would work: the weights trained for "
                "this very model, or vtc.IDPruner() without weights"
            )

    def score(self, tokens: VisualTokens) -> Tensor:
        """Float32, computed in float64 so that a batch does not change it."""
        w = self._weights(tokens.features.device)
        mask = tokens.mask[..., None]
        x = tokens.features.double().masked_fill(~mask, 0.0)
        key = (x.sum(1) / mask.sum(1)) @ w["k_proj.weight"].mT + w["k_proj.bias"]  # the mean of all keys
        score = torch.einsum("gnd,gd->gn", x, key @ w["q_proj.weight"]) + (key @ w["q_proj.bias"])[:, None]
        return (score / w["q_proj.weight"].shape[0] ** 0.5).float().nan_to_num()

    def _weights(self, device: torch.device | str) -> dict[str, Tensor]:
        files = _files(self.path)
        return _selector(self.path, tuple(file.stat().st_mtime_ns for file in files), str(device))


_NAMES = frozenset({"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"})


def _files(path: str) -> list[Path]:
    """Regular files only: whoever opens a pipe waits for its other end."""
    files = [Path(path)] if os.path.isfile(path) else []
    if os.path.isdir(path):
        files = sorted(Path(path).glob("*.safetensors"))
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ValueError(
            f"SelectorWeights(path={shown(path)}) is neither a .safetensors file nor a folder with one; for weights on "
            "the hub, run `hf download OWNER/NAME` and give the folder it prints"
        )
    if odd := [file for file in files if not os.path.isfile(file)]:
        raise ValueError(f"SelectorWeights: {shown(str(odd[0]))} is no regular file, and is not opened")
    return files


@functools.lru_cache(maxsize=4)
def _selector(path: str, times: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """The four tensors of a scorer in float64, checked; ``times`` make a changed file another one."""
    if device != "cpu":
        return {name: tensor.to(device) for name, tensor in _selector(path, times, "cpu").items()}
    from safetensors import SafetensorError, safe_open

    files = _files(path)
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                whole = any("importance_scorer." in name for name in names)
                for name in names:
                    if "importance_scorer." in name or (not whole and len(files) == 1):
                        found[_plain(name)] = opened.get_tensor(name).double()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"SelectorWeights: {shown(str(file))} cannot be read: {error}") from error
    if (unknown := sorted(set(found) - _NAMES)) or not found.keys() >= {"q_proj.weight", "k_proj.weight"}:
        have = (
            f"the unknown tensors {', '.join(unknown[:6])}" if unknown else f"only {', '.join(sorted(found)) or 'none'}"
        )
        raise ValueError(f"SelectorWeights: {shown(path)} has {have}; a scorer has {', '.join(sorted(_NAMES))}")
    hidden, width = found["q_proj.weight"].shape if found["q_proj.weight"].ndim == 2 else (0, 0)
    for side in ("q_proj", "k_proj"):
        found.setdefault(f"{side}.bias", torch.zeros(hidden, dtype=torch.float64))
        shapes = tuple(found[f"{side}.weight"].shape), tuple(found[f"{side}.bias"].shape)
        if not hidden or shapes != ((hidden, width), (hidden,)):
            raise ValueError(
                f"SelectorWeights: {shown(path)} has {side} of shapes {shapes}, not [h, d] and [h] like q_proj"
            )
    _agree(Path(path if os.path.isdir(path) else os.path.dirname(path)) / "config.json", width, hidden)
    return found


def _plain(name: str) -> str:
    name = name.rpartition("importance_scorer.")[2]
    for prefix in ("module.", "_orig_mod."):
        name = name.replace(prefix, "")
    return name


def _agree(config: Path, width: int, hidden: int) -> None:
    """A scorer's config.json, if there is one, must describe the tensors found; a whole model's says nothing of it."""
    if not config.is_file():
        return
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"SelectorWeights: {shown(str(config))} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"SelectorWeights: {shown(str(config))} holds no mapping")
    for key, is_ in (("in_features", width), ("hidden_dim", hidden)):
        if said.get(key, is_) != is_:
            raise ValueError(
                f"SelectorWeights: {shown(str(config))} says {key}={shown(said[key])}, the tensors say {is_}"
            )
