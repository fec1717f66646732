"""Pruning by hand: nothing but public forward passes of the unpatched model, and none of the engine.

A prompt and what was generated for it go through the model in one piece, without a cache. On the way into the decoder
the dropped columns are taken out of everything that is aligned with the sequence; the model's own decoder and head do
the rest. One pass so gives the logits of all generated tokens: each must be what a run with a cache got step by step.

Nothing here knows a family. What a decoder is given is told apart by shape, but for masks and positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import masks, modules
from vtc.dialect.arguments import MASK, POSITIONS, USE_CACHE, Arguments
from vtc.models import Parts

IDS, PADDING = "input_ids", "attention_mask"
"""What processors call the ids [B, N], and 0 where they are padding."""

Inputs = Mapping[str, Any]


def columns_of(inputs: Inputs, row: int) -> Tensor:
    """LongTensor: the columns of a sample that are not padding."""
    if inputs.get(PADDING) is None:
        return torch.arange(inputs[IDS].shape[1], device=inputs[IDS].device)
    return inputs[PADDING][row].nonzero()[:, 0]


def visual_columns(parts: Parts, inputs: Inputs, row: int) -> Tensor:
    """LongTensor: the columns of a sample that hold visual tokens."""
    return _is_visual(parts, inputs[IDS][row]).nonzero()[:, 0]


@torch.no_grad()
def logits_by_hand(
    parts: Parts, inputs: Inputs, row: int, dropped: Tensor, tokens: Tensor, positions: str = "original"
) -> Tensor:
    """The logits from which each of ``tokens`` would be chosen.

    Args:
        parts: of the unpatched model.
        inputs: a batch of prompts [B, N], padded on the left if at all.
        row: which sample of it; it is continued alone.
        dropped: LongTensor, columns of ``inputs`` that the decoder must not see.
        tokens: LongTensor [T], what was generated.
        positions: ``original`` or ``compact``, as for :func:`vtc.patch`.

    Returns:
        Float [T, V]; row t is conditioned on ``tokens[:t]``.
    """
    width = inputs[IDS].shape[1]
    real = torch.cat([columns_of(inputs, row), torch.arange(width, width + len(tokens) - 1, device=tokens.device)])
    longer = _continued(inputs, tokens[:-1])
    visual = _is_visual(parts, longer[IDS])
    stays = real[~torch.isin(real, dropped)]

    def prune(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = parts.spellings.decoder.bind(args, kwargs)
        _prune(call, row, real, stays, visual, width, positions)
        return (), call.named

    with _without_packing(parts):
        hook = parts.decoder.register_forward_pre_hook(prune, with_kwargs=True)
        try:
            logits = parts.root(**longer, **{USE_CACHE.names[0]: False}, logits_to_keep=len(tokens)).logits
        finally:
            hook.remove()
    return logits[0, -len(tokens) :].float()


def _is_visual(parts: Parts, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(parts.placeholders.values()), device=ids.device))


def _continued(inputs: Inputs, tokens: Tensor) -> dict[str, Any]:
    """The batch with ``tokens`` behind every prompt: text (0 where tokens have types) that is not padding."""
    ids = inputs[IDS]
    longer = dict(inputs)
    longer.setdefault(PADDING, torch.ones_like(ids))
    for name, value in longer.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            new = tokens if name == IDS else torch.full_like(tokens, int(name == PADDING))
            longer[name] = torch.cat([value, new.to(value.dtype).expand(len(ids), -1)], dim=1)
    return longer


def _prune(call: Arguments, row: int, real: Tensor, stays: Tensor, visual: Tensor, prompt: int, positions: str) -> None:
    """Leave of a decoder's arguments one sample and the columns that stay.

    Args:
        call: the arguments, for a batch [B, N].
        row: of the sample.
        real: its columns that are not padding.
        stays: those of them that stay.
        visual: bool [B, N], where visual tokens are.
        prompt: columns of the prompt; what comes behind was generated.
        positions: ``original`` or ``compact``.
    """
    mask, ids = call.pop(MASK), call.pop(POSITIONS)
    for name, value in call.named.items():
        if isinstance(value, Tensor) and value.shape[:2] == visual.shape:
            call.named[name] = value[row : row + 1, stays]
        elif isinstance(value, (list, tuple)) and value and all(_has_rows(each, int(visual.sum())) for each in value):
            kept = torch.zeros_like(visual)
            kept[row, stays] = True
            call.named[name] = type(value)(rows[kept[visual].to(rows.device)] for rows in value)
    call[POSITIONS] = _positions(ids, row, real, stays, positions)
    if isinstance(mask, dict):
        call[MASK] = {kind: None if m is None else _columns_of_mask(m, row, stays, prompt) for kind, m in mask.items()}
    else:
        call[MASK] = _columns_of_mask(mask, row, stays, prompt)


def _positions(ids: Tensor | None, row: int, real: Tensor, stays: Tensor, positions: str) -> Tensor:
    """The kept positions of one sample, [1, M] or, where they are triples, [3, 1, M]."""
    if ids is None:
        own = torch.searchsorted(real, stays)
    else:
        own = ids[..., min(row, ids.shape[-2] - 1), :]
        first, own = own[..., real[0]], own[..., stays]
    if positions == "compact":
        own = torch.arange(len(stays), device=stays.device) + (0 if ids is None else first)
    return own[..., None, :]


def _has_rows(value: Any, count: int) -> bool:
    """Whether something holds one row per visual token, as features that early layers add do."""
    return isinstance(value, Tensor) and value.dim() == 2 and len(value) == count


def _columns_of_mask(mask: Tensor | None, row: int, stays: Tensor, prompt: int) -> Tensor | None:
    """A mask without the other columns. One of padding becomes one without any.

    It has to be there: without it positions with gaps are taken for several packed sequences. In a mask that the base
    model prepared, generated tokens are text: no token before them sees them, whatever attends in both directions.
    """
    if mask is None or mask.dim() == 2:
        return torch.ones(1, len(stays), dtype=torch.long, device=stays.device)
    own = mask[min(row, len(mask) - 1)][:, stays][..., stays][None]
    hidden = False if own.dtype == torch.bool else torch.finfo(own.dtype).min
    later = (stays >= prompt)[None] & (stays[None] > stays[:, None])
    return own.masked_fill(later, hidden)


@contextlib.contextmanager
def _without_packing(parts: Parts) -> Iterator[None]:
    """Flash attention reads gaps in positions as packed sequences, mask or no mask: by hand, SDPA stands in for it."""
    if not parts.flash:
        yield
        return
    before = parts.attention
    modules.set_attention(parts.decoder.config, "sdpa")
    try:
        yield
    finally:
        modules.set_attention(parts.decoder.config, before)


def window_reaches_back(parts: Parts, inputs: Inputs, row: int, new_tokens: int) -> bool:
    """Whether generated tokens have a sliding window that ends between visual tokens: shorter than the prompt and them.

    A window counts stored tokens once decoding begins, so such a token sees more than in one long pass.
    """
    real, visual = columns_of(inputs, row), visual_columns(parts, inputs, row)
    every = (masks.window_of(parts.decoder.config, layer) for layer in range(len(parts.layers)))
    windows = {window for window in every if window is not None}
    if not windows or not len(visual):
        return False
    behind = int(real[-1]) - int(visual[-1])
    return any(behind < window < len(real) + new_tokens for window in windows)
