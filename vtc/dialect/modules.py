"""The modules of a vision-language model, and how each of them spells what it is called with."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.dialect import attention, caches, heads, masks
from vtc.dialect.arguments import CACHE, EMBEDS, ENCODED, HIDDEN, IDS, INSTEAD, MASK, POSITIONS, ROTARY, Spelling
from vtc.dialect.compilers import uncompiled
from vtc.dialect.towers import tower_of

_BASE = (IDS, EMBEDS, MASK, CACHE)
_DECODER = (EMBEDS, MASK, POSITIONS, CACHE)
_LAYER = (HIDDEN, MASK, ROTARY, CACHE)


@dataclass(frozen=True)
class Spellings:
    """How the modules of one model spell the roles.

    Attributes:
        root: of what the user calls.
        base: of the base model.
        decoder: of the language model.
        layers: of each of its layers.
    """

    root: Spelling
    base: Spelling
    decoder: Spelling
    layers: tuple[Spelling, ...]

    @classmethod
    def of(cls, root: nn.Module, base: nn.Module, decoder: nn.Module) -> Spellings:
        """Look for every role that the engine writes.

        Raises:
            UnsupportedModelError: one is not there under a name that is known.
        """
        caches.check()
        masks.check()
        layers = tuple(
            Spelling(x.forward, f"{type(x).__name__} (layer {i})", _LAYER) for i, x in enumerate(layers_of(decoder))
        )
        return cls(
            Spelling(root.forward, f"{type(root).__name__}.forward", (IDS,)),
            Spelling(base.forward, f"{type(base).__name__}.forward", _BASE),
            Spelling(decoder.forward, f"{type(decoder).__name__}.forward", _DECODER),
            layers,
        )


def without_adapters(model: Any) -> nn.Module:
    """The transformers model inside a PEFT wrapper, and inside what ``torch.compile(model)`` returns."""
    model = uncompiled(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return uncompiled(model.get_base_model())
    return model


def base_of(model: Any) -> nn.Module:
    """What encodes images, embeds ids, merges both and calls the decoder; the model itself if it is that already."""
    return uncompiled(model.base_model)


def decoder_of(model: Any) -> nn.Module:
    """The language model, which sees embeddings."""
    return uncompiled(model.get_decoder())


def layers_of(decoder: Any) -> list[nn.Module]:
    """Its layers, in the order in which they run."""
    return [uncompiled(layer) for layer in decoder.layers]


def violations(model: Any) -> Iterator[str]:
    """What keeps a model from the build that the engine relies on."""
    if not isinstance(model, nn.Module):
        yield "it is not a torch.nn.Module"
        return
    if not hasattr(model, "base_model") or not hasattr(model, "get_decoder"):
        yield "it is not a transformers PreTrainedModel"
        return
    base, decoder = base_of(model), decoder_of(model)
    if encoder_of(base, "image") is None:
        yield "it has no get_image_features: it does not encode images"
    if decoder is None or decoder is base or decoder is model or not len(getattr(decoder, "layers", ())):
        yield "it has no decoder with layers of its own behind its base model"
        return
    yield from decoder_violations(decoder)
    if (reason := heads.unknown_head(model, base)) is not None:
        yield reason


def decoder_violations(decoder: Any) -> Iterator[str]:
    """What keeps a language model from the build that the engine relies on."""
    if Spelling(layers_of(decoder)[0].forward, "").name(ROTARY) is None:
        yield "its decoder layers take no position_embeddings, so positions could not follow the kept tokens"
    if Spelling(decoder.forward, "").name(INSTEAD) is not None:
        yield (
            "its image features do not enter the language model: placeholders enter as zeros, and features are added "
            "to them between the layers, where nothing tells which of them a method would keep"
        )
    if (layer := next((i for i, x in enumerate(layers_of(decoder)) if attention.picks_blocks(x)), None)) is not None:
        yield (
            f"its layer {layer} picks blocks of keys by the positions of tokens, and behind dropped tokens positions "
            "and keys are no longer the same"
        )


def model_types(model: Any) -> list[str | None]:
    """What a model's config calls its family, and what its base model's does; ``None`` where that is not said."""
    models = (model, getattr(model, "base_model", None))
    return [getattr(getattr(each, "config", None), "model_type", None) for each in models]


def placeholder_id(config: Any, modality: str) -> int | None:
    """The token that features of a modality are written into, ``None`` if the config names none."""
    return getattr(config, f"{modality}_token_id", None)


def encoder_name(modality: str) -> str:
    """The base model's method that encodes a modality."""
    return f"get_{modality}_features"


