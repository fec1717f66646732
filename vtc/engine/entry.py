"""The entry stage: visual tokens leave between the projector and the language model.

Two pre-hooks do it. The one on the base model reads the ids (the only host sync: where the placeholders are must be
known before anything can be planned; it happens before the decoder starts) and translates a decode step's padding mask
to physical slots. The one on the decoder sees the merged embeddings, asks the method which tokens stay and compacts
embeddings, positions, masks and whatever else is aligned with the sequence. Nothing there waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.compaction import Compaction
from vtc.engine.context import FRAME, PREPARED_MASK, Frame, is_bypassed
from vtc.engine.encode import attached
from vtc.engine.lengths import SlotMap, adopt, physical_length, slot_map
from vtc.engine.locate import Located, locate
from vtc.methods import Method
from vtc.models import Adapter, Parts
from vtc.tokens import VisualTokens

_DEEPSTACK = ("deepstack_visual_embeds", "deepstack_features")


@dataclass(frozen=True)
class Plan:
    """The decision for one batch of prompts.

    Attributes:
        images: what was found, by row.
        keep: bool [G, N], which of each image's tokens stay (on the model's device).
        counts: how many (host integers).
        flat: LongTensor [G, N], where each token sits in the flattened batch; padding points past its end.
    """

    images: list[Located]
    keep: Tensor
    counts: tuple[int, ...]
    flat: Tensor

    @property
    def drops(self) -> bool:
        """Whether anything goes."""
        return any(k < image.layout.length for k, image in zip(self.counts, self.images, strict=True))

    def kept(self, batch: int) -> list[list[Tensor]]:
        """Kept indices among each image's tokens, by sample and image."""
        samples: list[list[Tensor]] = [[] for _ in range(batch)]
        for image, row in zip(self.images, self.keep.cpu(), strict=True):
            samples[image.row].append(row.nonzero()[:, 0])
        return samples


def plan(method: Method, frame: Frame, embeds: Tensor) -> Plan | None:
    """Find the images of a call and let the method choose.

    ``embeds`` [B, N, d] is what enters the decoder; at placeholders these are the projected features.
    """
    placeholders = {m: mask for m, mask in frame.placeholders.items() if m in frame.encoded}
    images = locate(placeholders, frame.encoded) if placeholders else []
    if not images:
        return None
    width = embeds.shape[1]
    flat = torch.nn.utils.rnn.pad_sequence(
        [image.row * width + image.columns for image in images],
        batch_first=True,
        padding_value=embeds.shape[0] * width,
    ).to(embeds.device, non_blocking=True)
    features = embeds.detach().flatten(0, 1)[flat.clamp(max=embeds.shape[0] * width - 1)]
    tokens = VisualTokens(features, tuple(i.layout for i in images), _ordinals(images), _signals(method, frame, images))
    keep, counts = method.keep_mask(tokens)
    return Plan(images, keep, counts, flat)


def _ordinals(images: list[Located]) -> tuple[int, ...]:
    rows = [image.row for image in images]
    return tuple(rows[:g].count(row) for g, row in enumerate(rows))


def _signals(method: Method, frame: Frame, images: list[Located]) -> dict[str, Tensor]:
    def find(name: str, image: Located) -> Tensor:
        scores = frame.encoded[image.modality].signals.get(name)
        if scores is None or not image.sources:
            raise ValueError(
                f"method {method.name!r} needs the signal {name!r}, but the images of this prompt were encoded where "
                "it could not be heard (before the model was patched?); pass pixel values to the patched model"
            )
        return torch.cat([scores[source] for source in image.sources])

    return {
        name: torch.nn.utils.rnn.pad_sequence([find(name, image) for image in images], batch_first=True)
        for name in method.needs
    }


def compaction(plan: Plan, frame: Frame, shape: torch.Size) -> Compaction:
    """From the plan to the columns that stay in each row: text, kept visual tokens, no padding."""
    batch, width = shape
    device = plan.keep.device
    gone = torch.zeros(batch * width + 1, dtype=torch.bool, device=device)
    gone = gone.scatter(0, plan.flat.flatten(), ~plan.keep.flatten())[:-1].view(batch, width)
    real = None if frame.mask is None else frame.mask[:, -width:].bool()
    keep = ~gone if real is None else ~gone & real.to(device)
    dropped = [0] * batch
    for image, count in zip(plan.images, plan.counts, strict=True):
        dropped[image.row] += image.layout.length - count
    lengths = [width] * batch if real is None else frame.lengths
    assert lengths is not None
    return Compaction.of(keep, [n - d for n, d in zip(lengths, dropped, strict=True)], dropped, frame.pad_right)


