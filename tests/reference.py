"""What pruning must amount to, computed by hand and without vtc.

One sample, alone and unpadded: take what the unpatched model gives its decoder, keep the chosen columns, call the
decoder on them, and decode greedily by running the growing sequence again for every token, with no cache. Nothing
here knows a family; it knows the five things a decoder can be given: embeddings, positions, a mask, the deepstack
features of Qwen3-VL and the per-layer inputs of Gemma4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from release import CACHE
from torch import Tensor

# What the base model also passes on and what does not depend on the columns.
_INDIFFERENT = {"input_ids", CACHE, "use_cache", "return_dict", "logits_to_keep", "labels"}
_INDIFFERENT |= {"output_attentions", "output_hidden_states", "output_router_logits", "pixel_values"}


@dataclass(frozen=True)
class Continuation:
    """One sample's result.

    tokens [T]: the greedily decoded ids.
    logits [T, V]: the raw logits from which each was chosen.
    columns [M]: the kept columns of the unpadded prompt.
    prompt [M, V]: the logits at these columns.
    """

    tokens: Tensor
    logits: Tensor
    columns: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class _Stream:
    """What the decoder of one sample sees; column c of it stood at `columns[c]` of the unpruned sequence."""

    embeds: Tensor  # [1, M, D]
    positions: Tensor  # [1, M], or [3, 1, M] for m-rope
    columns: Tensor  # [M]
    masks: dict[str, Tensor | None]  # allowed [M, M] per layer type; None: plain causal
    next_column: int
    next_position: int
    visual: Tensor | None = None  # [1, M], deepstack
    deepstack: tuple[Tensor, ...] = ()  # [visual tokens, D] per layer
    per_layer: Tensor | None = None  # [1, M, layers, d]


@torch.no_grad()
def continue_by_hand(
    model: Any,
    sample: dict[str, Tensor],
    images: Sequence[Tensor],
    keep: Sequence[Tensor] | None,
    positions: str = "original",
    new_tokens: int = 6,
    suppress: Sequence[int] = (),
    values: Sequence[Tensor] | None = None,
    bias: Callable[[Tensor, Tensor, str], Tensor] | None = None,
) -> Continuation:
    """Prune one prompt and continue it greedily.

    Args:
        model: the unpatched model.
        sample: its inputs, one sample without padding.
        images: for each image, the columns of its visual tokens.
        keep: for each image, which of these stay; None: all of all.
        positions: "original" keeps the position ids, "compact" numbers the kept tokens anew.
        new_tokens: how many tokens to decode.
        suppress: ids that are never chosen.
        values: for each image, embeddings [k, D] of the tokens that stay; None: what they were.
        bias: what is added to the logits of attention (which must be eager): from positions [M] or [3, M], columns [M]
            and a layer type to [M, M].
    """
    call = decoder_call(model, sample)
    if values is not None:
        call["inputs_embeds"] = embeds = call["inputs_embeds"].clone()
        for image, chosen, now in zip(images, keep or [], values, strict=True):
            embeds[0, image[chosen]] = now
    stream = _stream(model, call)
    columns = kept_columns(stream.columns.numel(), images, keep)
    stream = _select(stream, columns)
    if positions == "compact":
        stream = _compact(stream)
    prompt = hidden = _logits(model, call, stream, bias)
    tokens, logits = [], []
    for _ in range(new_tokens):
        logits.append(hidden[-1])
        tokens.append(hidden[-1].index_fill(0, torch.tensor(list(suppress), dtype=torch.long), -torch.inf).argmax())
        stream = _append(model, stream, tokens[-1])
        hidden = _logits(model, call, stream, bias)
    return Continuation(torch.stack(tokens), torch.stack(logits), columns, prompt)


@torch.no_grad()
def hidden_by_hand(
    model: Any, sample: dict[str, Tensor], images: Sequence[Tensor], keep: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """What stays of one prompt, for heads of any kind: the kept columns [M], and their last hidden states [M, D]."""
    call = decoder_call(model, sample)
    stream = _stream(model, call)
    columns = kept_columns(stream.columns.numel(), images, keep)
    return columns, _hidden(model, call, _select(stream, columns))[0]


def kept_columns(length: int, images: Sequence[Tensor], keep: Sequence[Tensor] | None) -> Tensor:
    """The columns of a prompt that stay: all text, and the chosen visual tokens."""
    stays = torch.ones(length, dtype=torch.bool)
    for columns, chosen in zip(images, keep or [], strict=keep is not None):
        stays[columns] = False
        stays[columns[chosen]] = True
    return stays.nonzero()[:, 0]


@torch.no_grad()
def decoder_call(model: Any, sample: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments with which the model calls its decoder on this sample, without a cache."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "the base model passes something to its decoder by position"
        seen.update(kwargs)

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**sample, use_cache=False)
    finally:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------------------ the steps


def _stream(model: Any, call: dict[str, Any]) -> _Stream:
    embeds = call["inputs_embeds"]
    length = embeds.shape[1]
    positions = call.get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    visual, deepstack = call.get("visual_pos_masks"), call.get("deepstack_visual_embeds") or ()
    known = {"inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds"}
    left = {k for k, v in call.items() if v is not None} - known - _INDIFFERENT - {"per_layer_inputs"}
    assert not left, f"the decoder is given {left}, which this reference does not know"
    return _Stream(
        embeds=embeds,
        positions=positions,
        columns=torch.arange(length),
        masks=_masks(call.get("attention_mask")),
        next_column=length,
        next_position=int(positions.max()) + 1,
        visual=visual,
        deepstack=tuple(deepstack),
        per_layer=call.get("per_layer_inputs"),
    )


def _masks(mask: Tensor | dict[str, Tensor | None] | None) -> dict[str, Tensor | None]:
    """The masks that the base model prepared (prefix-LM families), as booleans; {} if the decoder makes its own."""
    if isinstance(mask, dict):
        return {kind: None if part is None else _allowed(part) for kind, part in mask.items()}
    return {} if mask is None or mask.dim() == 2 else {"": _allowed(mask)}


def _allowed(mask: Tensor) -> Tensor:
    return (mask if mask.dtype == torch.bool else mask == 0)[0, 0]


def _select(stream: _Stream, columns: Tensor) -> _Stream:
    visual, deepstack = stream.visual, stream.deepstack
    if visual is not None:
        chosen = torch.isin(visual[0].nonzero()[:, 0], columns)  # deepstack rows are the visual tokens in order
        visual, deepstack = visual[:, columns], tuple(rows[chosen] for rows in deepstack)
    return replace(
        stream,
        embeds=stream.embeds[:, columns],
        positions=stream.positions[..., columns],
        columns=columns,
        masks={kind: None if m is None else m[columns][:, columns] for kind, m in stream.masks.items()},
        visual=visual,
        deepstack=deepstack,
        per_layer=None if stream.per_layer is None else stream.per_layer[:, columns],
    )


def _compact(stream: _Stream) -> _Stream:
    assert stream.positions.dim() == 2, "compact positions need one row of positions"
    # The prompt starts where it started (at 1 in PaliGemma), even if its first tokens are among the dropped ones.
    first, count = stream.next_position - stream.next_column, stream.columns.numel()
    return replace(stream, positions=first + torch.arange(count)[None], next_position=first + count)


def _append(model: Any, stream: _Stream, token: Tensor) -> _Stream:
    """Put a generated token behind the stream: a text token that sees everything before it."""
    ids = token.view(1, 1)
    position = torch.full_like(stream.positions[..., :1], stream.next_position)
    columns = torch.cat([stream.columns, torch.tensor([stream.next_column])])
    per_layer, visual = stream.per_layer, stream.visual
    if per_layer is not None:
        new = model.get_decoder().get_per_layer_inputs(ids, None)
        per_layer = torch.cat([per_layer, new], dim=1)
    if visual is not None:
        visual = torch.cat([visual, visual.new_zeros(1, 1)], dim=1)
    return replace(
        stream,
        embeds=torch.cat([stream.embeds, model.get_input_embeddings()(ids)], dim=1),
        positions=torch.cat([stream.positions, position], dim=-1),
        columns=columns,
        masks={kind: _grown(model, kind, mask, columns) for kind, mask in stream.masks.items()},
        next_column=stream.next_column + 1,
        next_position=stream.next_position + 1,
        visual=visual,
        per_layer=per_layer,
    )


def _grown(model: Any, kind: str, mask: Tensor | None, columns: Tensor) -> Tensor | None:
    window = model.config.get_text_config().sliding_window if kind == "sliding_attention" else None
    if mask is None:
        assert window is None or columns[-1] < window, "no mask was made for a window that has become too short"
        return None
    grown = mask.new_zeros(columns.numel(), columns.numel())
    grown[:-1, :-1] = mask
    # Windows count columns of the unpruned sequence, as the mask that the model itself prepared does.
    grown[-1] = True if window is None else columns[-1] - columns < window
    return grown


def _logits(model: Any, call: dict[str, Any], stream: _Stream, bias: Any = None) -> Tensor:
    """Run the decoder and the head over the whole stream."""
    logits = model.get_output_embeddings()(_hidden(model, call, stream, bias))[0]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _hidden(model: Any, call: dict[str, Any], stream: _Stream, bias: Any = None) -> Tensor:
    """Run the decoder over the whole stream: [1, M, D]."""
    inputs = {key: value for key, value in call.items() if key in _INDIFFERENT}
    inputs |= {"inputs_embeds": stream.embeds, "position_ids": stream.positions}
    inputs |= {CACHE: None, "use_cache": False, "logits_to_keep": 0}
    inputs["attention_mask"] = _mask_argument(model, stream) if bias is None else _with_bias(model, stream, bias)
    if stream.visual is not None:
        inputs |= {"visual_pos_masks": stream.visual, "deepstack_visual_embeds": list(stream.deepstack)}
    if stream.per_layer is not None:
        inputs["per_layer_inputs"] = stream.per_layer
    return model.get_decoder()(**inputs).last_hidden_state


def _mask_argument(model: Any, stream: _Stream) -> Any:
    if not stream.masks:
        # Explicit ones: without a mask, positions with gaps are taken for several packed sequences.
        return torch.ones(1, stream.columns.numel(), dtype=torch.long)
    ready = {kind: None if mask is None else _prepared(model, mask) for kind, mask in stream.masks.items()}
    return ready.get("", ready)


def _with_bias(model: Any, stream: _Stream, bias: Callable[[Tensor, Tensor, str], Tensor]) -> Any:
    """Masks of floats; a decoder that makes its own takes one of four dimensions as it is, for all layers."""
    length = stream.columns.numel()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = stream.masks or {"": causal}
    ready = {}
    for kind, mask in masks.items():
        blocked = torch.zeros(length, length).masked_fill(~(causal if mask is None else mask), -1e30)
        ready[kind] = (blocked + bias(stream.positions[..., 0, :], stream.columns, kind))[None, None]
    return ready.get("", ready)


def _prepared(model: Any, allowed: Tensor) -> Tensor:
    """A mask as the attention implementation wants it: sdpa takes booleans, eager adds floats."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return allowed[None, None]
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


@contextmanager
def blind(model: Any, gone: list[Tensor]) -> Iterator[None]:
    """Hide columns from each layer of an unpatched model with eager attention and no cache."""

    def hide(index: int, layer: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[..., torch.nn.functional.pad(gone[index], (0, mask.shape[-1] - len(gone[index])))] = torch.finfo(
            mask.dtype
        ).min
        return args, kwargs | {"attention_mask": mask}

    layers = model.get_decoder().layers
    handles = [
        layer.register_forward_pre_hook(functools.partial(hide, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
