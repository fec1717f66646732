"""Calibrated attention: a bias on the logits of keys, in every layer behind the first tokens that leave.

Masks are added to logits, so a mask carries the bias: whatever mask a layer would get becomes one of floats, in the
prompt and in every step after it. What the bias is made of, how many tokens each key stands for and how it is rotated,
is kept on the cache's ledger (:mod:`vtc.engine.lengths`), behind stages inside the model for each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vtc.dialect import attention
from vtc.dialect.arguments import CACHE, MASK, ROTARY, Arguments
from vtc.dialect.caches import mask_sizes, physical_length
from vtc.dialect.masks import layer_type
from vtc.engine.choosing import Chooser
from vtc.engine.compaction import Compaction
from vtc.engine.context import Call, running_call
from vtc.engine.keys import Keys
from vtc.engine.lengths import SlotMap, slot_map
from vtc.engine.plan import Plan, columns_of
from vtc.models import Parts
from vtc.ops.calibration import distance_bias, turns
from vtc.places import Layer


class Calibrator:
    """Hooks on the decoder layers of one model. Holds no state of any generation."""

    def __init__(self, parts: Parts, chooser: Chooser, what: str) -> None:
        """Prepare.

        Args:
            parts: of the model.
            chooser: a method's steps.
            what: ``size``, ``size+distance`` or ``size+visual-distance``.
        """
        self.parts, self.what = parts, what
        self.by_distance = what != "size"
        self.stages = tuple(step.stage.at.after for step in chooser.inside if isinstance(step.stage.at, Layer))
        """Layers run before each stage inside the model."""
        self.first = 0 if chooser.steps or chooser.tower else min(self.stages, default=len(parts.layers))
        """The first layer behind tokens that left; those before it attend as ever."""

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """What to hook, before the module runs and after all other hooks of vtc."""
        for index, layer in list(enumerate(self.parts.layers))[self.first :]:
            yield layer, functools.partial(self.before_layer, index)

    def entering(self, plan: Plan, shape: torch.Size, compact: Compaction | None) -> Keys:
        """What of a prompt enters the first layer; ``compact`` is ``None`` where all of it does."""
        batch, width = shape[:2]
        visual = columns_of(plan.keep, plan.flat, batch, width)
        size = torch.ones_like(visual, dtype=torch.float32)
        if plan.size is not None:
            size = columns_of(plan.size, plan.flat, batch, width, 1.0)
        if compact is not None:
            visual, size = compact.sequences(visual, size)
        return Keys.of(size, visual)

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand over a mask that carries the bias, where tokens have left.

        Raises:
            RuntimeError: the attention implementation was switched to one that adds no masks.
            NotImplementedError: checkpointing runs hooks again.
        """
        if (running := running_call(self.parts)) is None:
            return None
        cache = CACHE.read(kwargs)
        if running.compaction is None and slot_map(cache, index) is None:
            return None
        if not self.parts.adds_masks:
            raise RuntimeError(
                f"the attention implementation was switched to {self.parts.attention!r} after vtc.patch, and the bias "
                f"of calibration={self.what!r} has no place there; switch back to 'sdpa' or 'eager'"
            )
        if attention.CHECKPOINTS_HOOKS and attention.is_checkpointed(layer):
            raise NotImplementedError(
                f"transformers {transformers.__version__} runs hooks again when it recomputes a checkpointed layer, "
                f"and calibration={self.what!r} works by hooks; train without gradient checkpointing, or update "
                "transformers"
            )
        call = self.parts.spellings.layers[index].bind((), kwargs)
        key = sum(after <= index for after in self.stages), layer_type(self.parts.decoder.config, index)
        given = call[MASK]
        if key not in running.biased or running.biased[key][0] is not given:
            hidden = attention.hidden_states(args, kwargs)
            running.biased[key] = given, self._mask(index, running, call, hidden, cache)
        call[MASK] = running.biased[key][1]
        return args, call.named

    def _mask(self, index: int, running: Call, call: Arguments, hidden: Tensor, cache: Any) -> Tensor:
        """Float [B, heads, M, keys]: what a layer may attend to, and the bias of it."""
        new, given = hidden.shape[1], call[MASK]
        past, slots = physical_length(cache, index), slot_map(cache, index)
        length, offset = mask_sizes(cache, new, index)
        keys = self._keys(index, running, call, hidden, slots, past)
        bias = self._bias(keys, offset, new, self._lost(running, slots, hidden))
        bias = nn.functional.pad(bias, (0, max(0, length - bias.shape[-1])))  # caches of fixed size have room behind
        if given is None:  # plainly causal
            if new > 1 and not attention.is_causal(self.parts.layers[index]):
                raise RuntimeError(f"layer {index} attends both ways without a mask, where no bias can be put")
            at = torch.arange(past, past + new, device=bias.device)
            given = (torch.arange(offset, offset + length, device=bias.device) <= at[:, None])[None, None]
        if not isinstance(given, Tensor) or given.shape[-1] != bias.shape[-1] or given.dim() != 4:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise RuntimeError(f"layer {index} has a mask ({shape}) that is not about its {bias.shape[-1]} keys")
        if given.dtype != torch.bool:
            return given + bias.to(given.dtype)
        kind = hidden.device.type  # autocast would make an infinity of the least float32, and NaN of padding
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        return torch.where(given, bias.to(dtype), torch.finfo(dtype).min)

    def _keys(
        self, index: int, running: Call, call: Arguments, hidden: Tensor, slots: SlotMap | None, past: int
    ) -> Keys:
        """Those stored before and those of this call, which the ledger remembers."""
        batch, new = hidden.shape[:2]
        if running.inside is not None:
            entering = running.inside.keys()
        else:
            entering = running.entering or Keys.plain(batch, new, hidden.device)
        if self.by_distance:
            cos, sin = call[ROTARY]
            entering = replace(entering, turns=turns(cos, sin).expand(batch, -1, -1))
        if slots is None:
            return entering
        kind = layer_type(self.parts.decoder.config, index)
        known = slots.keys.get(kind, Keys.plain(batch, 0, hidden.device)).between(0, past)
        if known.length < past:
            if self.by_distance:
                raise NotImplementedError(
                    f"calibration={self.what!r} needs the positions of all keys, and this cache held {past} tokens "
                    "before the first prompt that lost any; start a new cache with that prompt, or use "
                    "calibration='size'"
                )
            known = known.then(Keys.plain(batch, past - known.length, hidden.device))
        slots.keys[kind] = entering = known.then(entering) if past else entering
        return entering

    def _bias(self, keys: Keys, offset: int, new: int, lost: Tensor) -> Tensor:
        """float32 [B, 1, M or 1, keys] of the keys from slot ``offset`` on; the last ``new`` are the rows."""
        there = keys.between(offset, keys.length)
        bias = there.log_size[:, None]
        if self.by_distance:
            assert keys.turns is not None
            assert there.turns is not None
            far = distance_bias(keys.turns[:, keys.length - new :], there.turns)
            if self.what == "size+visual-distance":
                far = far.masked_fill(~there.visual[:, None], 0.0)
            bias = bias + far.masked_fill(~lost[:, None, None], 0.0)
        return bias[:, None]

    def _lost(self, running: Call, slots: SlotMap | None, hidden: Tensor) -> Tensor:
        """Bool [B]: which samples lost tokens; the others attend as without a patch, whoever stands beside them."""
        if slots is not None:
            return slots.dropped.to(hidden.device) > 0
        if (inside := running.inside) is not None:
            lost = [there < given for there, given in zip(inside.counts, inside.lengths, strict=True)]
        else:
            assert running.compaction is not None
            lost = [n > 0 for n in running.compaction.dropped]
        return torch.tensor(lost).to(hidden.device, non_blocking=True)