def encoder_of(base: nn.Module, modality: str) -> Any:
    """That method, ``None`` if the family has no such modality."""
    return getattr(base, encoder_name(modality), None)


def features_in(output: Any) -> Any:
    """Image features in what that method returned: Tensor [images, n, d], or a list of [n, d]; else ``None``."""
    return getattr(output, "pooler_output", None)


def deep_features_in(output: Any) -> list[Any] | None:
    """Features for early layers in what that method returned."""
    return getattr(output, "deepstack_features", None)


def encoder_output(like: Any, features: Any, deep: list[Any] | None) -> Any:
    """An output of that method with other features."""
    fields = {"pooler_output": features} | ({} if deep is None else {"deepstack_features": deep})
    return type(like)(**fields)


def set_features(output: Any, features: Any) -> None:
    """Replace the features in an output of that method."""
    output.pooler_output = features


def last_hidden(output: Any) -> Tensor:
    """The hidden states [B, N, d] that a base model returns."""
    return output[0]


def with_last_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


def takes_encoded(base: nn.Module) -> bool:
    """Whether the base model can be given images that were encoded ahead."""
    return Spelling(base.forward, "").name(ENCODED) is not None


def vision_tower(base: nn.Module) -> str:
    """The class that encodes images, for messages."""
    tower = tower_of(base)
    return "unknown" if tower is None else type(tower).__name__


def projector(base: Any) -> str:
    """The class between vision tower and language model, for messages; empty: none is found."""
    names = ("multi_modal_projector", "connector", "embed_vision")
    found = (getattr(base, name, None) for name in names)
    return next((type(module).__name__ for module in found if module is not None), "")


def rotates_in_3d(config: Any) -> bool:
    """Multimodal RoPE: positions are (time, height, width) triples."""
    return "mrope_section" in str(getattr(config, "rope_parameters", None))


def attention_of(config: Any) -> str:
    """The attention implementation a config asks for (now: it can be switched at any time)."""
    return str(getattr(config, "_attn_implementation", None))


def adds_masks(implementation: str) -> bool:
    """Whether an attention implementation adds a mask of floats to its logits."""
    return implementation in ("sdpa", "eager")


def set_attention(config: Any, implementation: str) -> None:
    """Switch it, without asking whether its package is there."""
    config._attn_implementation = implementation


def builds_masks_early(base: nn.Module) -> bool:
    """The base model, not the decoder, turns the padding mask into attention masks (prefix-LM families).

    Such a family tells ``generate`` how, in the class that generates. Heads that do not generate have no such method,
    and the same base model: the method is looked for wherever the base model is defined.
    """
    return any(_defines_masks(family.__module__) for family in type(base).__mro__)


@functools.cache
def _defines_masks(module: str) -> bool:
    names = vars(sys.modules[module]) if module in sys.modules else {}
    own = (value for value in names.values() if getattr(value, "__module__", None) == module)
    return any(isinstance(value, type) and hasattr(value, "create_masks_for_generate") for value in own)


def default_use_cache(config: Any) -> bool:
    """Whether a decoder fills a cache when the caller does not say."""
    return bool(getattr(config, "use_cache", True))


def embedding_of(base: Any, token: Tensor) -> Tensor:
    """The row of the embedding table of one token id."""
    return base.get_input_embeddings()(token)


def defining_module(module: nn.Module) -> Any:
    """The Python module that defines a module's class: families keep helper functions beside it."""
    return sys.modules[type(module).__module__]


def parameters_of(function: Any) -> list[str]:
    """Names of a function's arguments."""
    return list(inspect.signature(function).parameters)
