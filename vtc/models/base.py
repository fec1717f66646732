"""Where the visual tokens are in a model: the adapter of a family, and the registry of families.

Most families of transformers look alike from here: a base model that encodes pixels, writes the features into
placeholder tokens and calls a decoder with embeddings. :class:`Adapter` serves them all without knowing their names. A
family gets a subclass only for what truly differs: a CLS row, a thumbnail, newlines, grids.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vtc.dialect import attention, heads, modules
from vtc.dialect.heads import Head
from vtc.dialect.modules import Spellings
from vtc.dialect.towers import Tower, blocks_read
from vtc.errors import UnsupportedModelError
from vtc.feed import Feed, Picture
from vtc.methods.base import ModelFacts
from vtc.models import elsewhere
from vtc.models.refused import REFUSED
from vtc.signals import TOWER_SIGNALS, Pixels, Signal, TowerSignal
from vtc.tokens import Layout

MODALITIES = ("image", "video")


@dataclass(frozen=True)
class Parts:
    """The modules of one model that the engine hooks.

    Attributes:
        root: what the user calls, ``generate`` included.
        base: encodes images, embeds ids, merges both, calls the decoder (``root.model`` as a rule).
        decoder: the language model, which sees embeddings.
        placeholders: token id by modality.
        spellings: what their arguments are called.
    """

    root: Any
    base: Any
    decoder: Any
    placeholders: Mapping[str, int]
    spellings: Spellings

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def layers(self) -> list[nn.Module]:
        return modules.layers_of(self.decoder)

    @property
    def vision_tower(self) -> str:
        """The class that encodes images, for messages."""
        return modules.vision_tower(self.base)

    @property
    def rotates_in_3d(self) -> bool:
        """Multimodal RoPE: positions are (time, height, width) triples."""
        return modules.rotates_in_3d(self.decoder.config)

    @property
    def attention(self) -> str:
        """The attention implementation of the language model (now: it can be switched at any time)."""
        return modules.attention_of(self.decoder.config)

    @property
    def flash(self) -> bool:
        """The language model attends through a flash_attention package."""
        return "flash" in self.attention

    @property
    def adds_masks(self) -> bool:
        """The language model's attention adds a mask of floats to its logits."""
        return modules.adds_masks(self.attention)

    @property
    def builds_masks_early(self) -> bool:
        """The base model, not the decoder, turns the padding mask into attention masks (prefix-LM families)."""
        return modules.builds_masks_early(self.base)

    @property
    def head(self) -> Head:
        """How what the user calls reads the base model's hidden states."""
        head = heads.head_of(self.root, self.base)
        assert head is not None  # or it was refused
        return head

    @property
    def reads_positions(self) -> bool:
        """Some decoder layer computes with position ids, not only with rotary embeddings."""
        return any(attention.reads_positions(layer) for layer in self.layers)


@dataclass(frozen=True, order=True)
class ModelFamily:
    """One entry of :func:`families`.

    Attributes:
        model_type: of transformers' configs.
        modalities: those that are tested.
        signals: of attention in its vision tower, as far as it gives them as a rule.
        notes: what is particular about it.
    """

    model_type: str
    modalities: tuple[str, ...]
    signals: tuple[str, ...]
    notes: str


