"""Whether a method fits a language model and a tower: told before anything is touched, and for attention tried out.

Rows are recomputed from queries and keys, and families make those in many ways: heads that are not rotated, or only
their first half, norms in four places, attention sinks. So each layer whose rows a method reads is run once, as a
stand-in, on a few random tokens. The first way of making rows that gives what the layer itself attends to is taken; if
none does, the model is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect import attention as inner
from vtc.dialect import standins
from vtc.dialect.arguments import HIDDEN, MASK, POSITIONS, ROTARY, Arguments
from vtc.dialect.masks import attention_kinds, last_layer_before_reuse, shared_layers, window_of
from vtc.dialect.releases import running_release
from vtc.dialect.standins import Trial
from vtc.dialect.towers import Tower
from vtc.engine.rows import AttentionRows
from vtc.errors import UnsupportedModelError
from vtc.methods.stages import Step
from vtc.models import Adapter, Parts
from vtc.models.base import MODALITIES
from vtc.ops.backend import plain
from vtc.places import Layer
from vtc.signals import DecoderSignal, TowerSignal
from vtc.signals.cls import cls_row
from vtc.signals.received import received

TOLERANCE = 1e-4
"""Of attention, which is at most 1, in float32."""


def unfit_for(parts: Parts, steps: Sequence[Step]) -> str | None:
    """Why tokens cannot leave this language model at these stages, ``None`` if they can."""
    config = parts.decoder.config
    kinds = attention_kinds(config) or []
    if odd := sorted({kind for kind in kinds if "attention" not in kind or "linear" in kind or "chunked" in kind}):
        return f"this one has {', '.join(odd)} layers, whose state has no single tokens to leave out"
    signals = [s for step in steps for s in step.stage.needs if isinstance(s, DecoderSignal)]
    for layer in sorted({layer for signal in signals for layer in signal.watched()}):
        if inner.self_attention(parts.layers[layer]) is None or inner.mlp(parts.layers[layer]) is None:
            return f"its layer {layer} has no attention and mlp to watch"
    last = last_layer_before_reuse(config, len(parts.layers))
    late = [step.stage.at.after for step in steps if isinstance(step.stage.at, Layer)]
    if last is not None and (late := [after for after in late if after > last]):
        return (
            f"its last {shared_layers(config)} layers reuse keys of layer {last}, which would still hold what leaves "
            f"after layer {late[0]}; stages up to {last} work"
        )
    try:
        recipes(parts, {signal.layer for signal in signals if signal.needs_rows})
    except UnsupportedModelError as error:
        return str(error)
    return None


def recipes(parts: Parts, layers: Collection[int]) -> dict[int, inner.Recipe]:
    """How each of these layers makes queries and keys, tried out.

    A fraction of a second whatever the size of the model, and no weight of it is read.

    Raises:
        UnsupportedModelError: the attention of one cannot be recomputed. The message begins with what of it.
    """
    if not layers:
        return {}
    for layer in layers:
        found = inner.self_attention(parts.layers[layer])
        if not inner.has_projections(found):
            raise UnsupportedModelError(
                f"its attention ({type(found).__name__}, layer {layer}) has no q_proj and k_proj to recompute rows from"
            )
    with _quietly():
        try:
            calls = standins.calls_of_layers(parts.decoder, parts.spellings.decoder, parts.layers, max(layers))
        except Exception as error:
            raise UnsupportedModelError(
                f"what its layers attend to could not be tried out on a stand-in of its "
                f"{type(parts.decoder).__name__} ({_first_line(error)}). {running_release()}"
            ) from error
        return {layer: _recipe(parts, layer, *calls[layer]) for layer in sorted(layers)}


def unfit_for_bias(parts: Parts, layers: Collection[int], by_distance: bool) -> str | None:
    """Why the attention of these layers cannot be given a bias by its mask, ``None`` if it can: it is tried out.

    Args:
        parts: of the model.
        layers: which.
        by_distance: the bias is made of the rotary embedding, which then has to turn whole heads.
    """
    if not layers:  # nothing leaves
        return None
    if (odd := next((i for i in layers if inner.self_attention(parts.layers[i]) is None), None)) is not None:
        return f"layer {odd} has no attention whose logits could take it"
    try:
        with _quietly():
            calls = standins.calls_of_layers(parts.decoder, parts.spellings.decoder, parts.layers, max(layers))
            for index in layers:
                call = parts.spellings.layers[index].bind(*calls[index])
                if _apart(*_biased(parts.layers[index], call)) > TOLERANCE:
                    return f"layer {index} does not add its mask to them"
                if by_distance:
                    width, head = call[ROTARY][0].shape[-1], inner.head_width(parts.layers[index])
                    rotated = _recipe(parts, index, *calls[index]).rotated
                    if rotated != "all" or width != head:
                        turned = 0 if rotated == "none" else width
                        return (
                            f"layer {index} rotates {turned} of {head} features of a head, for which its distance "
                            "term is not defined; calibration='size' works"
                        )
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:
        return f"that could not be tried out on a stand-in ({_first_line(error)}). {running_release()}"
    return None


def _biased(layer: torch.nn.Module, call: Arguments) -> tuple[Tensor, Tensor]:
    """Attention of a trial with a bias, as it should be and as it is."""
    bias = torch.linspace(-4, 4, standins.TOKENS)
    plain = _told(Trial.of(layer, call).weights)
    with_bias = call.copy()
    with_bias[MASK] = call[MASK] + bias
    grown = plain * bias.exp()  # what a sink takes stays as it was
    total = grown.sum(-1, keepdim=True) + (1 - plain.sum(-1, keepdim=True)).clamp(min=0)
    return grown / total, _told(Trial.of(layer, with_bias).weights)


def unfit_tower(adapter: Adapter, parts: Parts, signals: Collection[TowerSignal]) -> str | None:
    """Why attention in the tower that these signals are made of cannot be recomputed, ``None`` if it can."""
    tried = [signal for signal in signals if signal.recomputes]
    towers = [tower for modality in MODALITIES if (tower := adapter.tower(parts.base, modality)) is not None]
    found = {module: tower for tower in towers for signal in tried if (module := signal.of(tower)) is not None}
    for attention, tower in found.items():
        fault = "is not what vtc recomputes"
        try:
            with _quietly():
                apart = _tower_apart(tower, attention)
            if apart < TOLERANCE:
                continue
            fault += f": what tokens receive differs by up to {apart:.2g}"
        except Exception as error:
            fault = f"could not be tried out on a stand-in of it ({_first_line(error)})"
        return f"what is attended to in its {type(attention).__name__} {fault}. {running_release()}"
    return None


def _tower_apart(tower: Tower, attention: nn.Module) -> float:
    """By how much a tower's attention differs from ours: what tokens receive, and the CLS row where there is one."""
    trial, hidden, heard, maps = standins.attend(attention, masked=not tower.special)
    told = [_told(weights).mean(1) for weights in maps]
    theirs = torch.cat([rows.sum(1) for rows in told], 1) if told else _told(None)
    apart = _apart(received(trial, hidden, heard), theirs)
    if tower.special:
        apart = max(apart, _apart(cls_row(trial, hidden), told[0][:, 0, 1:]))
    return apart


