"""The entry stage: visual tokens leave between the projector and the language model.

Two pre-hooks do it. The one on the base model reads the ids (the only host sync: where the placeholders are must be
known before anything can be planned; it happens before the decoder starts) and translates a decode step's padding mask
to physical slots. The one on the decoder sees the merged embeddings, asks the method which tokens stay and compacts
embeddings, positions, masks and whatever else is aligned with the sequence. Nothing there waits for the device.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine import masks
from vtc.engine.compaction import Compaction
from vtc.engine.context import FRAME, PREPARED_MASKS, Frame, is_bypassed
from vtc.engine.encode import attached
from vtc.engine.inside import Inside
from vtc.engine.layers import LayerStages
from vtc.engine.lengths import SlotMap, adopt, physical_length, slot_map
from vtc.engine.plan import Plan, Prefill, compaction, plan
from vtc.methods import Method
from vtc.models import Adapter, Parts
from vtc.tokens import column

_DEEPSTACK = ("deepstack_visual_embeds", "deepstack_features")


class EntryStage:
    """Hooks of the entry stage on one model. Holds no state of any generation, only the last result to look at."""

    def __init__(self, adapter: Adapter, parts: Parts, method: Method, positions: str) -> None:
        self.adapter, self.parts, self.method, self.positions = adapter, parts, method, positions
        self.last: Prefill | None = None
        self.layers = LayerStages(parts, method)
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
        mask = logical = call.get("attention_mask")
        if (slots := slot_map(cache)) is not None and (mask is None or isinstance(mask, Tensor)):
            length = physical_length(cache) + new
            if mask is None or (mask.dim() == 2 and mask.shape[1] == length + slots.removed):
                call["attention_mask"] = mask = slots.physical_mask(mask, length)
        prepared = PREPARED_MASKS.get()
        PREPARED_MASKS.set((None, None))
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            logical, mask = prepared  # a static cache: the 2-D mask was seen where the 4-D one was made
        frame = Frame(mask=mask, logical=logical)
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

    @staticmethod
    def after_root(root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the frame, also when the forward pass raised."""
        if not torch.compiler.is_compiling():
            FRAME.set(None)

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
            if physical_length(cache) == 0:
                warnings.warn(
                    "this prompt has image placeholders, but no image was encoded for it: nothing is pruned",
                    stacklevel=2,
                )
            return (), call
        lengths = tuple(frame.lengths or [embeds.shape[1]] * embeds.shape[0])
        if decision.drops or self.layers.stages:
            frame.compaction = compaction(decision, frame, embeds.shape[:2])
            self._compact(call, frame, decision, frame.compaction)
        history = [] if frame.inside is None else frame.inside.history
        self.last = Prefill(decision, frame.compaction, lengths, history)
        frame.placeholders = {}  # used up: whoever calls the decoder alone next has a prompt of their own
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

    def _compact(self, call: dict[str, Any], frame: Frame, decision: Plan, compact: Compaction) -> None:
        if self.parts.flash and not self.hides_gaps:
            raise RuntimeError(
                "the attention implementation was switched to flash attention after vtc.patch, whose hooks do not fit "
                "it; vtc.unpatch(model) and patch again"
            )
        embeds: Tensor = call["inputs_embeds"]
        batch, width = embeds.shape[:2]
        cache = self._cache(call)
        past = physical_length(cache)
        if self.layers.stages:
            starts = self._starts(cache, past, width)
            inside = Inside.begin(decision, compact, frame.pad_right, starts)
            inside.past, inside.head = past, masks.stored(frame.mask, width)
            self.layers.begin(frame, inside, cache)
        ids = call.get("position_ids")
        if ids is None:
            ids = torch.arange(width, device=embeds.device)[None] + (0 if cache is None else cache.get_seq_length())
        call["attention_mask"] = masks.shortened(
            self.parts, call.get("attention_mask"), frame.mask, compact, cache, past
        )
        self._deepstack(call, frame, compact)
        aligned = {
            name: value
            for name, value in call.items()
            if name not in ("attention_mask", "position_ids", "past_key_values")
            and isinstance(value, Tensor)
            and value.dim() > 1
            and value.shape[:2] == (batch, width)
        }
        call |= zip(aligned, compact.sequences(*aligned.values()), strict=True)
        call["position_ids"] = compact.positions(ids)
        if self.positions == "compact":
            start = compact.first_position(ids, frame.mask)
            call["position_ids"] = compact.renumber(call["position_ids"], start)
        if cache is not None:
            slots = adopt(cache, batch, embeds.device)
            dropped = column(compact.dropped, embeds.device)[:, 0]
            slots.extend(past, compact.index, compact.valid, width, dropped, compact.holes)

    def _starts(self, cache: Any, past: int, new: int) -> dict[str | None, int]:
        """Where a call's own keys begin in prepared masks, by layer type: windows forget what is far behind."""
        config = self.parts.decoder.config
        types = getattr(config, "layer_types", None) or [None]
        if cache is None:
            return dict.fromkeys(types, 0)
        return {kind: past - cache.get_mask_sizes(new, types.index(kind))[1] for kind in set(types)}

    def _cache(self, call: dict[str, Any]) -> Any:
        """The call's cache; one is made here if the decoder would make one, so that the state has a home."""
        cache = call.get("past_key_values")
        use = call.get("use_cache")
        if cache is None and (self.parts.decoder.config.use_cache if use is None else use):
            from transformers import DynamicCache

            cache = call["past_key_values"] = DynamicCache(config=self.parts.decoder.config)
        return cache

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
