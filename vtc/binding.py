"""From what a caller asks for to a method that fits one model: all that can be refused is refused here."""

from __future__ import annotations

import warnings
from typing import Any

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.dialect import compilers
from vtc.dialect.generation import wrapped_methods
from vtc.dialect.releases import warn_if_untested
from vtc.engine.calibration import Calibrator
from vtc.engine.choosing import Chooser, needs_of
from vtc.engine.patches import instead_of_holes, unfit_for_masks
from vtc.engine.probe import unfit_for, unfit_for_bias, unfit_tower
from vtc.handle import patch_of
from vtc.methods import Method, make_method
from vtc.methods.registry import blind_methods
from vtc.methods.stages import Step, steps_of
from vtc.models import Adapter, Parts, UnsupportedModelError
from vtc.models.base import MODALITIES
from vtc.places import Projector, Tower
from vtc.signals import DecoderSignal, Pixels, TowerSignal
from vtc.tokens import Layout
from vtc.values import shown

SOME_TOKENS = 1024
"""Of an image that methods are asked about before any is seen."""


def parse_request(
    method: str | Method | CompressionConfig,
    keep: Keep | None,
    positions: str | None,
    options: dict[str, Any],
    calibration: str | None = None,
    when: str | None = None,
) -> tuple[CompressionConfig, Method]:
    """What the arguments of :func:`vtc.patch` ask for."""
    if isinstance(method, str):
        chosen = make_method(method, **(options if keep is None else {"keep": keep, **options}))
    elif not isinstance(method, (Method, CompressionConfig)):
        raise TypeError(f"method={shown(method)} is neither a name, a vtc.Method nor a vtc.CompressionConfig")
    elif keep is not None or options:
        raise TypeError(
            f"keep and options go with a method's name; {type(method).__name__} carries its own "
            f"(given: {', '.join([*(['keep'] if keep is not None else []), *options])})"
        )
    elif isinstance(method, CompressionConfig):
        chosen = method.build()
        positions = method.positions if positions is None else positions
        calibration = method.calibration if calibration is None else calibration
        when = method.when if when is None else when
    else:
        chosen = method
    when = "always" if when is None else when
    return CompressionConfig.of(chosen, positions, calibration, when), chosen  # type: ignore[arg-type]


