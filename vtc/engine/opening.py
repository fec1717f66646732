"""The outer two calls: what the user calls, and the base model behind it.

They see what the decoder does not: ids, the padding mask as the caller gave it, features that were encoded ahead, and
which logits are wanted. The only host sync of a prompt is here: where the placeholders are must be known before
anything can be planned, and it happens before the decoder starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import modules
from vtc.dialect.arguments import CACHE, EMBEDS, ENCODED, IDS, LOGITS, MASK, Arguments
from vtc.dialect.caches import physical_length
from vtc.dialect.heads import Head
from vtc.engine import heads, masks
from vtc.engine.context import Call, change, current, is_running, running_call
from vtc.engine.encode import attached
from vtc.engine.entry import EntryStage
from vtc.engine.lengths import slot_map, take_over
from vtc.ops.gather import gather_columns


class Opening:
    """Hooks on root and base model: they open a call, fill it, and close it."""

    def __init__(self, stage: EntryStage) -> None:
        self.stage, self.parts = stage, stage.parts
        self.head = stage.parts.head

    # -- the root -------------------------------------------------------------------------------------------------

    def before_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a call. If the caller wants the logits of some columns, :meth:`after_base` will pick them."""
        if current().bypassed:
            return None
        running = Call(self.parts)
        change(call=running)
        call = self.parts.spellings.root.bind(args, kwargs)
        if self.head is not Head.TOKENWISE:
            running.asked = call.named
            return None
        wanted = call[LOGITS]
        if wanted is None or (isinstance(wanted, int) and wanted < 1):
            return None
        running.wanted = wanted
        if isinstance(wanted, int) and wanted == 1:  # of generate: the last is the last, but for padding on the right
            return None
        call[LOGITS] = 0
        return (), call.named

    def after_root(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Close the call, also when the forward pass raised; vectors of dropped tokens leave what is returned."""
        running = running_call(self.parts)
        change(call=None)
        if running is None or running.compaction is None or output is None or self.head is not Head.VECTORS:
            return None
        return heads.shortened(output, running)

    # -- the base model -------------------------------------------------------------------------------------------

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See what is asked; translate the masks for a cache that was pruned."""
        now = current()
        if now.bypassed:
            return None
        running = now.call
        if running is None or running.owner is not self.parts or not is_running(self.parts.root):
            running = Call(self.parts)  # the base model was called by itself
            change(call=running)
        call = self.parts.spellings.base.bind(args, kwargs)
        self._see_masks(running, call)
        if _width(call) > 1:
            self._see_placeholders(running, call, base)
        return (), call.named

    def _see_masks(self, running: Call, call: Arguments) -> None:
        mask, cache = call[MASK], call[CACHE]
        take_over(cache, self.parts)
        made, slots = current().prepared, slot_map(cache)
        if made is not None:
            change(prepared=None)
            running.shifted = made.shifted
        running.prepared = self.parts.builds_masks_early
        running.logical = running.mask = mask
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            if made is not None and made.cache is cache:  # the 2-D mask was seen where this one was made
                running.logical, running.mask = made.logical, made.physical
            else:  # the caller's own
                running.logical, running.mask, running.prepared = None, None, True
                if slots is not None:
                    call[MASK] = masks.translated(mask, cache, slots, _width(call))
        elif slots is not None:
            length = physical_length(cache) + _width(call)
            if mask is None or mask.shape[1] == length + slots.removed:
                call[MASK] = running.mask = slots.physical_mask(mask, length)

    def _see_placeholders(self, running: Call, call: Arguments, base: nn.Module) -> None:
        merged = call[IDS] is None and IDS.read(running.asked) is not None  # the root has embedded its ids itself
        ids, embeds = IDS.read(running.asked) if merged else call[IDS], call[EMBEDS]
        if ids is None and (prompt := self.stage.prompts.find(embeds)) is not None:
            running.placeholders, running.encoded = dict(prompt.placeholders), dict(prompt.encoded)
        for modality, token in self.parts.placeholders.items():
            where = ids == token if ids is not None else _embedded(self.parts.base, embeds, token)
            if (host := where.cpu()).any():
                running.placeholders[modality] = host
        for modality, output in (call[ENCODED] or {}).items():
            if (
                encoded := attached(self.stage.adapter, self.parts.base, modality, output, self.stage.memory)
            ) is not None:
                running.encoded[modality] = encoded
        if merged:
            running.encoded |= heads.merged_before(self.stage.adapter, self.parts, running)
        if (
            running.placeholders
            and self.parts.root is self.parts.base
            and (caller := heads.caller_of(base)) is not None
        ):
            heads.check_caller(caller, base)
        running.see_padding(_width(call))
        looked = bool(self.parts.placeholders)  # else its images stand in no prompt but those that were found above
        if looked and ids is None and not running.placeholders and not physical_length(call[CACHE]):
            self.stage.say_once(
                "a prompt came as embeddings in which no placeholder stands: images that were merged into it already "
                "cannot be found, so nothing is pruned. Give token ids and pixel values, or embeddings with "
                "placeholders"
            )

    def after_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hidden states of the columns whose logits the caller wants, as columns of the prompt; of all, if heads count.

        Raises:
            IndexError: one that is wanted was dropped.
        """
        if (running := running_call(self.parts)) is None:
            return None
        if running.asked and running.compaction is not None:
            hidden = heads.whole(self.head, self.parts.root, running, modules.last_hidden(output))
            return modules.with_last_hidden(output, hidden)
        if running.wanted is None:
            return None
        if (
            isinstance(running.wanted, int)
            and running.wanted == 1
            and (running.compaction is None or not running.pad_right)
        ):
            return None
        hidden = modules.last_hidden(output)
        width = hidden.shape[1] if running.compaction is None else running.compaction.width
        columns = _columns(running.wanted, width, hidden.device)
        if running.compaction is None:
            return modules.with_last_hidden(output, hidden[:, columns])
        assert running.left is not None
        slots = running.left.slots(width)[:, columns]
        gone = slots < 0
        if running.mask is not None:  # of padding nobody wants to know
            gone &= running.mask[:, -width:].bool().to(gone.device)[:, columns]
        if gone.any():
            row, which = gone.nonzero()[0].tolist()
            raise IndexError(
                f"the logits of column {int(columns[which])} of row {row} were asked for, and that visual token was "
                "dropped; p.last_columns of the patch has the columns that are left"
            )
        return modules.with_last_hidden(output, gather_columns((hidden,), slots.clamp(min=0))[0])


def _embedded(base: nn.Module, embeds: Tensor, token: int) -> Tensor:
    """Placeholders in a prompt that came as embeddings: the rows that equal the placeholder's own."""
    return (embeds == modules.embedding_of(base, torch.tensor(token, device=embeds.device))).all(-1)


def _width(call: Arguments) -> int:
    """New columns of a call."""
    return (call[EMBEDS] if call[IDS] is None else call[IDS]).shape[1]


def _columns(wanted: int | Tensor, width: int, device: torch.device) -> Tensor:
    """LongTensor [n]: the columns that ``hidden[:, -wanted:]``, or ``hidden[:, wanted]``, would take of ``width``."""
    every = torch.arange(width, device=device)
    return every[-wanted:] if isinstance(wanted, int) else every[wanted.to(device)]
