"""``vtc.patch``: install the engine on one model, and take it off without a trace."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.costs import Decoder
from vtc.dialect import compilers
from vtc.dialect.generation import (
    COMPILED,
    LOSS,
    LOSS_SLOT,
    MAY_COMPILE,
    PAGED,
    PREFILL,
    PREPARE,
    PROCESS_DEEPSTACK,
    WrappedMethod,
    wrapped_methods,
)
from vtc.dialect.modules import encoder_name, encoder_of, without_adapters
from vtc.dialect.releases import warn_if_untested
from vtc.engine.choosing import Chooser, needs_of
from vtc.engine.compiled import between_graphs, saying_prepared
from vtc.engine.encode import listening
from vtc.engine.entry import EntryStage
from vtc.engine.generation import never_compiled, no_continuous_batching, prefilling, preparing, pruning_labels
from vtc.engine.opening import Opening
from vtc.engine.probe import unfit_for, unfit_tower
from vtc.engine.recorders import recorders
from vtc.methods import Method, make_method
from vtc.methods.registry import blind_methods
from vtc.methods.stages import Step, steps_of
from vtc.models import Adapter, Parts, UnsupportedModelError, resolve
from vtc.models.base import MODALITIES
from vtc.places import Projector, Tower
from vtc.report import Report
from vtc.tokens import Layout
from vtc.values import shown

_HANDLE = "_vtc_patch"


class Patch:
    """A patched model's handle; also a context manager that unpatches on exit.

    Attributes:
        model: the model as transformers made it (inside a PEFT wrapper, the wrapped one).
        config: what was asked for; ``config.save_pretrained(folder)`` writes it beside a model.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, stage: EntryStage) -> None:
        self.model, self.config = model, config
        self.stage = stage
        self._undo: list[Callable[[], None]] = []
        self._warned = False

    @property
    def method(self) -> Method:
        """The method object that selects."""
        return self.stage.method

    @property
    def last_keep(self) -> list[list[Tensor]] | None:
        """What stayed in the last prefill: a list over samples of lists over images of LongTensor [k] (on the host).

        Each holds the kept indices among that image's visual tokens (newlines counted), ascending; beams count as
        samples. For a method with stages inside the language model these are the survivors of the last one that left
        any: where everything visual went (ToDRE's second), only :attr:`last_stages` shows it. ``None`` before the
        first prompt with an image. Reading it waits for the device.
        """
        if self.stage.last is None:
            return None
        every = [kept for _, kept in self.stage.last.kept()]
        found, steps = every[-1], zip(self.stage.layers.steps, every, every[1:], strict=False)
        for had, left in [(had, left) for step, had, left in steps if step.stage.all_or_nothing][::-1]:
            found = [row if any(map(len, b)) else a for row, a, b in zip(found, had, left, strict=True)]
        return found

    @property
    def last_order(self) -> list[list[Tensor | None]] | None:
        """What the method chose before the language model in the last prefill, in the order in which it did.

        As :attr:`last_keep`: LongTensor on the host, a permutation of what the first entry of :attr:`last_stages` has,
        without newline tokens that stayed unasked (``newlines="keep"``). ``None`` for an image where there is no such
        order: nothing was dropped, budgets were shared out over parts of it, or a mask hides some of it.
        """
        if (last := self.stage.last) is None:
            return None
        samples: list[list[Tensor | None]] = [[] for _ in last.lengths]
        kept = last.kept()[0][1]
        for g, image in enumerate(last.plan.images):
            left = kept[image.row][len(samples[image.row])]
            order = None if last.plan.order is None else last.plan.order[g].cpu()
            unasked = set(image.layout.newlines()) if self.method.newlines == "keep" else set()
            whole = order is not None and set(order.tolist()) == set(left.tolist()) - unasked
            samples[image.row].append(order if whole else None)
        return samples

    @property
    def last_stages(self) -> list[tuple[int, list[list[Tensor]]]]:
        """What was still there along the last prefill: (layers run before, kept indices as in :attr:`last_keep`).

        The first entry is what entered the language model, (0, ...); one more for each stage inside it.
        """
        return [] if self.stage.last is None else self.stage.last.kept()

    def later_turn(self) -> None:
        """Warn, once, that what the first question dropped is missing for the next one."""
        if not self.method.query_aware or self._warned or self.stage.last is None:
            return
        self._warned = True
        given = sum(self.stage.last.plan.given)
        left = sum(len(kept) for images in self.last_stages[-1][1] for kept in images)
        warnings.warn(
            f"{self.method.name} chose by the earlier question: {given - left} of {given} visual tokens are gone from "
            "this cache, and the new question may be about them. Start a new cache, or use a method that is blind to "
            "the question.",
            stacklevel=4,
        )

    def report(self) -> Report:
        """Tokens per layer, their average, and the language model's FLOPs for the last prompt with images.

        Raises:
            ValueError: there was none yet.
        """
        if (last := self.stage.last) is None:
            raise ValueError("nothing to report: run a prompt with an image through the patched model first")
        given = [0] * len(last.lengths)
        for image, seen in zip(last.plan.images, last.plan.given, strict=True):
            given[image.row] += seen
        kept = last.kept()
        stages = [(after, [sum(map(len, images)) for images in samples]) for after, samples in kept]
        report = Report.of(Decoder.of(self.stage.parts.decoder), last.lengths, given, stages)
        return dataclasses.replace(report, layouts=self.last_layouts or [], stages=kept)

    @property
    def last_layouts(self) -> list[list[Layout]] | None:
        """The structure of the tokens that the indices in :attr:`last_keep` count: grids, crops, frames, newlines."""
        if self.stage.last is None:
            return None
        samples: list[list[Layout]] = [[] for _ in self.stage.last.lengths]
        for image in self.stage.last.plan.images:
            samples[image.row].append(image.layout)
        return samples

    @property
    def last_columns(self) -> list[Tensor] | None:
        """Columns of the last prompt that reached the end of the language model: a LongTensor per sample, ascending.

        Logits and labels of a plain forward pass line up with these columns, not with the prompt's.
        """
        if (last := self.stage.last) is None or last.compaction is None:
            return None
        if last.history:
            end = last.history[-1]
            return [index[valid] for index, valid in zip(end.index.cpu(), end.valid.cpu(), strict=True)]
        return [row.nonzero()[:, 0] for row in last.compaction.keep.cpu()]

    @property
    def active(self) -> bool:
        """Whether the model is still patched."""
        return bool(self._undo)

    def unpatch(self) -> None:
        """Restore the model exactly.

        Raises:
            ValueError: it was unpatched already.
        """
        if not self._undo:
            raise ValueError(f"this {type(self.model).__name__} is not patched: nothing to undo")
        while self._undo:  # interrupted, it goes on where it was when it is called again
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"<vtc.Patch {self.method} positions={self.config.positions!r} on {type(self.model).__name__}, {state}>"

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a patched model cannot be copied: its hooks belong to the original. vtc.unpatch it first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: its hooks belong to this process. vtc.unpatch it first, or save its "
            "state_dict() or save_pretrained(), which a patch leaves as they are"
        )


