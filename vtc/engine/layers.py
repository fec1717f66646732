"""The layer stage: visual tokens leave between decoder layers, during prefill only.

Every decoder layer gets the same masks and rotary embeddings from the loop around it. Past the first stage those no
longer fit the shorter sequence, so a pre-hook on each layer below hands it shortened ones. The cache needs nothing:
each layer stores what it sees, and a slot map per stage remembers which tokens that was. In a decode step the hooks
have work only where rows kept different counts, or the cache has a fixed size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vtc.dialect import attention
from vtc.dialect.arguments import CACHE, HIDDEN, MASK, POSITIONS, ROTARY, Arguments, Role, Spelling
from vtc.dialect.caches import mask_sizes, physical_length, stored_keys
from vtc.dialect.masks import causal_mask, layer_type, window_of
from vtc.engine.compaction import Columns, StageResult
from vtc.engine.context import Call, running_call
from vtc.engine.inside import LayerState
from vtc.engine.lengths import SlotMap, adopt, slot_map, stage_of
from vtc.engine.plan import check_no_gradient
from vtc.engine.probe import recipes
from vtc.engine.rows import AttentionRows
from vtc.engine.view import View
from vtc.methods.returns import check_scores
from vtc.methods.stages import Step
from vtc.models import Parts
from vtc.places import Layer
from vtc.signals import DecoderSignal


class LayerStages:
    """Hooks of a method's stages on one model's decoder layers. Holds no state of any generation."""

    def __init__(self, parts: Parts, steps: Sequence[Step]) -> None:
        self.parts = parts
        self.steps = tuple(steps)
        """Where tokens leave, by rising layer."""
        needs = dict.fromkeys(s for step in steps for s in step.stage.needs if isinstance(s, DecoderSignal))
        self.read_at: dict[int, list[DecoderSignal]] = {}
        """Signals made of what enters a layer, by layer."""
        self.watched: dict[int, list[DecoderSignal]] = {}
        """Signals summed up over modules, by layer."""
        for signal in needs:
            layers = [*signal.watched()]
            for layer in layers:
                self.watched.setdefault(layer, []).append(signal)
            if not layers:
                self.read_at.setdefault(signal.layer, []).append(signal)
        self.recipes = recipes(parts, {s.layer for s in needs if s.needs_rows})
        """How the layers whose attention is asked for make queries and keys."""
        self.reads_positions = parts.reads_positions

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
        """What to hook: a module, the hook, and whether it runs before the module."""
        if not self.steps:
            return
        first = min([_after(self.steps[0]), *self.read_at])
        for index, layer in enumerate(self.parts.layers):
            if index >= first:
                yield layer, functools.partial(self.before_layer, index), True
            if index in self.watched:
                for module in (attention.self_attention(layer), attention.mlp(layer)):
                    assert module is not None  # or it was refused
                    yield module, functools.partial(self.after_module, index), False

    # -- before the first layer -----------------------------------------------------------------------------------

    def begin(self, running: Call, inside: LayerState, cache: Any) -> None:
        """A prompt with images enters the decoder; its cache gets a slot map for each stage."""
        running.inside = inside
        batch, device = inside.index.shape[0], inside.index.device
        if cache is not None:
            for step in self.steps:
                adopt(cache, batch, device, self.parts, _after(step))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prefill: drop if a stage is here, and hand over what fits the shorter sequence. Decode: maybe a mask."""
        if (running := running_call(self.parts)) is None:
            return None
        if running.inside is None:
            return self._later(index, running, args, kwargs)
        if attention.CHECKPOINTS_HOOKS and attention.is_checkpointed(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__} runs hooks again when it recomputes a checkpointed layer: "
                "tokens would leave twice. Train without gradient checkpointing, update transformers, or use a method "
                "that drops tokens before the language model"
            )
        inside = running.inside
        call = _LayerCall.of(self.parts.spellings.layers[index], args, kwargs)
        step = self.steps[inside.stages_done] if inside.stages_done < len(self.steps) else None
        shortened = self._fitted(index, running, call) if inside.stages_done else call
        asked = self.read_at.get(index, [])
        if step is None or _after(step) != index:
            self._read(asked, index, layer, running, shortened)
            return None if shortened is call else (shortened.args, shortened.keywords)
        self._read([s for s in asked if s in step.stage.needs], index, layer, running, shortened)
        call.hidden = self._drop(index, running, shortened)
        shortened = self._fitted(index, running, call)
        ahead = [signal for later in self.steps[inside.stages_done :] for signal in later.stage.needs]
        self._read([s for s in asked if s in ahead], index, layer, running, shortened)  # of what is left
        return shortened.args, shortened.keywords

    def after_module(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Score what an attention or MLP module of a watched layer did to each token."""
        if (running := running_call(self.parts)) is None or running.inside is None:
            return
        inside = running.inside
        before = attention.hidden_states(args, kwargs).detach()
        after = (output[0] if isinstance(output, tuple) else output).detach()
        scored: dict[DecoderSignal, Tensor] = {}
        for signal in self.watched[index]:
            if (scorer := signal.scorer) not in scored:
                scores = signal.score(before, after, inside.valid, inside.visual)
                scored[scorer] = inside.per_token(check_scores(signal, scores, inside.valid).float())
            total = inside.signals.get(signal)
            inside.signals[signal] = scored[scorer] if total is None else total + scored[scorer]

    def deepstack(self, process: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap what adds features to early layers: those lose the tokens that left by then."""

        @functools.wraps(process)
        def call(hidden: Tensor, where: Tensor, visual_embeds: Tensor, **kwargs: Any) -> Tensor:
            running = running_call(self.parts)
            inside = None if running is None else running.inside
            if inside is not None and inside.stages_done:
                present = torch.zeros_like(where, dtype=torch.int8)
                present = present.scatter_reduce(1, inside.relative, inside.valid.to(torch.int8), "amax").bool()
                visual_embeds = visual_embeds[present[where]]
                where = where.gather(1, inside.relative) & inside.valid
            return process(hidden, where, visual_embeds, **kwargs)

        return call

    # -- a stage --------------------------------------------------------------------------------------------------

    def _drop(self, index: int, running: Call, call: _LayerCall) -> Tensor:
        """Let the method's next stage choose; the hidden states of what stays."""
        inside = running.inside
        assert inside is not None
        step = self.steps[inside.stages_done]
        kept = step.reduce(inside.tokens(step, call.hidden))
        merged = inside.merge(kept, call.hidden)
        if merged is not call.hidden:
            check_no_gradient(step.method.name, call.hidden)
        cache = call[CACHE]
        inside.past, inside.head = self.stored(index, running, cache)
        holes, hidden = inside.drop(kept.mask, kept.counts, merged)
        running.stored[index] = inside.past + inside.index.shape[1]
        inside.stages_done += 1
        inside.history.append(StageResult(inside.index, inside.valid, index, inside.alive))
        if (slots := slot_map(cache, index)) is not None:
            dropped = torch.tensor([n - c for n, c in zip(inside.lengths, inside.counts, strict=True)])
            slots.extend(inside.past, inside.index, inside.valid, inside.width, dropped.to(slots.dropped.device), holes)
        return hidden

    def stored(self, index: int, running: Call, cache: Any) -> tuple[int, Tensor | None]:
        """How many keys a layer stored before this call, and which of them are no padding (``None``: all)."""
        inside = running.inside
        assert inside is not None
        ahead = self.steps[inside.stages_done :]
        if not ahead or _after(ahead[0]) != index:  # as the layers before it
            return inside.past, inside.head
        past, slots = physical_length(cache, index), slot_map(cache, index)
        return past, None if slots is None else slots.physical_mask(_before(running, slots, past), past)

    def _fitted(self, index: int, running: Call, call: _LayerCall) -> _LayerCall:
        """The call with rotary embeddings, mask and aligned tensors of the shorter sequence."""
        inside = running.inside
        assert inside is not None
        present, batch = Columns(inside.relative, inside.valid), len(inside.relative)

        def fit(value: Any) -> Any:
            aligned = isinstance(value, Tensor) and value.dim() > 2 and value.shape[:2] == (batch, inside.entered)
            return present.sequence(value) if aligned else value

        fitted = _LayerCall(call.hidden, tuple(map(fit, call.others)), call.named.copy())
        for name, value in call.named.named.items():
            fitted.named.named[name] = fit(value)
        if (rotary := call[ROTARY]) is not None:
            if id(rotary) not in inside.rotary:  # families with two kinds of layers have two
                parts = (part.expand(batch, *part.shape[1:]) for part in rotary)
                inside.rotary[id(rotary)] = present.sequences(*parts)
            fitted[ROTARY] = inside.rotary[id(rotary)]
        ids = call[POSITIONS]
        fitted[POSITIONS] = present.positions(ids) if ids is not None and self.reads_positions else None
        fitted[MASK] = self._mask(index, running, call)
        return fitted

    def _mask(self, index: int, running: Call, call: _LayerCall) -> Any:
        inside = running.inside
        assert inside is not None
        given, cache = call[MASK], call[CACHE]
        kind = layer_type(self.parts.decoder.config, index)
        if kind not in inside.masks:
            if running.prepared and isinstance(given, Tensor) and given.dim() == 4:
                inside.masks[kind] = self._prepared(index, given, inside, cache)
            else:
                padding = inside.padding(inside.past, inside.head)
                inside.masks[kind] = causal_mask(self.parts.decoder.config, index, call.hidden, padding, cache)
        return inside.masks[kind]

    def _prepared(self, index: int, given: Tensor, inside: LayerState, cache: Any) -> Tensor:
        """Prefix-LM: image tokens attend both ways, which only the mask of the first layers tells."""
        kept = inside.relative.shape[1]
        present = Columns(inside.relative, inside.valid)
        length, offset = mask_sizes(cache, kept, index)
        start = inside.starts.get(layer_type(self.parts.decoder.config, index), 0)
        past = physical_length(cache, index) - offset
        new = present.attention(given[..., start : start + inside.entered], 0, length - past)
        if not past:
            return new
        head = inside.valid.new_ones(len(inside.valid), past) if inside.head is None else inside.head[:, -past:].bool()
        blocked = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        prefix = new.new_full((*new.shape[:3], past), True if given.dtype == torch.bool else 0.0)
        return torch.cat([prefix.masked_fill(~head[:, None, None].to(new.device), blocked), new], dim=3)

    # -- signals --------------------------------------------------------------------------------------------------

    def _read(
        self, signals: Sequence[DecoderSignal], index: int, layer: nn.Module, running: Call, call: _LayerCall
    ) -> None:
        """Make signals of what a layer is about to be given."""
        if not signals:
            return
        inside, cache, given = running.inside, call[CACHE], call[MASK]
        assert inside is not None
        past, head = self.stored(index, running, cache)
        prepared = None
        if running.prepared and isinstance(given, Tensor) and given.dim() == 4:
            start = self.start(index, inside, cache, past)
            prepared = given[..., start : start + inside.index.shape[1]]
        hidden = call.hidden.detach()

        def project(which: Tensor, longest: int) -> AttentionRows:
            return AttentionRows.of(
                layer,
                self.recipes[index],
                hidden,
                call[ROTARY],
                self.positions(call),
                which,
                longest,
                keys=stored_keys(cache, index, past),
                valid=inside.padding(past, head),
                prepared=prepared,
                window=window_of(self.parts.decoder.config, index),
            )

        view = View(inside, hidden, prepared is not None, project)
        inside.signals |= {signal: signal.read(view) for signal in signals}

    def positions(self, call: _LayerCall) -> Tensor | None:
        """Position ids [B, M] of a call, where layers compute with them."""
        ids = call[POSITIONS] if self.reads_positions else None
        return None if ids is None else ids.expand(len(call.hidden), -1)

    def start(self, index: int, inside: LayerState, cache: Any, past: int) -> int:
        """Where this call's own keys begin in the mask that a layer gets now."""
        if not inside.stages_done:
            return inside.starts.get(layer_type(self.parts.decoder.config, index), 0)
        return 0 if cache is None else past - mask_sizes(cache, inside.index.shape[1], index)[1]

    # -- after the prefill ----------------------------------------------------------------------------------------

    def _later(self, index: int, running: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step or a later turn without images: layers past a stage store other slots than the first."""
        cache = CACHE.read(kwargs)
        if (slots := slot_map(cache, index)) is None or slots is slot_map(cache):
            return None
        given = MASK.read(kwargs)
        key = (stage_of(cache, index), layer_type(self.parts.decoder.config, index))
        if key not in running.later_masks:
            hidden = attention.hidden_states(args, kwargs)
            running.later_masks[key] = self._later_mask(index, running, slots, cache, hidden, given is not None)
        if (mask := running.later_masks[key]) is None and given is None:
            return None
        call = self.parts.spellings.layers[index].bind((), kwargs)
        call[MASK] = mask
        return args, call.named

    def _later_mask(
        self, index: int, running: Call, slots: SlotMap, cache: Any, hidden: Tensor, masked: bool
    ) -> Tensor | None:
        """For new columns [B, M, d], for which the first layer has a mask or not: none for one that sees every key."""
        config = self.parts.decoder.config
        length = physical_length(cache, index) + hidden.shape[1]
        padding = slots.physical_mask(running.logical, length)
        if padding is None and not masked:
            return None
        # on another device, looking would cost more than the mask
        whole = padding is None or (padding.device.type == "cpu" and bool(padding.all()))
        every_key = window_of(config, index) is None and mask_sizes(cache, hidden.shape[1], index) == (length, 0)
        if whole and every_key and hidden.shape[1] == 1:
            return None
        return causal_mask(config, index, hidden, padding, cache)


@dataclass
class _LayerCall:
    """A decoder layer's arguments; hidden states stay positional, since capture hooks read them there."""

    hidden: Tensor
    others: tuple[Any, ...]
    named: Arguments

    @classmethod
    def of(cls, spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _LayerCall:
        named = spelling.bind((), kwargs)
        if args:
            return cls(args[0], args[1:], named)
        return cls(named.pop(HIDDEN), (), named)

    def __getitem__(self, role: Role) -> Any:
        return self.named[role]

    def __setitem__(self, role: Role, value: Any) -> None:
        self.named[role] = value

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.hidden, *self.others)

    @property
    def keywords(self) -> dict[str, Any]:
        return self.named.named


def _before(running: Call, slots: Any, past: int) -> Tensor | None:
    """The 2-D padding mask over the logical columns that were stored before this call."""
    return None if running.logical is None else running.logical[:, : past + slots.removed]


def _after(step: Step) -> int:
    """How many layers run before a step between layers."""
    assert isinstance(step.stage.at, Layer)
    return step.stage.at.after
