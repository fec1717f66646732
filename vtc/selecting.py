"""``vtc.select``: a method on bare tensors, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.budget import Keep, count
from vtc.methods import Method, ModelFacts, make_method
from vtc.methods.base import ANY_MODEL, keeps_all
from vtc.methods.stages import steps_of
from vtc.signals import TOWER_SIGNALS, Text
from vtc.tokens import Layout, Segment, VisualTokens
from vtc.values import shown


@dataclass(frozen=True)
class Selection:
    """What a method keeps of one image or video.

    Attributes:
        index: LongTensor [K], kept places, ascending.
        order: LongTensor [K], the same in the order of picking or of falling score; ``None`` where the method has
            none, with ``keep=1.0``, and where newlines stay unasked.
        features: float [K, d], what stands at the kept places now, where the method merges; else ``None``.
    """

    index: Tensor
    order: Tensor | None
    features: Tensor | None


@torch.no_grad()
def select(
    method: str | Method,
    features: Tensor,
    *,
    keep: Keep | None = None,
    signals: Mapping[str, Tensor] | None = None,
    layout: Layout | None = None,
    text: Tensor | None = None,
    stage: int = 0,
    **options: Any,
) -> Selection:
    """Let a method choose among the tokens of one image, given as tensors.

    Args:
        method: a name or an object.
        features: float [N, d], as they stand at the stage's place; or [frames, n, d] of a video: places count
            frames * n. They are not changed.
        keep: as everywhere a float in (0, 1] or an int; but an int is what stays after this very call, also for a
            method with a schedule of its own (not where the content decides). Default: 0.25 for a name, its own for an
            object.
        signals: what the method asks for, by name: [N], [N, c] or [T, N]; of a video [frames, n]. With ``visual``, bool
            [L], those of L rows are of a whole prompt: they are cut into visual tokens and, as ``text_NAME``, the text
            behind them.
        layout: structure of the tokens; default: a picture without one, or the frames.
        text: float [M, d], text tokens at the same place, for methods that read them; with ``visual``, the states of
            all its other columns.
        stage: number of the stage, for methods with several.
        options: with a name: further options of the method.

    Returns:
        Kept places, and where the method merges what stands there.

    Raises:
        ValueError: an unknown method, a bad keep, tensors that do not fit, a signal or stage that is not there.
        TypeError: options that the method does not have, or given beside an object.
    """
    chosen = _method(method, keep, options)
    frames = None if features.dim() == 2 else features.shape[0]
    if features.dim() not in (2, 3) or not features.is_floating_point() or not features.numel():
        raise ValueError(f"features {tuple(features.shape)}, {features.dtype}, must be floats [N, d] or [frames, n, d]")
    flat = features.reshape(-1, features.shape[-1])
    n = len(flat)
    layout = layout or _layout(n, frames)
    if layout.length != n:
        raise ValueError(f"the layout has {layout.length} tokens, the features {n}")
    signals = dict(signals or {})
    if "visual" in signals:
        signals, text = _of_columns(signals, text, n)
    given, axes = _signals(signals, n, frames)
    if text is not None:
        given |= {"text": text[None], "text_mask": torch.ones(1, len(text), dtype=torch.bool, device=text.device)}
        axes |= Text().axes
    facts = _facts(flat.shape[1], given, layout)
    chosen = chosen.settle(facts)
    chosen.check(facts)
    steps = steps_of(chosen, facts, idle=True)
    if not 0 <= stage < len(steps):
        raise ValueError(f"stage={shown(stage)}: {chosen.name} has {len(steps)}, counted from 0")
    step = steps[stage]
    for signal in step.stage.needs:
        if signal.key not in given and (made := signal.bare(flat[None], given)) is not None:
            given[signal.key] = made
    axes |= {name: axis for name, axis in step.axes.items() if name in given}
    if missing := [signal.key for signal in step.stage.needs if signal.key not in given]:
        have = ", ".join(given) or "none"
        raise ValueError(f"{chosen.name} needs the signals {', '.join(missing)} at {step.stage.at}; given: {have}")
    tokens = VisualTokens(flat[None], (layout,), (0,), given, axes, samples=(0,))
    budget = None
    if isinstance(keep, int) and step.counts(tokens.layouts, tokens.given, tokens.counts) is not None:
        budget = (count(keep, n),)
    kept = step.reduce(tokens, budget, in_order=not keeps_all(step.method))
    index = kept.mask[0].nonzero()[:, 0]
    order = None if kept.order is None else kept.order[0, : kept.chosen[0]]
    values = None
    if kept.features is not None and kept.written is not None:
        values = torch.where(kept.written[0, :, None], kept.features[0].to(flat.dtype), flat)[index]
    return Selection(index, order if order is not None and len(order) == len(index) else None, values)


def _method(method: str | Method, keep: Keep | None, options: Mapping[str, Any]) -> Method:
    if isinstance(method, str):
        return make_method(method, keep=0.25 if keep is None else keep, **options)
    if not isinstance(method, Method):
        raise TypeError(f"method={shown(method)} is neither a name nor a vtc.Method")
    if options:
        raise TypeError(f"options ({', '.join(options)}) go with a method's name; an object carries its own")
    return method if keep is None else replace(method, keep=keep)


def _layout(n: int, frames: int | None) -> Layout:
    if frames is None:
        return Layout.plain(n)
    each = n // frames
    return Layout(n, tuple(Segment("frame", f * each, each) for f in range(frames)))


def _of_columns(signals: Mapping[str, Tensor], text: Tensor | None, n: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Signals of all columns of a prompt, cut into those of its visual tokens and of the text behind them."""
    visual = signals["visual"]
    if visual.dtype != torch.bool or visual.dim() != 1 or int(visual.sum()) != n:
        raise ValueError(f"visual {tuple(visual.shape)}, {visual.dtype}, must be bool [L], True at the {n} features")
    own, others = visual.nonzero()[:, 0], (~visual).nonzero()[:, 0]
    if text is not None and len(text) != len(others):
        raise ValueError(f"text has {len(text)} rows; visual is False at {len(others)} of its {len(visual)} columns")
    behind = others > own[-1]
    found = {"columns": own, "text_columns": others[behind]}
    for name, signal in signals.items():
        if name != "visual" and signal.dim() and len(signal) == len(visual):
            found |= {name: signal[own], f"text_{name}": signal[others[behind]]}
        elif name != "visual":
            found[name] = signal
    return found, None if text is None else text[behind]


def _signals(
    signals: Mapping[str, Tensor], n: int, frames: int | None
) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """As a batch of one image, and where the axis of the tokens is."""
    found: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    for name, signal in signals.items():
        if frames is not None and signal.dim() > 1 and signal.shape[0] == frames and signal.shape[:2].numel() == n:
            signal = signal.flatten(0, 1)
        found[name] = signal[None]
        if signal.dim() == 0 or signal.shape[0] != n:
            axes[name] = signal.dim() if signal.dim() and signal.shape[-1] == n else None
    return found, axes


def _facts(width: int, signals: Mapping[str, Tensor], layout: Layout) -> ModelFacts:
    kinds = frozenset(kind for kind in (signal.kind for signal in TOWER_SIGNALS) if kind in signals)
    thumbnail = bool(layout.of_kind("thumbnail"))
    bare = replace(ANY_MODEL, model_type="bare tensors", width=width, signals=kinds, has_thumbnail=thumbnail)
    return replace(bare, matryoshka=True)  # whose tensors they are is the caller's word