def patch(
    model: nn.Module,
    method: str | Method | CompressionConfig,
    *,
    keep: Keep | None = None,
    positions: str | None = None,
    **options: Any,
) -> Patch:
    """Make a vision-language model drop visual tokens. ``model.generate()`` and ``model()`` are called as before.

    Args:
        model: a transformers model for image-text-to-text (see :func:`vtc.list_models`). Only this instance changes;
            no weight, class or attention implementation does.
        method: a name (see :func:`vtc.list_methods`), a method object such as ``vtc.DivPrune(keep=64)``, or a
            :class:`vtc.CompressionConfig`.
        keep: with a name only: float in (0, 1], the fraction kept, or int >= 1, the tokens kept per image.
        positions: ``"original"`` (default): kept tokens keep their position ids; ``"compact"``: they are renumbered
            without gaps, as the code of some papers does (not for models with 3-D positions).
        options: with a name only: further options of the method, e.g. ``variant="k_center"``.

    Returns:
        The handle: ``p.last_keep``, ``p.unpatch()``; usable in a ``with`` statement.

    Raises:
        ValueError: unknown method, bad keep or positions, a signal the model lacks, a model patched already.
        UnsupportedModelError: the model cannot be pruned. It is a ValueError; nothing was touched.
        TypeError: options that the method does not have, or given beside an object that carries its own.
    """
    config, chosen = requested(method, keep, positions, options)
    adapter, parts = resolve(model)
    chosen = fitted(adapter, parts, chosen, config.positions)
    handle = Patch(parts.root, config, EntryStage(adapter, parts, chosen, config.positions))
    try:
        _install(handle)
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