class Adapter:
    """How vtc finds its way in one family. The base class is the default of every family that needs nothing else.

    Subclasses set ``families`` and override what differs; see the README for a complete one in six lines.
    """

    families: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """``model_type`` → modalities that are tested."""
    notes: ClassVar[str] = ""
    has_cls: ClassVar[bool] = False
    """Its vision tower has a CLS token as a rule, and :meth:`tower` finds it."""
    has_thumbnail: ClassVar[bool] = False
    """A large image is a thumbnail and crops, and :meth:`layouts` says where in the image each crop is."""
    matryoshka: ClassVar[bool] = False
    """The first m of an image's n tokens are, for every m, what a prompt of m tokens would have."""

    def placeholders(self, config: Any) -> dict[str, int]:
        """The token id, by modality, that features are written into."""
        ids = {modality: modules.placeholder_id(config, modality) for modality in MODALITIES}
        return {modality: token for modality, token in ids.items() if token is not None}

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        """The structure of each image's tokens.

        Args:
            base: the base model.
            modality: ``image`` or ``video``.
            lengths: number of features of each entry of the encoder's output.
            arguments: what the encoder was called with (pixels, grids, sizes); empty when that is not known.

        Returns:
            One layout per image, in encoder order; entries may be joined or split, not reordered.
        """
        return [Layout.plain(n, square(n)) for n in lengths]

    merge: Callable[[Sequence[Layout]], Layout] | None = None
    """A method, where encoder entries that stand together in the prompt are tiles of one image: their joint layout."""

    def gives(self, parts: Parts, signal: Signal) -> bool:
        """Whether this very model can give a signal, e.g. ``cls`` only where the vision tower has a CLS token."""
        if isinstance(signal, Pixels):
            return self.reduces(parts.base, "image") == "units"
        return not isinstance(signal, TowerSignal) or signal.of(self.tower(parts.base, "image")) is not None

    def facts(self, parts: Parts) -> ModelFacts:
        """What a method may know of the model when it decides whether it can work."""
        return ModelFacts(
            model_type=parts.config.model_type,
            width=parts.decoder.config.hidden_size,
            depth=len(parts.layers),
            signals=frozenset(signal.kind for signal in TOWER_SIGNALS if self.gives(parts, signal())),
            has_thumbnail=self.has_thumbnail,
            tower_depth=self._tower_depth(parts.base),
            restores=self.reduces(parts.base, "image") == "restore",
            matryoshka=self.matryoshka,
            projector=modules.projector(parts.base),
        )

    def _tower_depth(self, base: Any) -> int:
        tower = self.tower(base, "image")
        return 0 if tower is None or self.reduces(base, "image") is None else blocks_read(base, tower)

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        """What the family makes of a picture or video, as counts: for estimates, which see no pixels.

        Args:
            parts: of the model; its weights are not looked at.
            picture: the size.
            settings: what a processor may decide, as in ``preprocessor_config.json``; without, it is what the family
                was published with.

        Raises:
            ValueError: the processor would refuse the size.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rule for the size of a picture")

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Ever smaller budgets that the processor can be given for an image; none where it has no budget of its own.

        Arguments are those of :meth:`feed`.

        Returns:
            Of each how it is written, and what it changes in ``settings``.
        """
        return ()

    def tower(self, base: Any, modality: str) -> Tower | None:
        """The vision tower that signals are read from, ``None`` where patches and tokens cannot be matched."""
        return None

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore", "units"] | None:
        """How patches may leave inside the vision tower: ``drop`` where each is a token by itself, ``restore`` where a
        token is made of several that stand apart, ``units`` where those stand together in one row (see
        :meth:`pictures`); ``None``: not at all.
        """
        return None

    def pictures(self, base: Any, modality: str, arguments: Mapping[str, Any]) -> list[Layout]:
        """The structure of each picture's tokens, known before the tower has run: where it ``reduces`` in units.

        Args:
            base: the base model.
            modality: ``image`` or ``video``.
            arguments: what the encoder was called with.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what pictures will be")

    def pixels(self, modality: str, arguments: Mapping[str, Any]) -> Tensor:
        """What such a tower is fed, patch by patch and token by token: [patches of all pictures, c]."""
        raise NotImplementedError(f"{type(self).__name__} does not tell what pixels are")

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        """Values of the tower's patches, sent the way that the features go.

        Args:
            base: the base model.
            modality: ``image`` or ``video``.
            values: [pictures, patches] or [pictures, patches, c].
            layouts: of the images, from :meth:`layouts`.
            arguments: what the encoder was called with.

        Returns:
            For each image [n] or [n, c]; 0 for newlines and other tokens without a patch.
        """
        return [row for row, _ in zip(values, layouts, strict=True)]

    def around(self, stage: Any) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Methods of a model that only this family has, to be wrapped while it is patched.

        Args:
            stage: the engine's entry stage of the patch.

        Returns:
            Of each the owner, the name, and what goes around it: a function from the method to what is called instead.
        """
        return ()


