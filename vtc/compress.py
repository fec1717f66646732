"""Pruning without hooks: shorten the prompt before the model sees it.

Newer transformers let features be encoded ahead (``mm_encoder_outputs``). Then ids, masks, positions and features can
be shortened together, and generation runs on an ordinary short prompt: nothing is left to do in decode steps, and
chunked prefill works, since selection saw whole images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.binding import bind, parse_request
from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.dialect import generation, modules, rules
from vtc.dialect.arguments import ENCODED, IDS, LABELS, MASK, POSITIONS, Arguments
from vtc.engine.choosing import Chooser, compaction, plan
from vtc.engine.compaction import Compaction
from vtc.engine.context import Call, bypassed
from vtc.engine.encode import Memory, attached, listening
from vtc.engine.plan import Plan, Prefill
from vtc.engine.recorders import listening_in, recorders
from vtc.handle import patch_of
from vtc.methods import Method
from vtc.models import Adapter, Parts, resolve
from vtc.models.base import MODALITIES


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
        NotImplementedError: the model does not generate, or this transformers has no ``mm_encoder_outputs`` for the
            family; use :func:`vtc.patch`.
        ValueError: as :func:`vtc.patch`; or the model is patched; or the inputs are no prompt of the model.
    """
    if patch_of(model) is not None:
        raise ValueError("the model is patched and compresses by itself; vtc.unpatch(model), or just call generate()")
    adapter, parts = resolve(model)
    _takes_features(parts)
    inputs = dict(inputs)
    config, chosen = parse_request(method, keep, positions, options)
    _check_carried(config)
    chosen = bind(adapter, parts, chosen, config.positions)
    chooser = _before_the_model(adapter, parts, chosen)
    call = parts.spellings.base.bind((), inputs)
    _check(parts, call)
    encoded, used = _encode(chooser, inputs)
    outputs = {**(call[ENCODED] or {}), **encoded}
    for name in used:
        call.named.pop(name, None)
    if call[POSITIONS] is None:
        call[POSITIONS] = generation.positions_of_prompt(parts.root, call[IDS], inputs)
    short = _shorten(chooser, call, outputs, config.positions)
    there = {modality for modality, token in parts.placeholders.items() if bool((call[IDS] == token).any())}
    if there and not there & outputs.keys():
        raise ValueError(
            f"the prompt has placeholders for {' and '.join(sorted(there))} and nothing to fill them: give pixel "
            "values (what the processor returned), or features encoded ahead"
        )
    if short is None and encoded:
        call[ENCODED] = outputs  # all tokens stay; what was encoded is not encoded again
    return call.named if short is None else call.named | short.inputs


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
        config, chosen = parse_request(method, keep, positions, {})  # type: ignore[arg-type]
        _check_carried(config)
        place = config.positions
        chosen = bind(adapter, parts, chosen, place)
    else:
        _check_carried(handle.config)
        chosen, place = handle.method, handle.config.positions
    _takes_features(parts)
    chooser = _before_the_model(adapter, parts, chosen)
    decode = generation.decoding_loop(parts.root, generation_config)
    call = parts.spellings.base.bind((), model_kwargs)
    call[IDS] = input_ids
    memory = None if handle is None else handle.stage.memory
    short = _shorten(chooser, call, call[ENCODED] or {}, place, memory)
    ids = input_ids
    if short is not None:
        call.named |= short.inputs
        ids = call[IDS]
        if handle is not None:
            handle.stage.last = short.prefill
    call.pop(IDS)
    beams = generation_config.num_beams
    prompt, gone = input_ids[::beams], input_ids.shape[1] - ids.shape[1]
    with bypassed():
        result = decode(
            ids,
            logits_processor=rules.processors_with_prompt(logits_processor, prompt, ids.shape[1]),
            stopping_criteria=rules.criteria_with_prompt(stopping_criteria, prompt, ids.shape[1]),
            generation_config=rules.shorter(generation_config, gone),
            **call.named,
        )
    if beams > 1:  # a row per beam went in, a row per returned sequence came out
        input_ids = prompt.repeat_interleave(generation_config.num_return_sequences, 0)
    if isinstance(result, Tensor):
        return torch.cat([input_ids, result[:, ids.shape[1] :]], dim=1)
    result.sequences = torch.cat([input_ids, result.sequences[:, ids.shape[1] :]], dim=1)
    return result


def _takes_features(parts: Parts) -> None:
    if not generation.generates(parts.root):
        raise NotImplementedError(
            f"a shortened prompt is one for generate, and {type(parts.root).__name__} does not generate; "
            "vtc.patch(model, ...) serves classifiers, retrievers and base models"
        )
    if not modules.takes_encoded(parts.base):
        import transformers

        raise NotImplementedError(
            f"transformers {transformers.__version__} cannot take encoded images for {type(parts.root).__name__} "
            "(no mm_encoder_outputs; 5.23 has it); use vtc.patch(model, ...) and model.generate()"
        )


def _check_carried(config: CompressionConfig) -> None:
    if config.calibration is not None:
        raise NotImplementedError(
            f"calibration={config.calibration!r} adds a bias in every layer and step, which a shortened prompt cannot "
            "carry; use vtc.patch(model, ...) and model.generate(), or leave the calibration out"
        )
    if config.when != "always":
        raise NotImplementedError(
            f"when={config.when!r} decides while a patched model runs, and here prompts are shortened before; use "
            "vtc.patch(model, ...) and model.generate(), or when='always'"
        )


