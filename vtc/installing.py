"""Hooks and wrapped methods: put on one model, each with its way back written down first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

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
from vtc.dialect.modules import encoder_name, encoder_of
from vtc.engine.compiled import between_graphs, saying_prepared
from vtc.engine.encode import listening
from vtc.engine.generation import never_compiled, no_continuous_batching, prefilling, preparing, pruning_labels
from vtc.engine.opening import Opening
from vtc.engine.recorders import recorders
from vtc.engine.unread import unread_hooks
from vtc.handle import HANDLE, ClassifierPatch, Patch
from vtc.models.base import MODALITIES


def install(handle: Patch) -> None:
    """Put all hooks of a handle on its model."""
    stage, undo = handle.stage, handle.undo
    adapter, parts = stage.adapter, stage.parts
    compilers.watch_hooks()
    compilers.forget(parts.root)
    undo.append(functools.partial(compilers.forget, parts.root))  # it runs last, when all hooks are gone
    for module in {parts.root, parts.base}:  # the base model too, so that it cannot be patched once more by itself
        _set(undo, module, HANDLE, handle)
    # in front: user hooks then see the pruned call, as they would see a shorter prompt
    opening = Opening(stage)
    if parts.root is not parts.base:
        _hook(undo, parts.root, opening.before_root, before=True, first=True)
    # base and decoder may be one module: what is put in front last runs first
    _hook(undo, parts.decoder, stage.before_decoder, before=True, first=True)
    _hook(undo, parts.base, opening.before_base, before=True, first=True)
    _hook(undo, parts.decoder, stage.after_decoder)
    _hook(undo, parts.base, opening.after_base)
    _hook(undo, parts.root, opening.after_root, always=True)
    for layer, hook in zip(parts.layers, stage.layer_hooks(), strict=False):
        _hook(undo, layer, hook, before=True, first=True)
    for module, hook, before in stage.layers.hooks():
        _hook(undo, module, hook, before=before, each_step=True)
    calibrator = stage.calibrator
    for layer, hook in () if calibrator is None else calibrator.hooks():
        _hook(undo, layer, hook, before=True, each_step=True)
    heard = recorders(adapter, parts, stage.chooser.overheard)
    for recorder in heard:
        _hook(undo, recorder.module, recorder, before=recorder.signal.reads == "input", each_step=True)
    for module, hook, before in (*stage.tower.hooks(), *unread_hooks(adapter, parts, heard)):
        _hook(undo, module, hook, before=before, each_step=True)
    for modality in MODALITIES:
        if (encode := encoder_of(parts.base, modality)) is not None:
            wrapped = listening(adapter, parts, modality, encode, stage.memory)
            _set(undo, parts.base, encoder_name(modality), _while_active(handle, encode, wrapped))
    for owner, name, wrap in adapter.around(stage):
        found = getattr(owner, name)
        _set(undo, owner, name, _while_active(handle, found, wrap(found)))
    for owner, method in wrapped_methods(parts.root, parts.decoder, bool(stage.layers.steps), calibrator is not None):
        found = method.find(owner)
        name = LOSS_SLOT if method is LOSS else method.name
        _set(undo, owner, name, _while_active(handle, found, _wrapper(handle, method)(found)))


def install_alone(handle: ClassifierPatch) -> None:
    """Put all hooks of a handle on its image classifier."""
    stages, undo = handle.alone, handle.undo
    parts = stages.parts
    compilers.watch_hooks()
    compilers.forget(parts.root)
    undo.append(functools.partial(compilers.forget, parts.root))
    for module in {parts.root, parts.base}:
        _set(undo, module, HANDLE, handle)
    for recorder in recorders(stages.adapter, parts, stages.signals, ("image",)):
        _hook(undo, recorder.module, recorder, before=recorder.signal.reads == "input", each_step=True)
    for module, hook, before in stages.hooks():
        _hook(undo, module, hook, before=before, each_step=True)
    forward = parts.base.forward
    _set(undo, parts.base, "forward", _while_active(handle, forward, stages.recording(forward)))


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
    wrappers: dict[WrappedMethod, Callable[..., Any]] = {
        LOSS: lambda found: pruning_labels(found, stage.parts),
        COMPILED: saying_prepared,
        PREPARE: lambda found: preparing(found, handle.config.positions),
        PREFILL: lambda found: prefilling(found, placeholders, handle.later_turn),
        MAY_COMPILE: lambda found: never_compiled,
        PROCESS_DEEPSTACK: lambda found: between_graphs(stage.layers.deepstack(found)),
    }
    return wrappers[method]


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
