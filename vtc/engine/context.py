"""What a thread is doing with patched models: one object in one context variable, so that two threads never meet here.

What outlives a call stays with what it is about: what a cache lacks on the cache (:mod:`vtc.engine.lengths`), what was
recorded of an encoder's features on its output (:mod:`vtc.engine.encode`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.compaction import Columns, Compaction
from vtc.engine.inside import LayerState
from vtc.engine.keys import Keys
from vtc.engine.locate import Encoded
from vtc.engine.passage import Passage
from vtc.engine.row import Row
from vtc.signals import TowerSignal


@dataclass
class Call:
    """One call of a patched model.

    Attributes:
        owner: whose call it is: two patched models may share a decoder or a tower.
        wanted: columns of the prompt whose logits the caller asked for, if not all or the last one.
        placeholders: by modality, bool [B, N] on the host; empty in decode steps.
        mask: the 2-D padding mask over physical slots and new columns, or ``None`` (nothing is padding).
        encoded: by modality, what the encoders produced for this call.
        compaction: what the entry stage did, once it ran.
        lengths: new columns of each row that are not padding (host integers), where there is a mask.
        pad_right: padding stands at the end of rows, as in training.
        hides: the mask hides image tokens too.
        logical: the 2-D padding mask over logical columns, as the caller gave it.
        prepared: the mask that reaches the decoder says which columns see which, and is to be obeyed.
        inside: what is in the sequence between the layers of a prefill, where a method has stages there.
        later_masks: masks made in a decode step, by (first layer of the stage, layer type).
        adopted: the cache that was prepared for a prompt which lost tokens, until it was checked.
        stored: how long its layers must be afterwards, by the first layer of each stage.
        featureless: the class of what an encoder returned, where no features of single images were found in it.
        asked: what the root was called with, by name, where its head counts columns of the prompt.
        shifted: position ids that are compact already, since ``generate`` prepared this call.
        entering: the columns that the entry stage left, where attention is calibrated.
        biased: masks with a bias made in this call, beside those they were made of, by (stages passed, layer type).
    """

    owner: Any
    wanted: Any = None
    placeholders: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    compaction: Compaction | None = None
    lengths: list[int] | None = None
    pad_right: bool = False
    hides: bool = False
    logical: Tensor | None = None
    prepared: bool = False
    inside: LayerState | None = None
    later_masks: dict[tuple[int, str | None], Any] = field(default_factory=dict)
    adopted: Any = None
    stored: dict[int, int] = field(default_factory=dict)
    featureless: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    shifted: Tensor | None = None
    entering: Keys | None = None
    biased: dict[tuple[int, str | None], tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def left(self) -> Columns | None:
        """The columns of a pruned prompt that reach the end of the language model, ``None`` if nothing left."""
        passed = [] if self.inside is None else self.inside.history
        return passed[-1] if passed else self.compaction

    def see_padding(self, width: int) -> None:
        """Read from ``mask`` how many of the last ``width`` columns are real: a host sync."""
        if self.placeholders and self.mask is not None:
            real = self.mask[:, -width:].bool().cpu()
            visual = torch.stack([*self.placeholders.values()]).any(0)
            self.lengths = real.sum(1).tolist()
            self.hides = bool((visual & ~real).any())
            self.pad_right = not bool((real | visual)[:, -1].all())  # a hidden image is no padding


@dataclass(frozen=True)
class Prepared:
    """What ``generate`` made for its next step on a cache of fixed size, whose mask is 4-D by then.

    Attributes:
        logical: the 2-D mask behind it, as the caller gave it (``None``: nothing is padding).
        physical: the same over physical slots.
        cache: whose step it is.
        shifted: the position ids, if they were made compact.
    """

    logical: Tensor | None
    physical: Tensor | None
    cache: Any
    shifted: Tensor | None


class Recording(dict[TowerSignal, list[Tensor]]):
    """What was recorded while an encoder ran: by signal, [pictures, patches, ...] for each call of the tower.

    Attributes:
        owner: whose.
        modality: what is encoded, ``image`` or ``video``.
        arguments: what the encoder is called with, by name.
        passage: the run of the tower that is under way, if patches have left in it.
        passed: those that are over, of towers with a row for each picture.
        left: patches that left of each picture and are not restored (host integers).
    """

    def __init__(self, owner: Any, modality: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.owner, self.modality, self.arguments = owner, modality, arguments
        self.passage: Passage | Row | None = None
        self.passed: list[Passage] = []
        self.left: list[int] = []


class Current:
    """What this thread is doing. It is replaced, never changed: a copied context must not see what comes later.

    Attributes:
        call: the call of a patched model that is running.
        prepared: what ``generate`` made for the next call, until that begins.
        recording: what is recorded of a vision tower, while an encoder runs.
        bypassed: models run as if they were not patched.
    """

    call: Call | None = None
    prepared: Prepared | None = None
    recording: Recording | None = None
    bypassed: bool = False


_CURRENT: ContextVar[Current] = ContextVar("vtc", default=Current())  # noqa: B039 (nobody changes it)


def current() -> Current:
    """What this thread is doing."""
    return _CURRENT.get()


def change(**fields: Any) -> None:
    """From now on, in this thread, these fields of :class:`Current` are others."""
    later = Current()  # by hand: dataclasses.replace takes ten times as long, and decode steps come through here
    vars(later).update(vars(_CURRENT.get()), **fields)
    _CURRENT.set(later)


@contextmanager
def during(**fields: Any) -> Iterator[None]:
    """For a while they are others; afterwards these fields, and no others, are what they were."""
    now = current()
    before = {name: getattr(now, name) for name in fields}
    change(**fields)
    try:
        yield
    finally:
        change(**before)


def bypassed() -> AbstractContextManager[None]:
    """Run the model as if it were not patched (in this thread)."""
    return during(bypassed=True)


def running_call(owner: Any) -> Call | None:
    """The call of ``owner`` that is running in this thread; ``None`` also where the engine should stand aside."""
    now = _CURRENT.get()
    running = now.call
    return None if running is None or running.owner is not owner or now.bypassed else running


def recording_of(owner: Any) -> Recording | None:
    """Where recorders of ``owner`` put what they make, or ``None`` when it did not ask."""
    found = current().recording
    return found if found is not None and found.owner is owner else None


def is_running(module: nn.Module) -> bool:
    """Whether a module is being called in this thread.

    Hooks that close a frame do not run after a KeyboardInterrupt; the stack knows.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        if code.co_name.startswith("torch_dynamo_resume"):  # compiled: its locals tell nothing
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