def _recipe(parts: Parts, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inner.Recipe:
    layer = parts.layers[index]
    call = parts.spellings.layers[index].bind(args, kwargs)
    closest = float("inf")
    try:
        trial = Trial.of(layer, call)
        mean = _told(trial.weights).mean(1)
        theirs = torch.cat([mean.mean(1), mean[:, -1]])
        for recipe in inner.recipes(trial.layer, call[HIDDEN], trial.entered):
            with contextlib.suppress(Exception):  # shapes that do not fit
                apart = _apart(_two_rows(recipe, parts, index, trial), theirs)
                if apart < TOLERANCE:
                    return recipe
                closest = min(closest, apart)
    except Exception as error:
        fault = f"could not be tried out on a stand-in of it ({_first_line(error)})"
    else:
        fault = "is not what vtc recomputes"
        fault += f": rows differ by up to {closest:.2g}" if closest < float("inf") else ", for which it finds no way"
    raise UnsupportedModelError(
        f"what its layer {index} ({type(layer).__name__}, {type(inner.self_attention(layer)).__name__}) attends to "
        f"{fault}. {running_release()}"
    )


def _two_rows(recipe: inner.Recipe, parts: Parts, index: int, trial: Trial) -> Tensor:
    """What methods are given, [2, T]: attention averaged over heads and rows, and that of the last row."""
    hidden = trial.call[HIDDEN]
    batch, length = hidden.shape[:2]
    positions = trial.call[POSITIONS] if parts.reads_positions else None
    rows = AttentionRows.of(
        trial.layer,
        recipe,
        hidden,
        trial.call[ROTARY],
        None if positions is None else positions.expand(batch, -1),
        torch.ones(batch, length, dtype=torch.bool),
        length,
        keys=None,
        valid=None,
        prepared=None,
        window=None if window_of(parts.decoder.config, index) is None else standins.WINDOW,
    )
    return torch.cat([rows.mean(), rows.last()])


def _told(weights: Tensor | None) -> Tensor:
    if weights is None:
        raise ValueError("it returns no attention weights, not even with eager attention")
    return weights.float()


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """On the CPU, in full precision and without gradients, whatever surrounds it."""
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), plain():
        yield


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