class EntryStage:
    """Hooks of the entry stage on one model. Holds no state of any generation, only the last result to look at."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, positions: str) -> None:
        self.adapter, self.parts, self.method, self.positions = adapter, parts, method, positions
        self.last: tuple[Plan, Compaction | None, int] | None = None
        self.hides_gaps = parts.flash
        """Whether :meth:`before_layer` is installed: flash attention needs it, decode steps of others do not pay it."""
        self._base_signature = inspect.signature(parts.base.forward)
        self._decoder_signature = inspect.signature(parts.decoder.forward)

    # -- the base model -------------------------------------------------------------------------------------------

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a frame; translate the padding mask of a cache that was pruned."""
        if torch.compiler.is_compiling() or is_bypassed():
            return None
        call = _named(self._base_signature, args, kwargs)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        new = (embeds if ids is None else ids).shape[1]
        cache = call.get("past_key_values")
        mask = call.get("attention_mask")
        if (slots := slot_map(cache)) is not None and (mask is None or isinstance(mask, Tensor)):
            length = physical_length(cache) + new
            if mask is None or (mask.dim() == 2 and mask.shape[1] == length + slots.removed):
                call["attention_mask"] = mask = slots.physical_mask(mask, length)
        prepared = PREPARED_MASK.get()
        PREPARED_MASK.set(None)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = prepared  # a static cache: the 2-D mask was seen where the 4-D one was made
        frame = Frame(mask=mask)
        if new > 1:
            self._see_placeholders(frame, call, ids, embeds)
        FRAME.set(frame)
        return (), call

    def _see_placeholders(self, frame: Frame, call: Mapping[str, Any], ids: Tensor | None, embeds: Any) -> None:
        for modality, token in self.parts.placeholders.items():
            where = ids == token if ids is not None else _embedded(self.parts.base, embeds, token)
            if (host := where.cpu()).any():
                frame.placeholders[modality] = host
        for modality, output in (call.get("mm_encoder_outputs") or {}).items():
            if (encoded := attached(self.adapter, self.parts.base, modality, output)) is not None:
                frame.encoded[modality] = encoded
        frame.see_padding(next(x for x in (ids, embeds) if x is not None).shape[1])

    # -- the decoder ----------------------------------------------------------------------------------------------

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prune a prompt; in a decode step only shift positions, and only if they are compact."""
        if torch.compiler.is_compiling() or is_bypassed() or (frame := FRAME.get()) is None:
            return None
        call = _named(self._decoder_signature, args, kwargs)
        cache = call.get("past_key_values")
        self._shift(call, slot_map(cache), cache)
        if not frame.placeholders or call.get("inputs_embeds") is None:
            return (), call
        embeds: Tensor = call["inputs_embeds"]
        decision = plan(self.method, frame, embeds)
        if decision is None:
            return (), call
        self.last = (decision, None, embeds.shape[0])
        if decision.drops:
            frame.compaction = compaction(decision, frame, embeds.shape[:2])
            self.last = (decision, frame.compaction, embeds.shape[0])
            self._compact(call, frame, frame.compaction)
        return (), call

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Flash attention takes gaps in one prompt's positions for packed sequences; layers need no positions.

        They rotate with ``position_embeddings``, which were made from the positions before.
        """
        if torch.compiler.is_compiling() or kwargs.get("position_ids") is None or (frame := FRAME.get()) is None:
            return None
        if frame.compaction is None and slot_map(kwargs.get("past_key_values")) is None:
            return None
        return args, kwargs | {"position_ids": None}

    def _shift(self, call: dict[str, Any], slots: SlotMap | None, cache: Any) -> None:
        """Compact positions: the caller counts dropped tokens of earlier prompts, the rotary embedding must not."""
        if slots is None or self.positions != "compact":
            return
        ids = call.get("position_ids")
        if ids is None:
            new = call["inputs_embeds"].shape[1]
            ids = torch.arange(new, device=slots.dropped.device)[None] + cache.get_seq_length()
        if getattr(ids, "_vtc_shifted", False):  # done in prepare_inputs_for_generation
            return
        call["position_ids"] = ids - slots.dropped.to(ids.device)[:, None]

    def _compact(self, call: dict[str, Any], frame: Frame, compact: Compaction) -> None:
        if self.parts.flash and not self.hides_gaps:
            raise RuntimeError(
                "the attention implementation was switched to flash attention after vtc.patch, whose hooks do not fit "
                "it; vtc.unpatch(model) and patch again"
            )
        embeds: Tensor = call["inputs_embeds"]
        batch, width = embeds.shape[:2]
        cache = self._cache(call)
        past = physical_length(cache)
        ids = call.get("position_ids")
        if ids is None:
            ids = torch.arange(width, device=embeds.device)[None] + (0 if cache is None else cache.get_seq_length())
        call["attention_mask"] = self._masks(call.get("attention_mask"), frame, compact, cache, past)
        self._deepstack(call, frame, compact)
        for name, value in call.items():
            if name in ("attention_mask", "position_ids", "past_key_values"):
                continue
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (batch, width):
                call[name] = compact.sequence(value)
        call["position_ids"] = compact.positions(ids)
        if self.positions == "compact":
            start = compact.first_position(ids, frame.mask)
            call["position_ids"] = compact.renumber(call["position_ids"], start)
        if cache is not None:
            slots = adopt(cache, batch, embeds.device)
            dropped = torch.tensor(compact.dropped, device=embeds.device)
            slots.extend(past, compact.index, compact.valid, width, dropped, compact.holes)

    def _cache(self, call: dict[str, Any]) -> Any:
        """The call's cache; one is made here if the decoder would make one, so that the state has a home."""
        cache = call.get("past_key_values")
        use = call.get("use_cache")
        if cache is None and (self.parts.decoder.config.use_cache if use is None else use):
            from transformers import DynamicCache

            cache = call["past_key_values"] = DynamicCache(config=self.parts.decoder.config)
        return cache

    def _masks(self, mask: Any, frame: Frame, compact: Compaction, cache: Any, past: int) -> Any:
        """What the decoder gets for a mask: a 2-D one it builds its own from, or the given ones without columns."""
        padding = self._padding(frame, compact, cache, past)
        if not self.parts.builds_masks_early or mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return padding
        if not isinstance(mask, dict):
            return self._prepared(mask, padding, compact, cache, past, layer=0)
        types = self.parts.decoder.config.layer_types
        return {
            kind: self._prepared(one, padding, compact, cache, past, types.index(kind)) for kind, one in mask.items()
        }

    def _padding(self, frame: Frame, compact: Compaction, cache: Any, past: int) -> Tensor | None:
        """Bool [B, past + M], ``None`` where nothing is padding and a cache says so.

        Without a cache an explicit mask also keeps gaps in the positions from being taken for packed sequences.
        """
        head = None if frame.mask is None else frame.mask[:, : frame.mask.shape[1] - compact.width]
        if cache is not None and not compact.holes and (head is None or not head.shape[1]):
            return None
        if head is None:
            head = compact.valid.new_ones(compact.valid.shape[0], past)
        return torch.cat([head.bool(), compact.valid.to(head.device)], dim=1)

    def _prepared(
        self, mask: Tensor | None, padding: Tensor | None, compact: Compaction, cache: Any, past: int, layer: int
    ) -> Tensor | None:
        """One mask that the base model prepared for the layers like ``layer``."""
        if mask is None and not compact.holes:
            return None
        if self.parts.flash or (mask is not None and mask.dim() == 2):
            return padding
        length, offset = (compact.length, 0) if cache is None else cache.get_mask_sizes(compact.length, layer)
        if mask is None:  # plainly causal so far; the holes need a mask
            seen = past - offset
            mask = compact.keep.new_ones(1, 1, compact.width, seen + compact.width).tril(seen)
        return compact.attention(mask, past - offset, length)

    def _deepstack(self, call: dict[str, Any], frame: Frame, compact: Compaction) -> None:
        """Features added to early layers come as rows in (batch, sequence) order of all visual tokens."""
        for name in _DEEPSTACK:
            if call.get(name) is None:
                continue
            where = torch.stack(list(frame.placeholders.values())).any(0).flatten().nonzero()[:, 0]
            kept = compact.keep.flatten()[where.to(compact.keep.device, non_blocking=True)]
            order = (~kept).to(torch.int8).argsort(stable=True)[: len(where) - sum(compact.dropped)]
            call[name] = type(call[name])(rows_of[order.to(rows_of.device)] for rows_of in call[name])


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by keyword: some families pass ids by position."""
    if not args:
        return dict(kwargs)
    return dict(zip(signature.parameters, args, strict=False)) | kwargs


def _embedded(base: nn.Module, embeds: Tensor, token: int) -> Tensor:
    """Placeholders in a prompt that came as embeddings: the rows that equal the placeholder's own."""
    table = base.get_input_embeddings()
    return (embeds == table(torch.tensor(token, device=embeds.device))).all(-1)