def bind(
    adapter: Adapter,
    parts: Parts,
    method: Method,
    positions: str,
    calibration: str | None = None,
    when: str = "always",
) -> Method:
    """The method, settled for this model; all that can be refused is refused here, before anything is touched."""
    name = type(parts.root).__name__
    _check_not_patched(parts)
    facts = adapter.facts(parts)
    method = method.settle(facts)
    method.check(facts)
    chooser = Chooser(adapter, parts, method, facts)
    inside = chooser.inside
    for step in (*chooser.tower, *chooser.steps, *inside):
        _refuse_missing(adapter, parts, step)
    if (reason := unfit_tower(adapter, parts, chooser.overheard)) is not None:
        raise UnsupportedModelError(
            f"method {method.name!r} reads the vision tower, and {reason}. What works: {_remedy(method)}"
        )
    if positions == "compact" and parts.rotates_in_3d:
        raise ValueError(
            f"positions='compact' has no meaning for the (time, height, width) positions of this {name}; "
            "use positions='original'"
        )
    if positions == "compact" and inside:
        raise ValueError(
            f"positions='compact' would give every layer of {method.name!r} positions of its own, and keys are rotated "
            "by then; use positions='original'"
        )
    if parts.builds_masks_early and parts.attention == "flex_attention":
        raise UnsupportedModelError(
            f"this {name} builds its masks before the language model, and a flex_attention block mask cannot lose "
            "columns; load it with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    if inside and (reason := unfit_for(parts, inside)) is not None:
        raise UnsupportedModelError(
            f"{method.name!r} drops tokens between the layers of the language model, and {reason}. Methods that drop "
            "them before it work, e.g. 'divprune'"
        )
    if calibration is not None:
        _check_calibration(parts, chooser, calibration, positions)
    if when == "worthwhile":
        _check_worthwhile(parts, chooser)
    wrapped_methods(parts.root, parts.decoder, bool(inside), calibration is not None)
    warn_if_untested()
    return method


def bind_classifier(adapter: Adapter, parts: Parts, method: Method, config: CompressionConfig) -> Method:
    """The method, settled for an image classifier.

    Raises:
        ValueError: the message says what would work.
    """
    name = type(parts.root).__name__
    _check_not_patched(parts)
    facts = adapter.facts(parts)
    method = method.settle(facts)
    method.check(facts)
    steps = steps_of(method, facts, idle=True)
    if (
        not all(isinstance(step.stage.at, Tower) for step in steps)
        or config.calibration
        or config.positions != "original"
        or config.when != "always"
    ):
        raise ValueError(
            f"{name} is an image classifier, without a language model that {shown(method)}, positions, calibration "
            "or when could act on. What would work: vtc.ZeroTPrune() or vtc.InTower(), whose patches leave inside its "
            "blocks"
        )
    for step in steps:
        _refuse_missing(adapter, parts, step)
    signals = [s for step in steps for s in step.stage.needs if isinstance(s, TowerSignal)]
    if (reason := unfit_tower(adapter, parts, signals)) is not None:
        raise UnsupportedModelError(f"method {method.name!r} reads the blocks of this {name}, and {reason}")
    warn_if_untested()
    return method


def _check_not_patched(parts: Parts) -> None:
    if (handle := patch_of(parts.root) or patch_of(parts.base)) is not None:
        raise ValueError(
            f"this {type(parts.root).__name__} is patched already, with {handle.method}; vtc.unpatch(model) first"
        )


def _check_calibration(parts: Parts, chooser: Chooser, calibration: str, positions: str) -> None:
    """Refuse a bias on attention where it would change nothing, or could not be added.

    Raises:
        ValueError: the message says what would work.
    """
    name, what, first = (
        type(parts.root).__name__,
        f"calibration={calibration!r}",
        Calibrator(parts, chooser, calibration).first,
    )
    if calibration == "size" and not chooser.method.merges:
        raise ValueError(
            f"{what} weighs places by how many tokens they stand for, and with {chooser.method.name!r} all stand for "
            "one: it would change nothing. What would work: a method that merges, e.g. 'visionzip'; or "
            "calibration='size+distance'"
        )
    if not parts.adds_masks:
        raise UnsupportedModelError(
            f"{what} adds a bias to the logits of attention, which {parts.attention!r} does not take; load this {name} "
            "with attn_implementation='sdpa' or 'eager'"
        )
    rows = [s for step in chooser.inside for s in step.stage.needs if isinstance(s, DecoderSignal) and s.needs_rows]
    if (layer := next((s.layer for s in rows if s.layer >= first), None)) is not None:
        raise ValueError(
            f"{what} changes what layer {layer} attends to, since tokens leave before it, and {chooser.method.name!r} "
            "recomputes attention there without the bias. What would work: a method that reads attention only before "
            "tokens leave, e.g. 'fastv'; or no calibration"
        )
    if (reason := unfit_for_bias(parts, range(first, len(parts.layers)), calibration != "size")) is not None:
        raise UnsupportedModelError(f"{what} adds a bias to the logits of attention, and in this {name} {reason}")
    if positions == "compact":
        warnings.warn(
            f"{what} with positions='compact': RESTORE, which published calibration, measured that it costs accuracy "
            "where positions are renumbered, and gains only where tokens keep theirs (positions='original')",
            stacklevel=4,
        )


def _check_worthwhile(parts: Parts, chooser: Chooser) -> None:
    """Refuse to decide by batch where nothing is known ahead.

    Raises:
        ValueError: the message says what would work.
    """
    what, works = "when='worthwhile'", "What would work: when='always'"
    if chooser.tower:
        raise ValueError(
            f"{what} decides when a prompt enters the language model, and {chooser.method.name!r} lets patches leave "
            f"inside the vision tower before. {works}; or a method that drops them behind it, e.g. 'divprune'"
        )
    some = (SOME_TOKENS,)
    for step in (*chooser.steps, *chooser.inside):
        if step.most((Layout.plain(*some),), some, some) is None:
            raise ValueError(
                f"{what} compares what tokens that leave would save, and nothing bounds ahead how many "
                f"{step.method.name!r} keeps. {works}; or a method whose keep does, e.g. 'divprune'"
            )
    if compilers.compiled_inside(parts.root.modules()):
        raise ValueError(
            f"{what} compares with what an uncompiled prefill takes here, and this {type(parts.root).__name__} was "
            f"compiled with torch.compile. {works}, or the model uncompiled"
        )


def _refuse_missing(adapter: Adapter, parts: Parts, step: Step) -> None:
    """Refuse a step whose place or signals this model does not have.

    Raises:
        ValueError: the message names the signals, the vision tower and what would work.
    """
    name, at = type(parts.root).__name__, step.stage.at
    if isinstance(at, Tower):
        _check_tower(adapter, parts, step, at)
    elif stuck := [s.key for s in step.stage.needs if isinstance(s, TowerSignal) and s.inside]:
        raise ValueError(
            f"method {step.method.name!r} needs {', '.join(map(repr, stuck))} at {at}, and only stages inside the "
            "vision tower can have that; ask at Tower(block)"
        )
    behind = not isinstance(at, Tower)  # pixels are known in front of the tower, and nowhere else
    needs = needs_of(step)
    missing = [s.key for s in needs if not adapter.gives(parts, s) or (behind and isinstance(s, Pixels))]
    if not missing:
        return
    method = step.method
    what = (
        f"acts in front of the projector ({at})"
        if isinstance(at, Projector)
        else "needs " + ", ".join(map(repr, sorted(missing)))
    )
    raise ValueError(
        f"method {method.name!r} {what}, which this {name} cannot give (its vision tower is {parts.vision_tower}). "
        f"What would work: {_remedy(method)}"
    )


def _check_tower(adapter: Adapter, parts: Parts, step: Step, at: Tower) -> None:
    """Refuse a stage inside the vision tower that this model has no place for.

    Raises:
        ValueError: the message says what would work.
    """
    name, method = type(parts.root).__name__, step.method
    tower, way = adapter.tower(parts.base, "image"), adapter.reduces(parts.base, "image")
    if tower is None or way is None:
        raise ValueError(
            f"{method.name!r} lets patches leave inside the vision tower, and that of this {name} "
            f"({parts.vision_tower}) is not built so that vtc could. What would work: {_remedy(method)}"
        )
    last = adapter.facts(parts).tower_depth - 1
    if at.block > last:
        raise ValueError(
            f"{method.name!r} lets patches leave before block {at.block} of the vision tower, and what the language "
            f"model sees has passed {last + 1} blocks by then: nothing would be saved. Blocks 0 to {last} work"
        )
    if way == "restore" and at.restore is False:
        raise ValueError(
            f"{method.name!r} would leave holes where this {name} makes one token of several patches; "
            + instead_of_holes(method)
        )
    towers = [t for modality in MODALITIES if (t := adapter.tower(parts.base, modality)) is not None]
    faults = (unfit_for_masks(t, block) for t in towers for block in range(at.block, last + 1) if at.proportional)
    if (fault := next(filter(None, faults), None)) is not None:
        raise ValueError(
            f"{method.name!r} adds the logarithm of how many patches a key stands for to the logits of attention in "
            f"the vision tower of this {name}, and {fault}. What would work: attn_implementation='sdpa' or 'eager'; or "
            "proportional=False"
        )
    if way == "units" and at.restore:
        raise ValueError(
            f"{method.name!r} would bring patches back behind the vision tower (restore=True), and in this {name} they "
            "leave with the token that they are made into; restore=None, or False, drops it"
        )
    if way == "units" and method.merges:
        raise ValueError(
            f"{method.name!r} merges inside the vision tower, and in this {name} a token is {tower.unit} rows there, "
            "which one new value cannot stand for. What would work: a method that only chooses, e.g. vtc.InTower()"
        )
    needs = [s for s in step.stage.needs if not isinstance(s, Pixels)]
    late = [s.key for s in needs if not isinstance(s, TowerSignal) or not 0 <= s.index(tower) < at.block]
    if late:
        raise ValueError(
            f"{method.name!r} needs {', '.join(map(repr, late))} before block {at.block} of the vision tower, where "
            "only the blocks in front of it have run"
        )


def _remedy(method: Method) -> str:
    return method.remedy or "methods that need no such signal: " + ", ".join(blind_methods())
