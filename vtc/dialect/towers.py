"""Vision towers: their layers, the attention in them, what it is called with, and the order of the patches."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.arguments import ENDS, HIDDEN, MASK, ROTARY, Arguments, Spelling
from vtc.dialect.compilers import uncompiled

IN_FRONT = ("cls_token", "distillation_token", "register_tokens")
"""Parameters [1, n, width] of a classifier's embeddings that stand in front of the patches."""
BLOCK_ARGUMENTS = {"self", *HIDDEN.names, *MASK.names, "output_attentions", "kwargs"}


@dataclass(frozen=True)
class Tower:
    """What a signal may know of a vision tower.

    Attributes:
        layers: in order.
        special: tokens in front of the patches (1 with a CLS token, 0 without).
        packed: the patches of all pictures stand in one row, which attention then cuts.
        projector: where a patch becomes a token of the language model, if one does by itself.
        module: what is called with pixels.
        unit: of a packed tower, how many consecutive patches become a token inside it.
        mergers: where they do, each [patches, width] -> [tokens, d]: at its end, and for DeepStack.
    """

    layers: tuple[nn.Module, ...]
    special: int
    packed: bool = False
    projector: nn.Module | None = None
    module: nn.Module | None = None
    unit: int = 1
    mergers: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, tower: nn.Module | None, projector: nn.Module | None = None) -> Tower | None:
        """A tower as CLIP, SigLIP, InternViT, Pixtral and the Qwen-VL line build it, ``None`` of what has no such
        layers.
        """
        called, tower = tower, getattr(tower, "vision_model", tower)
        embeddings, encoder = getattr(tower, "embeddings", None), getattr(tower, "encoder", None)
        layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
        if embeddings is not None and layers:
            has_cls = (getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token"))
            return cls(tuple(map(uncompiled, layers)), int(any(has_cls)), projector=projector, module=called)
        rows = getattr(tower, "blocks", None) or getattr(getattr(tower, "transformer", None), "layers", None)
        if not rows:
            return None
        last: Any = getattr(tower, "merger", None)
        early: Any = getattr(tower, "deepstack_merger_list", None) or ()
        mergers = () if last is None else tuple(map(uncompiled, (last, *early)))
        config: Any = getattr(tower, "config", None)
        unit = config.spatial_merge_size**2 if mergers else 1
        return cls(tuple(map(uncompiled, rows)), 0, packed=True, module=called, unit=unit, mergers=mergers)

    @classmethod
    def alone(cls, base: Any) -> Tower | None:
        """That of an image classifier, as ViT, DeiT and DINOv2 build it, ``None`` of another."""
        embeddings, encoder = getattr(base, "embeddings", None), getattr(base, "encoder", base)
        layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
        if embeddings is None or not layers:
            return None
        blocks = tuple(map(uncompiled, layers))
        if any(set(spelling(block).parameters) - BLOCK_ARGUMENTS for block in blocks):
            return None  # what else it takes may have an entry for each patch: rotary embeddings, biases by distance
        special = (getattr(embeddings, name, None) for name in IN_FRONT)
        return cls(blocks, sum(x.shape[1] for x in special if isinstance(x, Tensor)), module=base)

    def attention(self, layer: int) -> nn.Module | None:
        """The attention of a layer, where it has projections of its own for queries and keys, or one for both."""
        found = self.layers[layer]
        names = (name for name in ("self_attn", "attention", "attn") if hasattr(found, name))
        attention = uncompiled(getattr(found, next(names, ""), None))
        has_both = hasattr(attention, "q_proj") and hasattr(attention, "k_proj")
        return attention if has_both or hasattr(attention, "qkv") else None


@dataclass(frozen=True)
class Heard:
    """What an attention of a tower is called with beside the hidden states.

    Attributes:
        rotary: cos and sin, each [T, r]; nothing where queries and keys are not turned.
        mask: as it came: [B or 1, 1, T or 1, T], bool or added to the products, or [B, T]; ``None``: all see all.
        ends: [n + 1], from 0: where the sequences end that share a row; ``None``: each row is one.
    """

    rotary: tuple[Tensor, ...] = ()
    mask: Any = None
    ends: Tensor | None = None

    @classmethod
    def of(cls, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Heard:
        """The arguments of a call, by their roles."""
        call = spelling(attention).bind((attention, *args), kwargs)
        return cls(tuple(call[ROTARY] or ()), call[MASK], call[ENDS])

    @property
    def seen(self) -> Tensor | None:
        """Bool [B or 1, 1, T or 1, T]: True where a row sees a column."""
        if self.mask is None:
            return None
        if not isinstance(self.mask, Tensor):
            raise NotImplementedError(
                f"what a vision tower attends to cannot be read off its {type(self.mask).__name__}; load the model "
                "with attn_implementation='sdpa' or 'eager'"
            )
        seen = self.mask >= 0 if self.mask.is_floating_point() else self.mask.bool()  # added: 0, or close to -inf
        return seen[:, None, None] if seen.dim() == 2 else seen

    def sequences(self, length: int) -> list[Tensor]:
        """The columns of the sequences that share a row of ``length``: LongTensors [sequences, n], one for each n.

        Waits for the device, as towers do themselves to cut their rows.
        """
        assert self.ends is not None
        ends = self.ends.tolist()
        if ends[0] != 0 or ends[-1] != length:
            raise ValueError(f"sequences that end at {ends} do not fill a row of {length} patches")
        starts: dict[int, list[int]] = {}
        for start, end in itertools.pairwise(ends):
            starts.setdefault(end - start, []).append(start)
        found = [torch.tensor(of_length)[:, None] + torch.arange(n) for n, of_length in starts.items() if n]
        return [columns.to(self.ends.device, non_blocking=True) for columns in found]


def given_to(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """The arguments of one call of a module, to be changed where they stand."""
    return Given(spelling(module), args, kwargs)


class Given(Arguments):
    """Arguments of one call; what came by position goes on by position."""

    def __init__(self, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [name for name in spelling.parameters if name != "self"]
        super().__init__(spelling, dict(zip(names, args, strict=False)) | dict(kwargs))
        self._front = names[: len(args)]

    @property
    def positional(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords, as a hook returns them."""
        rest = {name: value for name, value in self.named.items() if name not in self._front}
        return tuple(self.named[name] for name in self._front), rest


def blocks_read(base: Any, tower: Tower, given: Mapping[str, Any] | None = None) -> int:
    """How many blocks run before the last state that the language model gets to see.

    Args:
        base: the base model.
        tower: its tower.
        given: what the encoder is called with, which goes before the config.
    """
    depth = len(tower.layers)
    told = [x for n in FEATURE_LAYERS if (x := (given or {}).get(n)) is not None]
    told += [x for n in FEATURE_LAYERS if (x := getattr(base.config, n, None)) is not None]
    found = told[0] if told else depth
    layers = [found] if isinstance(found, int) else found
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def all_states_asked(base: Any, given: Mapping[str, Any]) -> bool:
    """Whether whoever calls an encoder wants the tower's hidden states."""
    asked = given.get("output_hidden_states")
    return bool(getattr(base.config, "output_hidden_states", False) if asked is None else asked)


def without_states(output: Any, read: int) -> None:
    """Take out of what a tower returned all states behind the one after ``read`` blocks."""
    for name in HIDDEN_STATES:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            setattr(output, name, None)
        elif found is not None:
            setattr(output, name, (*found[: read + 1], *[None] * (len(found) - read - 1)))


FEATURE_LAYERS = ("vision_feature_layers", "vision_feature_layer")
HIDDEN_STATES = ("hidden_states", "last_hidden_state")


def rewrite_states(output: Any, rewrite: Callable[[Tensor], Tensor]) -> None:
    """Replace every hidden state [pictures, rows, width] in what a tower returned."""
    for name in HIDDEN_STATES:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            setattr(output, name, rewrite(found))
        elif found is not None:
            setattr(output, name, tuple(x if x is None else rewrite(x) for x in found))


def beside(module: nn.Module, *names: str) -> Any:
    """The function of the first of these names, where a module's class or one that it derives from is defined."""
    sources = [vars(sys.modules[kind.__module__]) for kind in type(module).__mro__ if kind.__module__ in sys.modules]
    return next((source[name] for name in names for source in sources if name in source), None)


def spelling(module: nn.Module) -> Spelling:
    """How a class of modules spells its arguments, itself the first."""
    return _spelling(type(module))  # type: ignore[arg-type]


@functools.cache
def _spelling(kind: Any) -> Spelling:
    return Spelling(kind.forward, kind.__name__)


# ------------------------------------------------------------------------------------------------- the order of patches


def reorders(tower: Any) -> bool:
    """Whether patches stand window by window inside a tower (Qwen2.5-VL): its pictures are cut into windows."""
    return hasattr(getattr(tower, "config", None), "window_size") or hasattr(tower, "window_size")


def knows_order(tower: Any) -> bool:
    """Whether patches keep their order, or the tower's own function says where they go."""
    return not reorders(tower) or _window_index(tower) is not None


def places(tower: Any, grids: Tensor) -> Tensor | None:
    """Where each unit of merged patches stands inside a tower, in raster order: LongTensor [units] on the host.

    ``None`` where units keep their order.

    Args:
        tower: the tower.
        grids: [pictures, 3], times, rows and columns of patches.
    """
    if not reorders(tower):
        return None
    find, config = _window_index(tower), tower.config
    assert find is not None  # or it was refused
    inside, _ = find(grids.cpu(), config.spatial_merge_size, config.window_size, config.patch_size)
    return inside.argsort()


def _window_index(tower: nn.Module) -> Any:
    return beside(tower, "get_vision_window_index")


# ------------------------------------------------------------------------------------------------------ where they are


def is_classifier(model: nn.Module) -> bool:
    """Whether it is one of transformers' classes for images and labels."""
    return "ForImageClassification" in type(model).__name__ and hasattr(model, "base_model")


TOWERS = ("vision_tower", "image_tower", "visual", "vision_model")
"""Attributes of a base model that are a vision tower."""


def tower_of(base: Any, modality: str = "image") -> nn.Module | None:
    """The module that encodes images, or videos where that is another one; ``None`` if there is none."""
    names = ("video_tower", *TOWERS) if modality == "video" else TOWERS
    return next((tower for name in names if (tower := getattr(base, name, None)) is not None), None)
