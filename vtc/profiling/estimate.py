"""What pruning can save, before anything is loaded: arithmetic on a config.

The model is built on the meta device, where modules have shapes and no memory. So whatever :func:`vtc.patch` would
refuse is refused here, in the same words, and the adapter, the method's budget and its stages are those that would run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import nn

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.costs import Cost, Decoder
from vtc.dialect.modules import without_adapters
from vtc.methods import Method, ModelFacts
from vtc.methods.stages import steps_of
from vtc.models import Adapter, Parts, resolve
from vtc.models.base import square
from vtc.patching import fitted, requested
from vtc.places import Layer
from vtc.profiling.configs import config_of, settings_beside
from vtc.profiling.devices import Device, device_of
from vtc.profiling.encoder import Encoder
from vtc.profiling.feed import Feed, Picture
from vtc.profiling.images import feed_of
from vtc.profiling.towers import tower_of
from vtc.tokens import Layout, VisualTokens
from vtc.values import shown


@dataclass(frozen=True)
class Side:
    """The language model's part, unpruned or pruned, for the whole batch.

    Attributes:
        visual: visual tokens of one prompt in each layer.
        layers: FLOPs of each layer in prefill.
        prefill: from the first layer to the last position's logits.
        decode: one step behind the prompt: one token for each sample.
        cache_bytes: of keys and values of the prompt.
    """

    visual: tuple[int, ...]
    layers: tuple[float, ...]
    prefill: Cost
    decode: Cost
    cache_bytes: float

    @classmethod
    def of(cls, decoder: Decoder, visual: Sequence[int], text: int, batch: int) -> Side:
        """From the visual tokens in each layer."""
        tokens = [n + text for n in visual]
        flops = tuple(batch * layer.flops(n) for layer, n in zip(decoder.layers, tokens, strict=True))
        prefill, decode = decoder.prefill(tokens, batch), decoder.decode(tokens, batch)
        return cls(tuple(visual), flops, prefill, decode, decoder.cache_bytes(tokens, batch))


@dataclass(frozen=True)
class Estimate:
    """Costs of one batch of prompts, unpruned and pruned. Times are floors that no machine reaches.

    Attributes:
        model: its type.
        parameters: of the whole model.
        picture: what was asked about.
        fed: what the processor makes of it.
        method: as it would run on this model.
        visual_tokens: of one prompt.
        text_tokens: all others of one prompt, wrappers and row breaks included.
        batch: prompts.
        vision: of the tower.
        projector: between tower and language model.
        full: the language model, unpruned.
        pruned: the same, pruned.
        text_only: prefill of the text alone: what is left of a prompt without visual tokens.
        weight_bytes: of the whole model.
        device: whose roofline it is.
        notes: what was assumed.
    """

    model: str
    parameters: int
    picture: str
    fed: str
    method: str
    visual_tokens: int
    text_tokens: int
    batch: int
    vision: Cost
    projector: Cost
    full: Side
    pruned: Side
    text_only: Cost
    weight_bytes: float
    device: Device
    notes: tuple[str, ...] = ()

    RATIOS: ClassVar[tuple[str, ...]] = (
        "ttft_ratio",
        "llm_ratio",
        "ceiling",
        "vision_share",
        "ttft_seconds",
        "ttft_seconds_pruned",
        "ttft_time_ratio",
        "decode_ratio",
        "cache_ratio",
        "average_keep",
        "ridge_tokens",
    )

    @property
    def before(self) -> Cost:
        """What no pruning behind the projector saves: tower and projector."""
        return self.vision + self.projector

    @property
    def ttft_ratio(self) -> float:
        """FLOPs to the first token, unpruned over pruned, vision tower and projector included: the ideal speed-up."""
        return (self.before + self.full.prefill).flops / (self.before + self.pruned.prefill).flops

    @property
    def llm_ratio(self) -> float:
        """The same for the language model alone."""
        return self.full.prefill.flops / self.pruned.prefill.flops

    @property
    def ceiling(self) -> float:
        """The ideal ratio if every visual token left behind the projector, and the text stayed."""
        return (self.before + self.full.prefill).flops / (self.before + self.text_only).flops

    @property
    def vision_share(self) -> float:
        """Share of tower and projector in the FLOPs to the first token, unpruned."""
        return self.before.flops / (self.before + self.full.prefill).flops

    @property
    def ttft_seconds(self) -> float:
        """Floor of the time to the first token, unpruned."""
        return self._ttft(self.full)

    @property
    def ttft_seconds_pruned(self) -> float:
        """The same, pruned."""
        return self._ttft(self.pruned)

    @property
    def ttft_time_ratio(self) -> float:
        """Unpruned over pruned, by those floors: below :attr:`ttft_ratio` where reading weights takes longer."""
        return self.ttft_seconds / self.ttft_seconds_pruned

    @property
    def decode_ratio(self) -> float:
        """Bytes that a decode step moves, unpruned over pruned."""
        return self.full.decode.bytes / self.pruned.decode.bytes

    @property
    def cache_ratio(self) -> float:
        """Bytes of keys and values, unpruned over pruned."""
        return self.full.cache_bytes / self.pruned.cache_bytes

    @property
    def average_keep(self) -> float:
        """Share of visual tokens, averaged over the layers."""
        return sum(self.pruned.visual) / (len(self.pruned.visual) * self.visual_tokens)

    @property
    def ridge_tokens(self) -> float:
        """Tokens, over the batch, below which fewer tokens cannot make prefill faster on this device."""
        return self.device.ridge

    def seconds(self, cost: Cost) -> float:
        """The floor of a part's time."""
        return self.device.seconds(cost.flops, cost.bytes)

    def _ttft(self, side: Side) -> float:
        return sum(self.seconds(part) for part in (self.vision, self.projector, side.prefill))

    @property
    def schedule(self) -> list[tuple[int, int, int]]:
        """(first layer, last layer, visual tokens) of each run of layers with equally many; layers count from 1."""
        runs, at = [], 0
        for count, run in groupby(self.pruned.visual):
            length = len(list(run))
            runs.append((at + 1, at + length, count))
            at += length
        return runs

    @property
    def verdict(self) -> tuple[str, ...]:
        """What it comes to, in sentences."""
        return tuple(_verdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all fields, all ratios, the verdict."""
        return {
            **dataclasses.asdict(self),
            **{name: getattr(self, name) for name in self.RATIOS},
            "verdict": list(self.verdict),
        }

    def __str__(self) -> str:
        return " ".join(self.verdict)


def estimate(
    model: Any,
    image: tuple[int, int] = (1024, 1024),
    *,
    frames: int | None = None,
    text: int = 64,
    batch: int = 1,
    method: str | Method | CompressionConfig = "divprune",
    keep: Keep | None = None,
    device: str | Device = "h200",
    tokens: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Estimate:
    """FLOPs, bytes and their ratios for one model, picture and method; needs a config only, no weights and no GPU.

    Rules of counting are those of :mod:`vtc.costs`; numbers are two bytes each. Selecting the tokens is not
    counted.

    Args:
        model: a transformers config; a model, of which only the config is read; or a local folder, config.json or name
            on the hub.
        image: (width, height) in pixels.
        frames: a video of so many such images instead of one image.
        text: tokens of the prompt that are not visual.
        batch: equal prompts.
        method: as for :func:`vtc.patch`, with ``keep`` and ``options``.
        keep: the same.
        device: one of :data:`vtc.profiling.devices.DEVICES`, or a :class:`~vtc.profiling.devices.Device`.
        tokens: visual tokens, if they shall not be those that the image makes (the tower sees the image all the same).
        settings: entries of ``preprocessor_config.json``; default: those beside the model, else as published.
        options: with a method's name only: further options of it.

    Raises:
        ValueError: an unknown device or family, a config without a vision tower, a size the processor would refuse, or
            whatever :func:`vtc.patch` would refuse.
        OSError: there is no such model.
        TypeError: numbers that are none.
    """
    device, picture = device_of(device), Picture(*_pair(image), frames)
    for name, value in (("text", text), ("batch", batch), ("tokens", tokens)):
        if name != "tokens" or value is not None:
            _check_count(name, value)
    config, chosen = requested(method, keep, None, options)
    root = _skeleton(model)
    adapter, parts = resolve(root)
    tower_of(parts, picture.modality)
    chosen = fitted(adapter, parts, chosen, config.positions)
    if settings is None:
        settings = settings_beside(model, picture.modality) if isinstance(model, (str, os.PathLike)) else {}
    feed = feed_of(parts, picture, settings)
    layouts = _layouts(adapter, parts, picture, feed)
    made = sum(layout.length for layout in layouts)
    if tokens is not None:
        layouts = [Layout.plain(tokens, square(tokens))]
    visual = sum(layout.length for layout in layouts)
    present = tokens_per_layer(chosen, adapter.facts(parts), layouts)
    encoder, decoder = Encoder.of(parts, picture.modality), Decoder.of(parts.decoder, root)
    depth = len(decoder.layers)
    parameters = sum(parameter.numel() for parameter in root.parameters())
    return Estimate(
        model=parts.config.model_type,
        parameters=parameters,
        picture=str(picture),
        fed=feed.words,
        method=str(chosen),
        visual_tokens=visual,
        text_tokens=text,
        batch=batch,
        vision=encoder.vision(feed, batch),
        projector=encoder.projection(feed, batch),
        full=Side.of(decoder, [visual] * depth, text, batch),
        pruned=Side.of(decoder, present, text, batch),
        text_only=decoder.prefill([text] * depth, batch),
        weight_bytes=2.0 * parameters,
        device=device,
        notes=tuple(_notes(chosen, picture, present, made, tokens)),
    )


def tokens_per_layer(method: Method, facts: ModelFacts, layouts: Sequence[Layout]) -> list[int]:
    """Visual tokens in each layer, from the method's own counts; where content decides, for pictures that show nothing.

    Args:
        method: settled for the model.
        facts: of the model.
        layouts: of the images of one prompt.
    """
    longest = max(layout.length for layout in layouts)
    features = torch.zeros(len(layouts), longest, 1)  # of no meaning, as counts have none
    tokens = VisualTokens(features, tuple(layouts), tuple(range(len(layouts))), samples=(0,) * len(layouts))
    entered: dict[int, tuple[int, ...]] = {}
    present: list[int] = []
    for step in steps_of(method, facts):
        if isinstance(step.stage.at, Layer):
            present += [sum(tokens.counts)] * (step.stage.at.after - len(present))
        given = entered.setdefault(id(step.method), tokens.counts)
        counts = step.counts(layouts, given, tokens.counts)
        if counts is None:
            signals = {signal.key: signal.blank(len(layouts), longest) for signal in step.stage.needs}
            counts = step.reduce(replace(tokens, signals=signals, entered=given)).counts
        ends = torch.tensor(counts)[:, None]
        tokens = replace(tokens, alive=torch.arange(longest) < ends, alive_counts=counts)
    return present + [sum(tokens.counts)] * (facts.depth - len(present))


# ------------------------------------------------------------------------------------------------------------- building


def _skeleton(model: Any) -> nn.Module:
    """The model on the meta device: modules with shapes, without weights."""
    import transformers as tf

    if isinstance(model, nn.Module):
        model = without_adapters(model)
        resolve(model)
        build, config = type(model), model.config
    else:
        config = config_of(model)
        build = tf.AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        return build(copy.deepcopy(config))  # type: ignore[operator]


def _layouts(adapter: Adapter, parts: Parts, picture: Picture, feed: Feed) -> list[Layout]:
    layouts = adapter.layouts(parts.base, picture.modality, list(feed.lengths), feed.arguments)
    return layouts if adapter.merge is None else [adapter.merge(layouts)]


def _pair(image: Any) -> tuple[int, int]:
    if not isinstance(image, (tuple, list)) or len(image) != 2:
        raise TypeError(f"image={shown(image)} is no (width, height)")
    return image[0], image[1]


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={shown(value)} is no whole number")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


# -------------------------------------------------------------------------------------------------------------- wording


def _notes(method: Method, picture: Picture, present: list[int], made: int, tokens: int | None) -> Iterator[str]:
    if tokens is not None:
        yield f"{tokens} visual tokens as asked for; {picture} makes {made}."
    if present[-1] == 0:
        first = present.index(0)
        yield f"After layer {first} {method.name} drops all visual tokens or none, by the question: counted as dropped."
    if method.name == "globalcom2":
        yield "How budgets spread over crops depends on the picture: counted for a picture that shows nothing."


def _verdict(e: Estimate) -> Iterator[str]:
    yield (
        f"By arithmetic the first token comes {e.ttft_ratio:.2f}x sooner, the language model's part alone "
        f"{e.llm_ratio:.2f}x."
    )
    yield (
        f"The vision tower is {e.vision_share:.0%} of the work before the first token, projector included: nothing "
        f"after it can beat {e.ceiling:.1f}x with {e.text_tokens} text tokens."
    )
    yield from _ridge(e)
    yield from _decoding(e)
    yield from _memory(e)
    gain = min(e.ttft_ratio, e.ttft_time_ratio)
    where = f"on {e.device.name} at batch {e.batch}"
    if gain >= 1.5:
        yield f"Verdict: worth it, up to {gain:.2f}x {where}."
    elif gain >= 1.1:
        yield f"Verdict: a modest gain, up to {gain:.2f}x {where}."
    else:
        yield f"Verdict: not worth it for speed, {gain:.2f}x at best {where}."


def _ridge(e: Estimate) -> Iterator[str]:
    each = sum(e.pruned.visual) / len(e.pruned.visual) + e.text_tokens
    full, left = e.batch * (e.visual_tokens + e.text_tokens), e.batch * each
    bound = f"below the {e.ridge_tokens:.0f} that {e.device.name} can multiply while it reads a weight"
    if full <= e.ridge_tokens:
        yield f"The {full} tokens are {bound}: prefill is bound by memory, and fewer tokens cannot make it faster."
    elif left < e.ridge_tokens:
        batch = math.ceil(e.ridge_tokens / each)
        yield f"The {left:.0f} tokens that stay are {bound}: part of the gain is lost, below batch {batch}."


def _memory(e: Estimate) -> Iterator[str]:
    for side, words in ((e.pruned, "even pruned"), (e.full, "unpruned")):
        need = e.weight_bytes + side.cache_bytes
        if need > e.device.memory:
            yield f"Weights and cache need {_bytes(need)} {words}; {e.device.name} has {_bytes(e.device.memory)}."
            return


def _decoding(e: Estimate) -> Iterator[str]:
    gain = f"{e.decode_ratio:.2f}x"
    cache = e.full.cache_bytes
    saved = f"the cache of the prompt shrinks from {_bytes(cache)} to {_bytes(e.pruned.cache_bytes)}"
    if e.decode_ratio < 1.05:
        yield f"Decoding gains nothing to speak of ({gain}), because it reads weights, not cache; {saved}."
    else:
        yield f"A decode step moves {gain} fewer bytes; {saved}."


def _bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