_REGISTRY: dict[str, Adapter] = {}


def register_model(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: use this adapter for its ``families``.

    Raises:
        ValueError: no families given, or one is registered already.
    """
    if not adapter.families:
        raise ValueError(f"{adapter.__name__}.families is empty; name at least one model_type")
    for model_type in adapter.families:
        if model_type in _REGISTRY and type(_REGISTRY[model_type]).__qualname__ != adapter.__qualname__:
            raise ValueError(f"{model_type!r} is registered already, by {type(_REGISTRY[model_type]).__name__}")
    _REGISTRY.update(dict.fromkeys(adapter.families, adapter()))
    return adapter


def list_models() -> list[str]:
    """The ``model_type`` of every family that is tested, sorted. Others that look alike are accepted too."""
    return sorted(_REGISTRY)


def families() -> list[ModelFamily]:
    """The same with what is known of them."""
    return [
        ModelFamily(name, adapter.families[name], _looks(adapter), adapter.notes)
        for name, adapter in sorted(_REGISTRY.items())
    ]


def _looks(adapter: Adapter) -> tuple[str, ...]:
    """``cls`` where there is a CLS token, ``received`` where the adapter finds a tower at all."""
    finds = type(adapter).tower is not Adapter.tower
    return ("cls", "cls_logits") * adapter.has_cls + ("received",) * finds


def adapter_of(model_type: str | None) -> Adapter:
    """The adapter registered for a ``config.model_type``, else the generic one."""
    return _REGISTRY.get(model_type or "") or Adapter()


def resolve(model: nn.Module) -> tuple[Adapter, Parts]:
    """The adapter and the parts of a model; PEFT wrappers are looked through.

    Raises:
        UnsupportedModelError: with the reason and what would work.
    """
    model = modules.without_adapters(model)
    model_type = _family(model)
    adapter = adapter_of(model_type)
    known = None if model_type in _REGISTRY else REFUSED.get(model_type or "")  # a user's own adapter may know better
    reason = known or next(_violations(model, adapter), None)
    if reason is not None:
        if (found := elsewhere.find(model)) is not None:
            return found
        raise UnsupportedModelError(_refusal(model, model_type, reason))
    base, decoder = modules.base_of(model), modules.decoder_of(model)
    return adapter, Parts(model, base, decoder, adapter.placeholders(base.config), Spellings.of(model, base, decoder))


def _family(model: Any) -> str | None:
    """The ``model_type`` to go by: the model's, or its base model's where only that one has an entry here."""
    types = modules.model_types(model)
    return next((name for name in types if name in _REGISTRY or name in REFUSED), types[0])


def _violations(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """What keeps a model from the contract that the engine relies on."""
    yield from modules.violations(model)
    if not adapter.placeholders(modules.base_of(model).config):
        yield "its config has no image_token_id: visual tokens cannot be told from text"


def _refusal(model: Any, model_type: str | None, reason: str) -> str:
    near = difflib.get_close_matches(str(model_type), _REGISTRY, n=3, cutoff=0.6)
    return (
        f"{type(model).__name__} (model_type {model_type!r}) cannot be pruned: {reason}. "
        + (f"Nearest supported: {', '.join(near)}. " if near else "")
        + f"Supported: {', '.join(sorted(_REGISTRY))}, and any transformers model of the same build. To add a family, "
        "subclass vtc.Adapter and decorate it with @vtc.register_model."
    )


def square(n: int) -> tuple[int, int] | None:
    """(rows, columns) of n tokens if they can be a square grid."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else None
