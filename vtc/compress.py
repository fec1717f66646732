"""Pruning without hooks: shorten the prompt before the model sees it.

Newer transformers let features be encoded ahead (``mm_encoder_outputs``). Then ids, masks, positions and features can
be shortened together, and generation runs on an ordinary short prompt: nothing is left to do in decode steps, and
chunked prefill works, since selection saw whole images.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.engine.compaction import Compaction
from vtc.engine.context import Frame, bypassed
from vtc.engine.encode import attached
from vtc.engine.plan import Plan, Prefill, compaction, plan
from vtc.methods import Method
from vtc.models import Adapter, Parts, resolve
from vtc.models.base import MODALITIES
from vtc.patching import fitted, patch, patch_of, requested


@torch.no_grad()
def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: str | Method | CompressionConfig,
    *,
    keep: Keep | None = None,
    positions: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Encode the images of a prompt and shorten it to the tokens that stay.

    Args:
        model: as for :func:`vtc.patch`, not patched (a patched model prunes by itself).
        inputs: what ``model.generate(**inputs)`` would take: ``input_ids`` [B, N], ``attention_mask``, pixels, grids.
        method: as for :func:`vtc.patch`.
        keep: as for :func:`vtc.patch`.
        positions: as for :func:`vtc.patch`.
        **options: as for :func:`vtc.patch`.

    Returns:
        Inputs for ``model.generate(**result)`` or ``model(**result)``: ``input_ids``, ``attention_mask`` and
        ``position_ids`` of M <= N columns, and ``mm_encoder_outputs`` with the features that stay. What ``generate``
        returns begins with these shortened ids.

    Raises:
        NotImplementedError: this transformers has no ``mm_encoder_outputs`` for the family; use :func:`vtc.patch`.
        ValueError: as :func:`vtc.patch`; or the model is patched.
    """
    if patch_of(model) is not None:
        raise ValueError("the model is patched and compresses by itself; vtc.unpatch(model), or just call generate()")
    adapter, parts = resolve(model)
    _takes_features(parts)
    inputs = dict(inputs)
    with patch(model, method, keep=keep, positions=positions, **options) as handle:
        _before_the_model(parts, handle.method)
        outputs, used = _encode(parts, inputs)
    for name in used:
        inputs.pop(name, None)
    if "position_ids" not in inputs:
        ids = inputs["input_ids"]
        inputs["position_ids"] = parts.root._prepare_position_ids_for_generation(ids, inputs | used)
    short = _shorten(adapter, parts, inputs["input_ids"], inputs, outputs, handle.method, handle.config.positions)
    return inputs if short is None else inputs | short.inputs


def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    method: str | Method | CompressionConfig | None = None,
    keep: Keep | None = None,
    positions: str | None = None,
    **model_kwargs: Any,
) -> Any:
    """``model.generate(**inputs, custom_generate=vtc.generate, method="divprune", keep=0.25)``.

    Greedy, sampling and beam search on the shortened prompt; chunked prefill and caches of fixed size included. The
    result has the original prompt ids in front. On a patched model leave the method out: the patch's is used.

    Raises:
        NotImplementedError: this transformers has no ``mm_encoder_outputs`` for the family, or another decoding mode.
        ValueError: as :func:`vtc.patch`; no method given and the model is not patched.
    """
    handle = patch_of(model)
    if (method is None) == (handle is None):
        raise ValueError(
            "give a method, as in model.generate(..., custom_generate=vtc.generate, method='divprune', keep=0.25)"
            if handle is None
            else f"the model is patched with {handle.method}; leave the method out, or vtc.unpatch(model) first"
        )
    adapter, parts = resolve(model)
    if handle is None:
        config, chosen = requested(method, keep, positions, {})  # type: ignore[arg-type]
        place = config.positions
        chosen = fitted(adapter, parts, chosen, place)
    else:
        chosen, place = handle.method, handle.config.positions
    _takes_features(parts)
    _before_the_model(parts, chosen)
    mode = str(generation_config.get_generation_mode().value)
    if mode not in _DECODERS:
        raise NotImplementedError(f"vtc.generate decodes greedily, by sampling or with beams, not by {mode}")
    short = _shorten(
        adapter, parts, input_ids, model_kwargs, model_kwargs.get("mm_encoder_outputs") or {}, chosen, place
    )
    ids = input_ids
    if short is not None:
        model_kwargs |= short.inputs
        ids = model_kwargs.pop("input_ids")
        if handle is not None:
            handle.stage.last = short.prefill
    gone = input_ids.shape[1] - ids.shape[1]
    with bypassed():
        result = getattr(parts.root, _DECODERS[mode])(
            ids,
            logits_processor=_earlier(logits_processor, gone),
            stopping_criteria=_earlier(stopping_criteria, gone),
            generation_config=_earlier([generation_config], gone)[0],
            **model_kwargs,
        )
    if generation_config.num_beams > 1:  # a row per beam went in, a row per returned sequence came out
        input_ids = input_ids[:: generation_config.num_beams].repeat_interleave(
            generation_config.num_return_sequences, 0
        )
    if isinstance(result, Tensor):
        return torch.cat([input_ids, result[:, ids.shape[1] :]], dim=1)
    result.sequences = torch.cat([input_ids, result.sequences[:, ids.shape[1] :]], dim=1)
    return result


