"""What pruning can save, before anything is loaded: arithmetic on a config.

The model is built on the meta device, where modules have shapes and no memory. So whatever :func:`vtc.patch` would
refuse is refused here, in the same words, and the adapter, the method's budget and its stages are those that would run.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vtc.binding import bind, parse_request
from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.costs import Decoder
from vtc.devices import Device, device_of
from vtc.dialect import towers as inner
from vtc.dialect.modules import without_adapters
from vtc.feed import Feed, Picture
from vtc.methods import Method, ModelFacts
from vtc.methods.stages import steps_of
from vtc.models import Adapter, Parts, UnsupportedModelError, resolve
from vtc.models.base import square
from vtc.places import Layer, Tower
from vtc.profiling.budget import Way, half_kept, smaller_feed
from vtc.profiling.configs import config_of, settings_beside
from vtc.profiling.encoder import Encoder
from vtc.profiling.feed import feed_of
from vtc.profiling.savings import PromptCost, Savings
from vtc.profiling.towers import tower_of
from vtc.profiling.verdict import assumptions, verdict
from vtc.tokens import Layout, VisualTokens
from vtc.values import shown


@dataclass(frozen=True)
class Estimate(Savings):
    """What pruning can save, with what it comes to in sentences: ``print`` shows them."""

    @property
    def verdict(self) -> tuple[str, ...]:
        """What it comes to, in sentences."""
        return tuple(verdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all fields, all ratios, the verdict."""
        return {
            **dataclasses.asdict(self),
            **{name: getattr(self, name) for name in self.RATIOS},
            "verdict": list(self.verdict),
        }

    def as_way(self, words: str) -> Way:
        """Its pruned side as a way to be compared with others."""
        return Way(words, self.pruned.visual[0], self.ttft_ratio, self.ttft_seconds_pruned)

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

    Rules of counting are those of :mod:`vtc.costs`; numbers are two bytes each. Selecting the tokens is not counted.

    Args:
        model: a transformers config; a model, of which only the config is read; or a local folder, a config.json, the
            name of a model that comes with vtc or is known without a hub (:mod:`vtc.published`), or another on the hub.
        image: (width, height) in pixels.
        frames: a video of so many such images instead of one image.
        text: tokens of the prompt that are not visual.
        batch: equal prompts.
        method: as for :func:`vtc.patch`, with ``keep`` and ``options``.
        keep: the same.
        device: one of :data:`vtc.devices.DEVICES`, or a :class:`~vtc.devices.Device`.
        tokens: visual tokens of the prompt; by default those that the image makes. What the tower costs follows from
            the image in either case.
        settings: entries of ``preprocessor_config.json``; default: those beside the model, else as published.
        options: with a method's name only: further options of it.

    Raises:
        ValueError: an unknown device or family, a config without a vision tower, a size the processor would refuse, or
            whatever :func:`vtc.patch` would refuse.
        OSError: there is no such model.
        TypeError: a size or a count that is no whole number.
    """
    device, picture = device_of(device), Picture(*_pair(image), frames)
    for name, value in (("text", text), ("batch", batch), ("tokens", tokens)):
        if name != "tokens" or value is not None:
            _check_count(name, value)
    config, chosen = parse_request(method, keep, None, options)
    root = _skeleton(model)
    adapter, parts = resolve(root)
    tower_of(parts, picture.modality)
    chosen = bind(adapter, parts, chosen, config.positions, config.calibration)
    if settings is None:
        settings = settings_beside(model, picture.modality) if isinstance(model, (str, os.PathLike)) else {}
    feed = feed_of(parts, picture, settings)
    pictures = layouts = _layouts(adapter, parts, picture, feed)
    of_picture = sum(layout.length for layout in layouts)
    if tokens is not None:
        layouts = [Layout.plain(tokens, square(tokens))]
    visual = sum(layout.length for layout in layouts)
    facts = adapter.facts(parts)
    tower = adapter.tower(parts.base, picture.modality)
    encoder, decoder = Encoder.of(parts, picture.modality), Decoder.of(parts.decoder, root)
    depth = len(decoder.layers)

    def pruned(by: Method) -> dict[str, Any]:
        """What depends on the method."""
        blocks, left = None, 0
        if tower is not None and facts.tower_depth:
            blocks = rows_per_block(by, facts, feed, tower, pictures)
            left = 0 if facts.restores else (sum(feed.sequences) - sum(blocks[-1])) // tower.unit
        per_layer = tokens_per_layer(by, facts, layouts)
        uneven = left > 0 and tower is not None and tower.packed and (len(feed.sequences) > 1 or bool(feed.windows))
        return {
            "method": str(by),
            "vision_pruned": encoder.vision(feed, batch, blocks, left if tower is not None and tower.mergers else 0),
            "in_tower": any(isinstance(step.stage.at, Tower) for step in steps_of(by, facts)),
            "projector_pruned": encoder.projection(feed, batch, left),
            "pruned": PromptCost.of(decoder, per_layer, text, batch),
            "notes": tuple(assumptions(by, picture, per_layer, of_picture, tokens, uneven)),
        }

    parameters = sum(parameter.numel() for parameter in root.parameters())
    found = Estimate(
        model=parts.config.model_type,
        parameters=parameters,
        picture=str(picture),
        fed=feed.words,
        visual_tokens=visual,
        text_tokens=text,
        batch=batch,
        vision=encoder.vision(feed, batch),
        projector=encoder.projection(feed, batch),
        full=PromptCost.of(decoder, [visual] * depth, text, batch),
        text_only=decoder.prefill([text] * depth, batch),
        weight_bytes=2.0 * parameters,
        device=device,
        open_tower=bool(facts.tower_depth),
        **pruned(chosen),
    )
    smaller = None if tokens is not None else smaller_feed(adapter, parts, picture, settings, visual)
    if smaller is None:
        return found
    words, less = smaller
    fewer = sum(layout.length for layout in _layouts(adapter, parts, picture, less))
    ways = [
        replace(
            found,
            vision_pruned=encoder.vision(less, batch),
            projector_pruned=encoder.projection(less, batch),
            pruned=PromptCost.of(decoder, [fewer] * depth, text, batch),
        ).as_way(words)
    ]
    if (half := half_kept(chosen)) is not None:
        ways.append(replace(found, **pruned(half)).as_way(f"keep=0.5 ({chosen.name})"))
    return replace(found, halves=tuple(ways))


def tokens_per_layer(method: Method, facts: ModelFacts, layouts: Sequence[Layout]) -> list[int]:
    """Visual tokens in each layer, from the method's own counts; where content decides, for pictures that show nothing.

    Args:
        method: settled for the model.
        facts: of the model.
        layouts: of the images of one prompt.
    """
    longest = max(layout.length for layout in layouts)
    features = torch.zeros(len(layouts), longest, 1)  # of a picture that shows nothing
    tokens = VisualTokens(features, tuple(layouts), tuple(range(len(layouts))), samples=(0,) * len(layouts))
    entered: dict[int, tuple[int, ...]] = {}
    per_layer: list[int] = []
    for step in steps_of(method, facts):
        if isinstance(step.stage.at, Tower) and (step.stage.at.restore or facts.restores):
            entered[id(step.method)] = tokens.counts
            continue
        if isinstance(step.stage.at, Layer):
            per_layer += [sum(tokens.counts)] * (step.stage.at.after - len(per_layer))
        at_entry = entered.setdefault(id(step.method), tokens.counts)
        counts = step.counts(layouts, at_entry, tokens.counts)
        if counts is None:
            signals = {signal.key: signal.blank(len(layouts), longest) for signal in step.stage.needs}
            counts = step.reduce(replace(tokens, signals=signals, entered=at_entry)).counts
        ends = torch.tensor(counts)[:, None]
        tokens = replace(tokens, alive=torch.arange(longest) < ends, alive_counts=counts)
    return per_layer + [sum(tokens.counts)] * (facts.depth - len(per_layer))


def rows_per_block(
    method: Method, facts: ModelFacts, feed: Feed, tower: inner.Tower, pictures: Sequence[Layout]
) -> list[tuple[int, ...]]:
    """Rows that see each other in each block of the vision tower that the language model gets to see.

    Args:
        method: settled for the model.
        facts: of the model.
        feed: of the image.
        tower: the tower. Where the patches of a token leave together, what stays is spread evenly over frames.
        pictures: the tokens that the image makes.
    """
    special = tower.special
    now = given = tuple(n - special for n in feed.sequences)
    layouts: Sequence[Layout] = [Layout.plain(n, square(n)) for n in given]
    if tower.packed:
        layouts, now = pictures, tuple(layout.length for layout in pictures)
        given = now
    counts: list[tuple[int, ...]] = []
    for step in steps_of(method, facts):
        if isinstance(step.stage.at, Tower):
            counts += [now] * (step.stage.at.block - len(counts))
            now = step.counts(layouts, given, now) or now
    counts += [now] * (facts.tower_depth - len(counts))
    if tower.packed:
        return [tuple(n * sum(kept) // sum(given) for n in feed.sequences) for kept in counts]
    return [tuple(n + special for n in kept) for kept in counts]


# ------------------------------------------------------------------------------------------------------------- building


def _skeleton(model: Any) -> nn.Module:
    """The model on the meta device: modules with shapes, without weights."""
    import transformers as tf

    build: Any
    if isinstance(model, nn.Module):
        model = without_adapters(model)
        _, parts = resolve(model)
        if not parts.placeholders:
            raise UnsupportedModelError(
                f"{type(model).__name__} embeds prompts in a method of its own, and nothing is known ahead of what it "
                "makes of a picture; vtc.patch(model, ...) works"
            )
        build, config = type(model), model.config
    else:
        config = config_of(model)
        build = tf.AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        return build(copy.deepcopy(config))


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
