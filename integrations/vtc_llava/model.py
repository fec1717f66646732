"""What a model of the original LLaVA code is made of, and which of them are refused before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import nn

from vtc.dialect import heads, modules
from vtc.dialect.arguments import CACHE, IDS, LABELS, MASK, POSITIONS
from vtc.dialect.modules import Spellings
from vtc.dialect.towers import Tower
from vtc.errors import UnsupportedModelError
from vtc.models.base import Adapter, Parts
from vtc_llava import SEAM
from vtc_llava.forward import mended
from vtc_llava.probe import overheard
from vtc_llava.seam import watched

ENCODE, FORWARD, IMAGES = "encode_images", "forward", "images"
TAKES = (IDS, POSITIONS, MASK, CACHE, LABELS)
"""What the seam takes first, in this order; pictures come sixth, and after them forks differ."""


class OriginalLlava(Adapter):
    """One model of the original code: its pictures are found by watching the seam, not by placeholders."""

    notes = "original LLaVA code; cls with a CLIP tower only"

    def __init__(self, root: Any) -> None:
        self.root = root
        self.has_thumbnail = not flat(root.config)  # type: ignore[misc]

    def placeholders(self, config: Any) -> dict[str, int]:
        """None: the id that stands for a picture is gone when the language model is called."""
        return {}

    def tower(self, base: Any, modality: str) -> Tower | None:
        """The transformers model inside the tower's wrapper. A projector of integers (4 bit) is left to LLaVA."""
        projector = getattr(base, "mm_projector", None)
        whole = projector is not None and all(weight.is_floating_point() for weight in projector.parameters())
        has_weights = whole and next(projector.parameters(), None) is not None
        return Tower.of(self.root.get_vision_tower().vision_tower, projector=projector if has_weights else None)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore", "units"] | None:
        """Patches that left are zeros behind it, and their columns leave in front of the language model.

        Frames are pooled in LLaVA-NeXT; the seam refuses whatever is not a patch alone.
        """
        tower = self.tower(base, modality)
        return None if tower is None or tower.packed or tower.projector is None else "drop"

    def _tower_depth(self, base: Any) -> int:
        tower, wrapper = self.tower(base, "image"), self.root.get_vision_tower()
        if tower is None:
            return 0
        layer = getattr(wrapper, "select_layer", -1)
        return layer if layer >= 0 else len(tower.layers) + 1 + layer

    def around(self, stage: Any) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """The seam, the encoder that it calls, and the forward pass, which does not know transformers' newest words."""
        yield self.root, FORWARD, mended
        yield self.root, ENCODE, overheard
        yield self.root, SEAM, lambda prepare: watched(prepare, self.root, stage)


def flat(config: Any) -> bool:
    """Whether the tiles of a picture follow each other, without thumbnail, mosaic and newlines."""
    return getattr(config, "mm_patch_merge_type", "flat") == "flat"


def resolve(model: Any) -> tuple[Adapter, Parts]:
    """The adapter and the parts of a model that has the seam.

    Raises:
        UnsupportedModelError: the reason, and what would work.
    """
    name = type(model).__name__
    reason = next(_faults(model), None)
    if reason is not None:
        raise UnsupportedModelError(f"{name} has {SEAM}, as the original LLaVA code, but cannot be pruned: {reason}")
    base, decoder = modules.base_of(model), modules.decoder_of(model)
    return OriginalLlava(model), Parts(model, base, decoder, {}, Spellings.of(model, base, decoder))


def _faults(model: Any) -> Iterator[str]:
    """What keeps a model from being pruned, the first thing first."""
    taken = list(inspect.signature(getattr(model, SEAM)).parameters)
    known = len(taken) > len(TAKES) and all(word in role.names for word, role in zip(taken, TAKES, strict=False))
    if not known or taken[len(TAKES)] != IMAGES:
        wanted = ", ".join([*(role.what for role in TAKES), IMAGES])
        yield f"that method takes {', '.join(taken)}, not {wanted}, in this order"
    if (fork := _patched_by(model)) is not None:
        yield (
            f"{fork} has put code of its own into its class, and prunes by it. Load the model in a process where that "
            "was not done"
        )
    if not callable(getattr(model, ENCODE, None)) or model.get_vision_tower() is None:
        yield "it has no vision tower (config.mm_vision_tower is not set): there are no visual tokens"
        return
    tower = model.get_vision_tower()
    if not getattr(tower, "is_loaded", True) or not isinstance(getattr(tower, "vision_tower", None), nn.Module):
        yield "its vision tower is not loaded; model.get_vision_tower().load_model() first"
        return
    config = model.config
    if getattr(config, "tune_mm_mlp_adapter", False) and getattr(config, "mm_use_im_start_end", False):
        yield (
            "its config sets tune_mm_mlp_adapter and mm_use_im_start_end, which its own code refuses to run; set one "
            "of them to False"
        )
    decoder = modules.decoder_of(model)
    if not len(getattr(decoder, "layers", ())):
        yield (
            f"its language model ({type(decoder).__name__}) has no list of layers with rotary embeddings. What works: "
            "language models built as Llama, Mistral or Qwen2"
        )
        return
    yield from modules.decoder_violations(decoder)
    if (reason := heads.unknown_head(model, modules.base_of(model))) is not None:
        yield reason


def _patched_by(model: Any) -> str | None:
    """Who replaced methods of the model's class (HoliTom, VidCom2): the module, ``None`` if nobody did."""
    if hasattr(type(model), "holitom"):
        return "HoliTom"
    homes = {each.__module__ for each in type(model).__mro__}
    methods = (inspect.unwrap(getattr(type(model), name, None) or _nothing) for name in (SEAM, ENCODE))
    return next((m.__module__ for m in methods if m is not _nothing and m.__module__ not in homes), None)


def _nothing() -> None:
    """Stands for a method that a class does not have."""