def patch_of(model: nn.Module) -> Patch | None:
    """The handle of a patched model, else ``None``."""
    return getattr(without_adapters(model), "__dict__", {}).get(_HANDLE)


def requested(
    method: str | Method | CompressionConfig, keep: Keep | None, positions: str | None, options: dict[str, Any]
) -> tuple[CompressionConfig, Method]:
    """What the arguments of :func:`patch` ask for."""
    if isinstance(method, str):
        given = options if keep is None else {"keep": keep, **options}
        method = make_method(method, **given)
    elif not isinstance(method, (Method, CompressionConfig)):
        raise TypeError(f"method={shown(method)} is neither a name, a vtc.Method nor a vtc.CompressionConfig")
    elif keep is not None or options:
        raise TypeError(
            f"keep and options go with a method's name; {type(method).__name__} carries its own "
            f"(given: {', '.join([*(['keep'] if keep is not None else []), *options])})"
        )
    if isinstance(method, CompressionConfig):
        method, positions = method.build(), method.positions if positions is None else positions
    return CompressionConfig.of(method, "original" if positions is None else positions), method


def fitted(adapter: Adapter, parts: Parts, method: Method, positions: str) -> Method:
    """The method, settled for this model; all that can be refused is refused here, before anything is touched."""
    name = type(parts.root).__name__
    if (handle := patch_of(parts.root) or patch_of(parts.base)) is not None:
        raise ValueError(f"this {name} is patched already, with {handle.method}; vtc.unpatch(model) first")
    facts = adapter.facts(parts)
    method = method.settle(facts)
    method.check(facts)
    steps = steps_of(method, facts)
    for step in steps:
        refuse_missing(adapter, parts, step)
    inside = [step for step in steps if not step.stage.at.before_the_model]
    if (reason := unfit_tower(adapter, parts, Chooser(adapter, parts, method, facts).recorded)) is not None:
        work = method.remedy or "methods that need no such signal: " + ", ".join(blind_methods())
        raise UnsupportedModelError(f"method {method.name!r} reads the vision tower, and {reason}. What works: {work}")
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
    wrapped_methods(parts.root, parts.decoder, bool(inside))
    warn_if_untested()
    return method


def refuse_missing(adapter: Adapter, parts: Parts, step: Step) -> None:
    """Refuse a step whose place or signals this model does not have.

    Raises:
        ValueError: the message names the signals, the vision tower and what would work.
    """
    name, at = type(parts.root).__name__, step.stage.at
    if isinstance(at, Tower):
        raise ValueError(
            f"{step.method.name!r} acts inside the vision tower ({at}), which the engine does not serve yet"
        )
    missing = [signal.key for signal in needs_of(step) if not adapter.gives(parts, signal)]
    if not missing:
        return
    method, work = step.method, step.method.remedy
    what = (
        f"acts in front of the projector ({at})"
        if isinstance(at, Projector)
        else "needs " + ", ".join(map(repr, sorted(missing)))
    )
    raise ValueError(
        f"method {method.name!r} {what}, which this {name} cannot give (its vision tower is {parts.vision_tower}). "
        f"What would work: {work or 'methods that need no such signal: ' + ', '.join(blind_methods())}"
    )


