"""``vtc.patch``: install the engine on one model, and take it off without a trace."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtc.binding import bind, bind_classifier, parse_request
from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.engine.alone import AloneStages
from vtc.engine.entry import EntryStage
from vtc.handle import ClassifierPatch, Patch, patch_of
from vtc.installing import install, install_alone
from vtc.methods import Method
from vtc.models import resolve
from vtc.models.classifiers import resolve_classifier
from vtc.worth.judge import Worth


def patch(
    model: nn.Module,
    method: str | Method | CompressionConfig,
    *,
    keep: Keep | None = None,
    positions: str | None = None,
    calibration: str | None = None,
    when: str | None = None,
    **options: Any,
) -> Patch:
    """Make a vision-language model drop visual tokens. ``model.generate()`` and ``model()`` are called as before.

    Args:
        model: a transformers model for image-text-to-text (see :func:`vtc.list_models`), or an image classifier such
            as ViT, DeiT or DINOv2, for methods inside the vision tower. Only this instance changes; no weight, class
            or attention implementation does.
        method: a name (see :func:`vtc.list_methods`), a method object such as ``vtc.DivPrune(keep=64)``, or a
            :class:`vtc.CompressionConfig`.
        keep: with a name only: float in (0, 1], the fraction kept, or int >= 1, the tokens kept per image.
        positions: ``"original"`` (default, but for a method that needs the other): kept tokens keep their position ids;
            ``"compact"``: they are renumbered without gaps, as the code of some papers does (not for models with 3-D
            positions).
        calibration: what is added to the logits of attention once tokens left, in every layer behind them and in every
            step, with attn_implementation ``"sdpa"`` or ``"eager"``. ``None`` (default): nothing. ``"size"``: log(s) on
            places that stand for s tokens, for methods that merge. ``"size+distance"``: also log(2 - D), D the mean
            cosine by which the rotary embedding turns a key against the query, which lifts far keys (RESTORE).
            ``"size+visual-distance"``: that only on keys of images. Published with original positions.
        when: ``"always"`` (default): every prompt is pruned. ``"worthwhile"``: a batch of prompts is left alone, to the
            bit, where choosing and shortening would take longer than the language model's prefill would gain: with few
            tokens, or few prompts on a fast device. So one prompt may be pruned in a large batch and left alone by
            itself; ``p.report()`` says why. It is decided by arithmetic (:mod:`vtc.costs`) on the pace of this device
            and of the method, which are measured once, in a second at most, and kept on disk. What decode steps and
            memory gain is not counted.
        options: with a name only: further options of the method, e.g. ``variant="k_center"``.

    Returns:
        The handle: ``p.last_keep``, ``p.unpatch()``; usable in a ``with`` statement.

    Raises:
        ValueError: unknown method, bad keep or positions, a signal the model lacks, a model patched already;
            ``when="worthwhile"`` where it cannot be told ahead: patches leave inside the vision tower, nothing bounds
            how many tokens stay, or the model is compiled.
        UnsupportedModelError: the model cannot be pruned. It is a ValueError; nothing was touched.
        TypeError: options that the method does not have, or given beside an object that carries its own.
    """
    config, chosen = parse_request(method, keep, positions, options, calibration, when)
    handle: Patch
    if (found := resolve_classifier(model)) is not None:
        chosen = bind_classifier(*found, chosen, config)
        stages = AloneStages(*found, chosen, found[0].facts(found[1]))
        handle = ClassifierPatch(found[1].root, config, stages)
    else:
        adapter, parts = resolve(model)
        chosen = bind(adapter, parts, chosen, config.positions, config.calibration, config.when)
        judge = Worth.of(adapter, parts, chosen) if config.when == "worthwhile" else None
        stage = EntryStage(adapter, parts, chosen, config.positions, config.calibration, judge)
        handle = Patch(parts.root, config, stage)
    try:
        install_alone(handle) if isinstance(handle, ClassifierPatch) else install(handle)
    except BaseException:
        if handle.active:
            handle.unpatch()
        raise
    return handle


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch` on ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    if (handle := patch_of(model)) is None:
        raise ValueError(f"this {type(model).__name__} is not patched: nothing to undo")
    handle.unpatch()
