"""The entry stage: visual tokens leave between the projector and the language model.

A pre-hook on the decoder sees the merged embeddings, asks the method which tokens stay and compacts embeddings,
positions, masks and whatever else is aligned with the sequence. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import attention, compilers, modules
from vtc.dialect.arguments import (
    CACHE,
    DEEPSTACK,
    EMBEDS,
    MASK,
    POSITIONS,
    USE_CACHE,
    Arguments,
)
from vtc.dialect.caches import cache_in, logical_length, mask_sizes, new_cache, physical_length
from vtc.dialect.masks import attention_kinds, causal_mask
from vtc.dialect.releases import running_release
from vtc.engine import masks
from vtc.engine.calibration import Calibrator
from vtc.engine.choosing import Chooser, compaction, plan
from vtc.engine.compaction import Compaction
from vtc.engine.context import Call, change, is_running, running_call
from vtc.engine.embedded import Prompts
from vtc.engine.encode import Memory
from vtc.engine.inside import LayerState
from vtc.engine.layers import LayerStages
from vtc.engine.lengths import SlotMap, adopt, slot_map
from vtc.engine.plan import Plan, Prefill
from vtc.engine.tower import TowerStages
from vtc.engine.verdict import Judge
from vtc.methods import Method
from vtc.models import Adapter, Parts
from vtc.tokens import column


class EntryStage:
    """Hooks of the entry stage on one model. Holds no state of any generation, only the last result to look at."""

    def __init__(
        self,
        adapter: Adapter,
        parts: Parts,
        method: Method,
        positions: str,
        calibration: str | None = None,
        judge: Judge | None = None,
    ) -> None:
        """Prepare.

        Args:
            adapter: of the family.
            parts: of the model.
            method: settled for it.
            positions: ``original`` or ``compact``.
            calibration: what is added to the logits of attention, if anything.
            judge: says of each prompt whether pruning pays; ``None``: all are pruned.
        """
        self.judge = judge
        self.adapter, self.parts, self.method, self.positions = adapter, parts, method, positions
        self.last: Prefill | None = None
        self._said: set[str] = set()
        self.chooser = Chooser(adapter, parts, method)
        self.tower = TowerStages(adapter, parts, self.chooser.tower, self.chooser.recorded)
        self.layers = LayerStages(parts, self.chooser.inside)
        self.calibrator = None if calibration is None else Calibrator(parts, self.chooser, calibration)
        self.prompts = Prompts()
        """Prompts that a family's own method embedded."""
        self.memory = Memory()
        """What the encoders gave lately: found again when a copy of their output comes back without its attribute."""
        self.hides_gaps = parts.flash
        """Whether :meth:`before_layer` is installed: flash attention needs it, decode steps of others do not pay it."""

    # -- the decoder ----------------------------------------------------------------------------------------------

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prune a prompt; in a decode step only shift positions, and only if they are compact."""
        if (running := running_call(self.parts)) is None:
            return None
        if not is_running(self.parts.base):  # an interrupt left another call behind, or the base model is passed by
            change(call=None)
            if self.parts.root is not self.parts.base and is_running(self.parts.root):
                self.say_once(
                    f"{type(self.parts.root).__name__}.forward calls its language model without "
                    f"{type(self.parts.base).__name__}.forward, where images are found: nothing is pruned"
                )
            return None
        call = self.parts.spellings.decoder.bind(args, kwargs)
        cache = call[CACHE]
        self._shift(call, running, slot_map(cache), cache)
        embeds = call[EMBEDS]
        if not running.placeholders or embeds is None:
            return (), call.named
        if self.judge is not None and (compilers.compiled_around() or compilers.compiled_inside(self.parts.layers)):
            raise NotImplementedError(
                "when='worthwhile' compares with what an uncompiled prefill takes here, and this model was compiled "
                "with torch.compile. What works: when='always', or the model uncompiled"
            )
        decision = plan(self.chooser, running, embeds, self.judge)
        if decision is None:
            if physical_length(cache) == 0:
                fault = "no image was encoded for it"
                if running.featureless is not None:
                    fault = f"in the {running.featureless} that its encoder returned are no features of single images"
                self.say_once(f"this prompt has image placeholders, but {fault}: nothing is pruned")
            return (), call.named
        lengths = tuple(running.lengths or [embeds.shape[1]] * embeds.shape[0])
        if not decision.left_alone and (decision.drops or self.layers.steps):
            running.compaction = compaction(decision, running, embeds.shape[:2])
            self._compact(call, running, decision, running.compaction)
        if self.calibrator is not None:
            running.entering = self.calibrator.entering(decision, embeds.shape, running.compaction)
        history = [] if running.inside is None else running.inside.history
        self.last = Prefill(decision, running.compaction, lengths, history)
        running.placeholders = {}  # used up: whoever calls the decoder alone next has a prompt of their own
        return (), call.named

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The tripwire: what was stored for a prompt that lost tokens must be what was planned.

        Raises:
            RuntimeError: it is not. Whatever is generated from such a cache is wrong, so nothing is.
        """
        if (running := running_call(self.parts)) is None or running.adopted is None:
            return
        cache, running.adopted = running.adopted, None
        if (returned := cache_in(output)) is not None and returned is not cache:
            fault = f"the language model returned another {type(returned).__name__} than the cache that was prepared"
        else:
            stored = {layer: physical_length(cache, layer) for layer in running.stored}
            if stored == running.stored:
                return
            fault = f"by layer, the cache should hold {running.stored} tokens now, and holds {stored}"
        raise RuntimeError(
            f"{self.method.name} dropped visual tokens, but {type(decoder).__name__} did not take it as it should: "
            f"{fault}. An answer would be wrong. Run `vtc doctor` and report what it prints; vtc.unpatch(model) gives "
            f"the model back as it was. {running_release()}"
        )

    def say_once(self, text: str) -> None:
        """Warn, the first time under this patch."""
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=3)

    def layer_hooks(self) -> list[Callable[..., Any]]:
        """A pre-hook for each decoder layer, where flash attention needs them."""
        if not self.hides_gaps:
            return []
        return [functools.partial(self.before_layer, index) for index in range(len(self.parts.layers))]

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Flash attention takes gaps in one prompt's positions for packed samples: it must not see them.

        Layers rotate with embeddings that were made from the positions before. One that computes with positions keeps
        them, and gets a mask, before which flash attention looks at no positions.
        """
        if POSITIONS.read(kwargs) is None:
            return None
        if (running := running_call(self.parts)) is None:
            return None
        cache = CACHE.read(kwargs)
        if running.compaction is None and slot_map(cache) is None:
            return None
        call = self.parts.spellings.layers[index].bind((), kwargs)
        if not self.layers.reads_positions:
            call[POSITIONS] = None
        elif call[MASK] is None and (hidden := attention.hidden_states(args, kwargs)).shape[1] > 1:
            call[MASK] = hidden.new_ones(len(hidden), mask_sizes(cache, hidden.shape[1], index)[0], dtype=torch.bool)
        return args, call.named

    def _shift(self, call: Arguments, running: Call, slots: SlotMap | None, cache: Any) -> None:
        """Compact positions: the caller counts dropped tokens of earlier prompts, the rotary embedding must not."""
        if slots is None or self.positions != "compact":
            return
        ids = call[POSITIONS]
        if ids is None:
            new = call[EMBEDS].shape[1]
            ids = torch.arange(new, device=slots.dropped.device)[None] + logical_length(cache)
        if ids is running.shifted:
            return
        call[POSITIONS] = ids - slots.dropped.to(ids.device)[:, None]

    def _compact(self, call: Arguments, running: Call, decision: Plan, compact: Compaction) -> None:
        if self.parts.flash and not self.hides_gaps:
            raise RuntimeError(
                "the attention implementation was switched to flash attention after vtc.patch, whose hooks do not fit "
                "it; vtc.unpatch(model) and patch again"
            )
        embeds: Tensor = call[EMBEDS]
        if decision.merged is not None:
            call[EMBEDS] = embeds = decision.merged.into(embeds, decision.flat)
        batch, width = embeds.shape[:2]
        cache = self._cache(call)
        past = physical_length(cache)
        if self.layers.steps:
            starts = self._starts(cache, past, width)
            inside = LayerState.begin(decision, compact, running.pad_right, starts)
            inside.past, inside.head = past, masks.stored(running.mask, width)
            self.layers.begin(running, inside, cache)
        ids = call[POSITIONS]
        if ids is None:
            ids = torch.arange(width, device=embeds.device)[None] + (0 if cache is None else logical_length(cache))
        self._keep_samples_apart(running, call, ids, cache)
        call[MASK] = masks.shortened(self.parts, call[MASK], running, compact, cache, past)
        self._deepstack(call, running, compact)
        aligned = {
            name: value
            for name, value in call.named.items()
            if name not in MASK.names + POSITIONS.names
            and isinstance(value, Tensor)
            and value.dim() > 1
            and value.shape[:2] == (batch, width)
        }
        call.named |= zip(aligned, compact.sequences(*aligned.values()), strict=True)
        kept = compact.positions(ids)
        if self.positions == "compact":
            kept = compact.renumber(kept, compact.first_position(ids, running.mask))
        call[POSITIONS] = kept
        if cache is not None:
            running.adopted, running.stored = cache, {0: past + compact.length}
            slots = adopt(cache, batch, embeds.device, self.parts)
            dropped = column(compact.dropped, embeds.device)[:, 0]
            slots.extend(past, compact.index, compact.valid, width, dropped, compact.holes)

    def _keep_samples_apart(self, running: Call, call: Arguments, ids: Tensor, cache: Any) -> None:
        """Positions that restart within a row pack several samples into it: write the mask that they stand for.

        Transformers tells them by their positions alone, and only where there is neither mask nor cache (with flash
        attention: no mask); kept positions have gaps of their own.

        Raises:
            ValueError: they are packed, and this attention implementation or ``positions="compact"`` cannot do it.
        """
        ids = ids[0] if ids.dim() == 3 else ids
        if call[MASK] is not None or running.mask is not None or ids.dim() != 2:
            return
        alone = len(call[EMBEDS]) == 1 if self.parts.flash else cache is None
        if not alone or not bool((ids.diff(dim=1) != 1).any()):
            return
        config = self.parts.decoder.config
        made = {
            kind: causal_mask(config, layer, call[EMBEDS], None, None, ids)
            for kind, layer in masks.layer_of_each_kind(config).items()
        }
        writable = all(isinstance(mask, Tensor) for mask in made.values())
        if self.parts.flash or self.positions == "compact" or not writable:
            raise ValueError(
                "position ids that restart within a row pack several samples into it. Their visual tokens can be "
                "dropped with attn_implementation='sdpa' or 'eager' and positions='original', not with "
                f"{self.parts.attention!r} and {self.positions!r}"
            )
        call[MASK] = made if len(made) > 1 else next(iter(made.values()))
        running.prepared = True

    def _starts(self, cache: Any, past: int, new: int) -> dict[str | None, int]:
        """Where a call's own keys begin in prepared masks, by layer type: windows forget what is far behind."""
        types: list[str | None] = list(attention_kinds(self.parts.decoder.config) or (None,))
        if cache is None:
            return dict.fromkeys(types, 0)
        return {kind: past - mask_sizes(cache, new, types.index(kind))[1] for kind in set(types)}

    def _cache(self, call: Arguments) -> Any:
        """The call's cache; one is made here if the decoder would make one, so that the state has a home."""
        config = self.parts.decoder.config
        use = modules.default_use_cache(config) if call[USE_CACHE] is None else call[USE_CACHE]
        if any(map(attention.is_checkpointed, self.parts.layers)):
            use = False
        if call[CACHE] is None and use:
            call[CACHE] = new_cache(config)
        return call[CACHE]

    def _deepstack(self, call: Arguments, running: Call, compact: Compaction) -> None:
        """Features added to early layers come as rows in (batch, sequence) order of all visual tokens."""
        if (deep := call[DEEPSTACK]) is None:
            return
        visual = torch.stack([mask for name, mask in running.placeholders.items() if name in running.encoded]).any(0)
        where = visual.flatten().nonzero()[:, 0]  # stray placeholders of a modality without pixels have no rows
        kept = compact.keep.flatten()[where.to(compact.keep.device, non_blocking=True)]
        order = (~kept).to(torch.int8).argsort(stable=True)[: len(where) - sum(compact.dropped)]
        call[DEEPSTACK] = type(deep)(rows_of[order.to(rows_of.device)] for rows_of in deep)