def _install(handle: Patch) -> None:
    stage, undo = handle.stage, handle._undo
    adapter, parts = stage.adapter, stage.parts
    compilers.watch_hooks()
    compilers.forget(parts.root)
    undo.append(functools.partial(compilers.forget, parts.root))  # it runs last, when all hooks are gone
    for module in {parts.root, parts.base}:  # the base model too, so that it cannot be patched once more by itself
        _set(undo, module, _HANDLE, handle)
    # in front: user hooks then see the pruned call, as they would see a shorter prompt
    opening = Opening(stage)
    if parts.root is not parts.base:
        _hook(undo, parts.root, opening.before_root, before=True, first=True)
    _hook(undo, parts.base, opening.before_base, before=True, first=True)
    _hook(undo, parts.base, opening.after_base)
    _hook(undo, parts.decoder, stage.before_decoder, before=True, first=True)
    _hook(undo, parts.decoder, stage.after_decoder)
    _hook(undo, parts.root, opening.after_root, always=True)
    for layer, hook in zip(parts.layers, stage.layer_hooks(), strict=False):
        _hook(undo, layer, hook, before=True, first=True)
    for module, hook, before in stage.layers.hooks():
        _hook(undo, module, hook, before=before, each_step=True)
    for recorder in recorders(adapter, parts, stage.chooser.recorded):
        _hook(undo, recorder.module, recorder, before=recorder.signal.reads == "input", each_step=True)
    for modality in MODALITIES:
        if (encode := encoder_of(parts.base, modality)) is not None:
            wrapped = listening(adapter, parts, modality, encode, stage.memory)
            _set(undo, parts.base, encoder_name(modality), _while_active(handle, encode, wrapped))
    for owner, method in wrapped_methods(parts.root, parts.decoder, bool(stage.layers.steps)):
        found = method.find(owner)
        name = LOSS_SLOT if method is LOSS else method.name
        _set(undo, owner, name, _while_active(handle, found, _wrapper(handle, method)(found)))


def _while_active(handle: Patch, original: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapped method, and the original again once the patch is undone: somebody may hold it, or have wrapped it."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (wrapped if handle.active else original)(*args, **kwargs)

    compilers.never_alone(call)
    return call


def _wrapper(handle: Patch, method: WrappedMethod) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What goes around one of the methods that are no modules."""
    stage = handle.stage
    placeholders = frozenset(stage.parts.placeholders.values())
    if method in PAGED:
        return lambda found: no_continuous_batching
    return {
        LOSS: lambda found: pruning_labels(found, stage.parts),
        COMPILED: saying_prepared,
        PREPARE: lambda found: preparing(found, handle.config.positions),
        PREFILL: lambda found: prefilling(found, placeholders, handle.later_turn),
        MAY_COMPILE: lambda found: never_compiled,
        PROCESS_DEEPSTACK: lambda found: between_graphs(stage.layers.deepstack(found)),
    }[method]


def _set(undo: list[Callable[[], None]], owner: nn.Module, name: str, value: Any) -> None:
    """Set an instance attribute that hides the class's. The way back is written down first: anything may interrupt."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)

    def restore() -> None:
        if owner.__dict__.get(name) is not value:  # the user's own by now, or restored already
            return
        if had:
            owner.__dict__[name] = before
        else:
            owner.__dict__.pop(name, None)

    undo.append(restore)
    owner.__dict__[name] = value


def _hook(
    undo: list[Callable[[], None]],
    module: nn.Module,
    hook: Callable[..., Any],
    *,
    before: bool = False,
    first: bool = False,
    always: bool = False,
    each_step: bool = False,
) -> None:
    """Register a forward hook that gets keywords too. How to undo it is written down first: it is found by itself."""
    hook = between_graphs(hook, steps_aside=not each_step)
    kind = "_forward_pre_hooks" if before else "_forward_hooks"
    registers = [
        getattr(module, name) for name in (kind, f"{kind}_with_kwargs", f"{kind}_always_called") if name in vars(module)
    ]

    def remove() -> None:
        for key in [key for key, other in registers[0].items() if other is hook]:
            for register in reversed(registers):  # the one that finds it last
                register.pop(key, None)

    undo.append(remove)
    if before:
        module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)
    else:
        module.register_forward_hook(hook, always_call=always, with_kwargs=True)