def _before_the_model(adapter: Adapter, parts: Parts, method: Method) -> Chooser:
    chooser = Chooser(adapter, parts, method)
    if chooser.tower:
        raise NotImplementedError(
            f"{method.name} lets patches leave inside the vision tower, which takes hooks; use vtc.patch(model, ...) "
            "and model.generate()"
        )
    if chooser.inside:
        raise NotImplementedError(
            f"{method.name} drops tokens inside the language model, which a shortened prompt cannot express; use "
            "vtc.patch(model, ...) and model.generate()"
        )
    return chooser


def _check(parts: Parts, call: Arguments) -> None:
    """Refuse what is no prompt, by name.

    Raises:
        ValueError: ids are missing or no [B, N] integers, or something beside them has another size.
    """
    ids = call[IDS]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        given = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"inputs need token ids, a LongTensor [batch, columns] of a prompt; got {given} (of "
            f"{', '.join(sorted(call.named)) or 'nothing'}). Give what the processor returned with return_tensors='pt'"
        )
    mask = call[MASK]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != len(ids)):
        given = str(tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the attention mask must be [{len(ids)}, columns], beside ids {tuple(ids.shape)}; got {given}"
        )
    positions = call[POSITIONS]
    if positions is not None and (not isinstance(positions, Tensor) or positions.shape[-1:] != ids.shape[-1:]):
        given = str(tuple(positions.shape)) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"position ids must have {ids.shape[1]} columns, as the token ids; got {given}")


def _encode(chooser: Chooser, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the encoders as ``generate`` does, listening; also return the arguments they used up."""
    adapter, parts = chooser.adapter, chooser.parts
    outputs: dict[str, Any] = {}
    used: dict[str, Any] = {}
    for modality in MODALITIES:
        encode = modules.encoder_of(parts.base, modality)
        names = [] if encode is None else modules.parameters_of(encode)
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if not any(name.startswith("pixel_values") for name in arguments):
            continue
        with listening_in(recorders(adapter, parts, chooser.recorded, [modality])):
            outputs[modality] = listening(adapter, parts, modality, encode)(**arguments, return_dict=True)
        used |= arguments
    return outputs, used


@dataclasses.dataclass(frozen=True)
class _Short:
    inputs: dict[str, Any]
    prefill: Prefill


def _shorten(
    chooser: Chooser, call: Arguments, outputs: Mapping[str, Any], positions: str, memory: Memory | None = None
) -> _Short | None:
    """The shortened ids, masks, positions, token types and features; ``None`` when nothing is dropped."""
    adapter, parts = chooser.adapter, chooser.parts
    ids, mask = call[IDS], call[MASK]
    width = ids.shape[1]
    if mask is not None and mask.shape[1] != width:
        raise NotImplementedError("compressing a later turn needs vtc.patch: only the patch knows what a cache lacks")
    running = Call(parts, mask=mask)
    for modality, output in outputs.items():
        where = (ids == parts.placeholders[modality]).cpu()
        if (
            output is not None
            and where.any()
            and (encoded := attached(adapter, parts.base, modality, output, memory)) is not None
        ):
            running.placeholders[modality], running.encoded[modality] = where, encoded
    running.see_padding(width)
    if not running.placeholders:
        return None
    placed = _placed(running, outputs, ids)
    decision = plan(chooser, running, placed)
    if decision is None or not decision.drops:
        return None
    compact = compaction(decision, running, ids.shape)
    aligned = {
        name: compact.sequence(value)
        for name, value in call.named.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == ids.shape
    }
    short = parts.spellings.base.bind((), aligned)
    if (labels := short[LABELS]) is not None:
        short[LABELS] = labels.masked_fill(~compact.valid.to(labels.device), -100)
    pad = generation.pad_token_of(parts.root)
    short[IDS] = compact.sequence(ids).masked_fill(~compact.valid, pad)
    short[MASK] = compact.valid.long() if compact.holes or mask is not None else None
    if (old := call[POSITIONS]) is not None:
        kept = compact.positions(old)
        short[POSITIONS] = compact.renumber(kept, compact.first_position(old, mask)) if positions == "compact" else kept
    merged = None if decision.merged is None else decision.merged.into(placed, decision.flat)
    short[ENCODED] = {m: _kept(outputs[m], m, running, compact, decision, merged) for m in running.placeholders}
    lengths = tuple(running.lengths or [width] * len(ids))
    return _Short(short.named, Prefill(decision, compact, lengths, []))


def _placed(running: Call, outputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    """The features at their placeholders, zeros elsewhere: what selection needs of the embeddings."""
    placed = None
    for modality, where in running.placeholders.items():
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in modules.features_in(outputs[modality])])
        if placed is None:
            placed = rows.new_zeros(*ids.shape, rows.shape[-1])
        placed[where.to(rows.device)] = rows
    assert placed is not None
    return placed


def _kept(output: Any, modality: str, running: Call, compact: Compaction, decision: Plan, merged: Tensor | None) -> Any:
    """An encoder's output with the features that stay, or what ``merged`` [B, L, d] has there; an entry per image."""
    where = running.placeholders[modality]
    stays = compact.keep[where.to(compact.keep.device)]
    counts = [k for k, image in zip(decision.counts, decision.images, strict=True) if image.modality == modality]

    def keep(features: Any, now: Tensor | None = None) -> Any:
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features]) if now is None else now[where.to(now.device)]
        rows = rows[stays.to(rows.device)]
        if not isinstance(features, Tensor):
            return list(rows.split(counts))
        return rows.reshape(len(counts), -1, rows.shape[-1]) if len(set(counts)) == 1 else rows[None]

    deep = modules.deep_features_in(output)
    if deep is not None:
        deep = [keep(layer) if not isinstance(layer, Tensor) else layer[stays] for layer in deep]
    return modules.encoder_output(output, keep(modules.features_in(output), merged), deep)