_DECODERS = {
    "greedy_search": "_sample",
    "sample": "_sample",
    "beam_search": "_beam_search",
    "beam_sample": "_beam_search",
}
_COUNTS_FROM_START = ("max_length", "min_length", "prompt_length_to_skip", "begin_index")


def _earlier(rules: Any, gone: int) -> Any:
    """Copies of processors, criteria or configs whose lengths count the prompt: the prompt is ``gone`` shorter."""
    moved = []
    for rule in rules:
        rule = copy.copy(rule)
        for name in _COUNTS_FROM_START:
            if isinstance(value := getattr(rule, name, None), int) and not isinstance(value, bool):
                setattr(rule, name, value - gone)
        moved.append(rule)
    return type(rules)(moved)


def _takes_features(parts: Parts) -> None:
    if "mm_encoder_outputs" not in inspect.signature(parts.base.forward).parameters:
        import transformers

        raise NotImplementedError(
            f"transformers {transformers.__version__} cannot take encoded images for {type(parts.root).__name__} "
            "(no mm_encoder_outputs; 5.23 has it); use vtc.patch(model, ...) and model.generate()"
        )


def _before_the_model(parts: Parts, method: Method) -> None:
    if method.stages(len(parts.layers)):
        raise NotImplementedError(
            f"{method.name} drops tokens inside the language model, which a shortened prompt cannot express; use "
            "vtc.patch(model, ...) and model.generate()"
        )


def _encode(parts: Parts, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the encoders as ``generate`` does; also return the arguments they used up."""
    outputs, used = {}, {}
    for modality in MODALITIES:
        encode = getattr(parts.base, f"get_{modality}_features", None)
        names = [] if encode is None else inspect.signature(encode).parameters
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if any(name.startswith("pixel_values") for name in arguments):
            outputs[modality] = encode(**arguments, return_dict=True)
            used |= arguments
    return outputs, used


@dataclasses.dataclass(frozen=True)
class _Short:
    inputs: dict[str, Any]
    prefill: Prefill


def _shorten(
    adapter: Adapter,
    parts: Parts,
    ids: Tensor,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    method: Method,
    positions: str,
) -> _Short | None:
    """The shortened ids, masks, positions, token types and features; ``None`` when nothing is dropped."""
    width = ids.shape[1]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] != width:
        raise NotImplementedError("compressing a later turn needs vtc.patch: only the patch knows what a cache lacks")
    frame = Frame(mask=mask)
    for modality, output in outputs.items():
        where = (ids == parts.placeholders[modality]).cpu()
        if (
            output is not None
            and where.any()
            and (encoded := attached(adapter, parts.base, modality, output)) is not None
        ):
            frame.placeholders[modality], frame.encoded[modality] = where, encoded
    frame.see_padding(width)
    if not frame.placeholders:
        return None
    decision = plan(method, frame, _placed(frame, outputs, ids))
    if decision is None or not decision.drops:
        return None
    compact = compaction(decision, frame, ids.shape)
    short = {
        name: compact.sequence(value)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == ids.shape
    }
    pad = parts.root.generation_config.pad_token_id or 0
    short["input_ids"] = compact.sequence(ids).masked_fill(~compact.valid, pad)
    short["attention_mask"] = compact.valid.long() if compact.holes or mask is not None else None
    if (old := inputs.get("position_ids")) is not None:
        short["position_ids"] = compact.positions(old)
        if positions == "compact":
            short["position_ids"] = compact.renumber(short["position_ids"], compact.first_position(old, mask))
    short["mm_encoder_outputs"] = {m: _kept(outputs[m], m, frame, compact, decision) for m in frame.placeholders}
    lengths = tuple(frame.lengths or [width] * len(ids))
    return _Short(short, Prefill(decision, compact, lengths, []))


def _placed(frame: Frame, outputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    """The features at their placeholders, zeros elsewhere: what selection needs of the embeddings."""
    placed = None
    for modality, where in frame.placeholders.items():
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in outputs[modality].pooler_output])
        if placed is None:
            placed = rows.new_zeros(*ids.shape, rows.shape[-1])
        placed[where.to(rows.device)] = rows
    assert placed is not None
    return placed


def _kept(output: Any, modality: str, frame: Frame, compact: Compaction, decision: Plan) -> Any:
    """An encoder's output with the features that stay, one entry per image."""
    stays = compact.keep[frame.placeholders[modality].to(compact.keep.device)]
    counts = [k for k, image in zip(decision.counts, decision.images, strict=True) if image.modality == modality]

    def keep(features: Any) -> Any:
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])[stays.to(features[0].device)]
        if not isinstance(features, Tensor):
            return list(rows.split(counts))
        return rows.reshape(len(counts), -1, rows.shape[-1]) if len(set(counts)) == 1 else rows[None]

    fields = {"pooler_output": keep(output.pooler_output)}
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        fields["deepstack_features"] = [
            keep(layer) if not isinstance(layer, Tensor) else layer[stays] for layer in deep
        ]
    return type(output)(**fields)
