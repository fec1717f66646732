"""The layer stage: visual tokens leave between decoder layers, during prefill only.

Every decoder layer gets the same masks and rotary embeddings from the loop around it. Past the first stage those no
longer fit the shorter sequence, so a pre-hook on each layer below hands it shortened ones. The cache needs nothing:
each layer stores what it sees, and a slot map per stage remembers which tokens that was. In a decode step the hooks
have work only where rows kept different counts, or the cache has a fixed size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vtc.dialect import attention
from vtc.dialect.arguments import CACHE, HIDDEN, MASK, POSITIONS, ROTARY, Arguments, Role, Spelling
from vtc.dialect.caches import mask_sizes, physical_length, stored_keys
from vtc.dialect.masks import causal_mask, layer_type, window_of
from vtc.engine import taps
from vtc.engine.compaction import Columns
from vtc.engine.context import Frame, running_frame
from vtc.engine.inside import Inside, Passed
from vtc.engine.lengths import adopt, slot_map, stage_of
from vtc.engine.probe import recipes, row_layers
from vtc.methods import Method
from vtc.methods.base import surviving
from vtc.methods.returns import check_scores
from vtc.models import Parts


class LayerStages:
    """Hooks of a method's stages on one model's decoder layers. Holds no state of any generation."""

    def __init__(self, parts: Parts, method: Method) -> None:
        self.parts, self.method = parts, method
        self.stages = method.stages(len(parts.layers))
        """Where tokens leave, by rising layer."""
        self.row_layers = row_layers(self.stages)
        """Attention signals wanted, by the layer whose queries and keys make them."""
        self.recipes = recipes(parts, self.row_layers)
        """How these layers make them."""
        self.reads_positions = parts.reads_positions
        self.transition_layers = frozenset(layer for stage in self.stages for layer in stage.transitions)

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
        """What to hook: a module, the hook, and whether it runs before the module."""
        if not self.stages:
            return
        first = min([self.stages[0].after, *self.row_layers])
        for index, layer in enumerate(self.parts.layers):
            if index >= first:
                yield layer, functools.partial(self.before_layer, index), True
            if index in self.transition_layers:
                for module in (attention.self_attention(layer), attention.mlp(layer)):
                    assert module is not None  # or it was refused
                    yield module, self.after_module, False

    # -- before the first layer -----------------------------------------------------------------------------------

    def begin(self, frame: Frame, inside: Inside, cache: Any) -> None:
        """A prompt with images enters the decoder; its cache gets a slot map for each stage."""
        frame.inside = inside
        batch, device = inside.index.shape[0], inside.index.device
        if cache is not None:
            for stage in self.stages:
                adopt(cache, batch, device, self.parts, stage.after)

    # -- hooks ----------------------------------------------------------------------------------------------------

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prefill: drop if a stage is here, and hand over what fits the shorter sequence. Decode: maybe a mask."""
        if (frame := running_frame(self.parts)) is None:
            return None
        if frame.inside is None:
            return self._later(index, frame, args, kwargs)
        if attention.CHECKPOINTS_HOOKS and attention.is_checkpointed(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__} runs hooks again when it recomputes a checkpointed layer: "
                "tokens would leave twice. Train without gradient checkpointing, update transformers, or use a method "
                "that drops tokens before the language model"
            )
        inside = frame.inside
        call = _Call.of(self.parts.spellings.layers[index], args, kwargs)
        stage = self.stages[inside.stages_done] if inside.stages_done < len(self.stages) else None
        shortened = self._fitted(index, frame, call) if inside.stages_done else call
        if index in self.row_layers:
            inside.rows[index] = self._rows(index, layer, frame, shortened)
        if stage is not None and stage.after == index:
            call.hidden = self._drop(index, frame, shortened)
            shortened = self._fitted(index, frame, call)
        elif shortened is call:
            return None
        return shortened.args, shortened.keywords

    def after_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Score what an attention or MLP module did to each token."""
        if (frame := running_frame(self.parts)) is None or frame.inside is None:
            return
        inside = frame.inside
        before = attention.hidden_states(args, kwargs)
        after = output[0] if isinstance(output, tuple) else output
        scores = self.method.transition(before.detach(), after.detach(), inside.valid, inside.visual)
        scores = inside.per_token(check_scores(self.method, scores, inside.valid).float())
        inside.transition = scores if inside.transition is None else inside.transition + scores

    def deepstack(self, process: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap what adds features to early layers: those lose the tokens that left by then."""

        @functools.wraps(process)
        def call(hidden: Tensor, where: Tensor, visual_embeds: Tensor, **kwargs: Any) -> Tensor:
            frame = running_frame(self.parts)
            inside = None if frame is None else frame.inside
            if inside is not None and inside.stages_done:
                present = torch.zeros_like(where, dtype=torch.int8)
                present = present.scatter_reduce(1, inside.relative, inside.valid.to(torch.int8), "amax").bool()
                visual_embeds = visual_embeds[present[where]]
                where = where.gather(1, inside.relative) & inside.valid
            return process(hidden, where, visual_embeds, **kwargs)

        return call

    # -- a stage --------------------------------------------------------------------------------------------------

    def _drop(self, index: int, frame: Frame, call: _Call) -> Tensor:
        """Let the method's next stage choose; the hidden states of what stays."""
        inside = frame.inside
        assert inside is not None
        stage = self.stages[inside.stages_done]
        signals: dict[str, Tensor] = {}
        for name in stage.signals:
            if name == "transition":
                assert inside.transition is not None
                signals[name] = inside.transition.masked_fill(~inside.alive, 0.0)
            else:
                source = index if stage.attention is None else stage.attention
                signals[name] = inside.rows[source][name]
        keep, counts = surviving(self.method, inside.stages_done, inside.tokens(call.hidden, signals))
        cache = call[CACHE]
        inside.past, inside.head = self._stored(index, frame, cache)
        holes, hidden = inside.drop(keep, counts, call.hidden)
        frame.stored[index] = inside.past + inside.index.shape[1]
        inside.stages_done += 1
        inside.history.append(Passed(inside.index, inside.valid, index, inside.alive))
        if (slots := slot_map(cache, index)) is not None:
            dropped = torch.tensor([n - c for n, c in zip(inside.lengths, inside.counts, strict=True)])
            slots.extend(inside.past, inside.index, inside.valid, inside.width, dropped.to(slots.dropped.device), holes)
        return hidden

    def _stored(self, index: int, frame: Frame, cache: Any) -> tuple[int, Tensor | None]:
        """How many keys a layer stored before this call, and which of them are no padding (``None``: all)."""
        inside = frame.inside
        assert inside is not None
        ahead = self.stages[inside.stages_done :]
        if not ahead or ahead[0].after != index:  # as the layers before it
            return inside.past, inside.head
        past, slots = physical_length(cache, index), slot_map(cache, index)
        return past, None if slots is None else slots.physical_mask(_before(frame, slots, past), past)

    def _fitted(self, index: int, frame: Frame, call: _Call) -> _Call:
        """The call with rotary embeddings, mask and aligned tensors of the shorter sequence."""
        inside = frame.inside
        assert inside is not None
        present, batch = Columns(inside.relative, inside.valid), len(inside.relative)

        def fit(value: Any) -> Any:
            aligned = isinstance(value, Tensor) and value.dim() > 2 and value.shape[:2] == (batch, inside.entered)
            return present.sequence(value) if aligned else value

        fitted = _Call(call.hidden, tuple(map(fit, call.others)), call.named.copy())
        for name, value in call.named.named.items():
            fitted.named.named[name] = fit(value)
        if (rotary := call[ROTARY]) is not None:
            if id(rotary) not in inside.rotary:  # families with two kinds of layers have two
                parts = (part.expand(batch, *part.shape[1:]) for part in rotary)
                inside.rotary[id(rotary)] = present.sequences(*parts)
            fitted[ROTARY] = inside.rotary[id(rotary)]
        ids = call[POSITIONS]
        fitted[POSITIONS] = present.positions(ids) if ids is not None and self.reads_positions else None
        fitted[MASK] = self._mask(index, frame, call)
        return fitted

    def _mask(self, index: int, frame: Frame, call: _Call) -> Any:
        inside = frame.inside
        assert inside is not None
        given, cache = call[MASK], call[CACHE]
        kind = layer_type(self.parts.decoder.config, index)
        if kind not in inside.masks:
            if frame.prepared and isinstance(given, Tensor) and given.dim() == 4:
                inside.masks[kind] = self._prepared(index, given, inside, cache)
            else:
                padding = inside.padding(inside.past, inside.head)
                inside.masks[kind] = causal_mask(self.parts.decoder.config, index, call.hidden, padding, cache)
        return inside.masks[kind]

    def _prepared(self, index: int, given: Tensor, inside: Inside, cache: Any) -> Tensor:
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

    def _rows(self, index: int, layer: nn.Module, frame: Frame, call: _Call) -> dict[str, Tensor]:
        inside = frame.inside
        assert inside is not None
        wanted = self.row_layers[index]
        cache, given = call[CACHE], call[MASK]
        past, head = self._stored(index, frame, cache)
        prepared = None
        if frame.prepared and isinstance(given, Tensor) and given.dim() == 4:
            start = self._start(index, inside, cache, past)
            prepared = given[..., start : start + inside.index.shape[1]]
        rows_at = functools.partial(
            taps.Rows.of,
            layer,
            self.recipes[index],
            call.hidden.detach(),
            call[ROTARY],
            self._positions(call),
            keys=stored_keys(cache, index, past),
            valid=inside.padding(past, head),
            prepared=prepared,
            window=window_of(self.parts.decoder.config, index),
        )
        visual = inside.visual
        text, longest = inside.text_behind()
        signals: dict[str, Tensor] = {}
        if wanted - {"visual_to_text"}:
            rows = rows_at(text, longest)
            if "last" in wanted:
                signals["last"] = inside.per_token(rows.last())
            if wanted & {"instruction", "text_to_visual"}:
                mean = rows.mean()
                signals["instruction"] = inside.per_token(mean)
                signals["text_to_visual"] = inside.per_image((mean * visual).sum(1).where(text.any(1), torch.nan))
        if "visual_to_text" in wanted:
            if prepared is None:  # causal, and the text is behind: nothing to see
                signals["visual_to_text"] = inside.per_image(torch.zeros(len(text), device=text.device))
            else:
                mean = rows_at(visual, max(inside.seen_by_row())).mean()
                signals["visual_to_text"] = inside.per_image((mean * text).sum(1))
        return {name: signals[name] for name in wanted}

    def _positions(self, call: _Call) -> Tensor | None:
        """Position ids [B, M] of a call, where layers compute with them."""
        ids = call[POSITIONS] if self.reads_positions else None
        return None if ids is None else ids.expand(len(call.hidden), -1)

    def _start(self, index: int, inside: Inside, cache: Any, past: int) -> int:
        """Where this call's own keys begin in the mask that a layer gets now."""
        if not inside.stages_done:
            return inside.starts.get(layer_type(self.parts.decoder.config, index), 0)
        return 0 if cache is None else past - mask_sizes(cache, inside.index.shape[1], index)[1]

    # -- after the prefill ----------------------------------------------------------------------------------------

    def _later(self, index: int, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step or a later turn without images: layers past a stage store other slots than the first."""
        cache = CACHE.read(kwargs)
        if (slots := slot_map(cache, index)) is None or slots is slot_map(cache):
            return None
        hidden = attention.hidden_states(args, kwargs)
        length = physical_length(cache, index) + hidden.shape[1]
        padding = slots.physical_mask(frame.logical, length)
        call = self.parts.spellings.layers[index].bind((), kwargs)
        if padding is None and call[MASK] is None:
            return None
        key = (stage_of(cache, index), layer_type(self.parts.decoder.config, index))
        if key not in frame.later_masks:
            frame.later_masks[key] = causal_mask(self.parts.decoder.config, index, hidden, padding, cache)
        call[MASK] = frame.later_masks[key]
        return args, call.named


@dataclass
class _Call:
    """A decoder layer's arguments; hidden states stay positional, since capture hooks read them there."""

    hidden: Tensor
    others: tuple[Any, ...]
    named: Arguments

    @classmethod
    def of(cls, spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
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


def _before(frame: Frame, slots: Any, past: int) -> Tensor | None:
    """The 2-D padding mask over the logical columns that were stored before this call."""
    return None if frame.logical is None else frame.logical[:, : past + slots.removed]
