"""How long a prefill and a decode step take, and where the time of a prefill goes.

A prefill is cut at the places the engine hooks. Its parts add up to the time to first token (TTFT):

- *vision*: everything before the decoder is entered: vision tower, projector, text embedding, merging both.
- *select*: the hooks of the patch, wherever they are: signals, selection, shortening embeddings, positions and masks.
  Zero when unpruned. What the patched encoder call does around the tower (layouts) counts as vision.
- *prefill*: the rest: decoder layers and the head for the last position.

On a GPU times come from device events, which are read after the run; on a CPU from ``time.perf_counter``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vtc.dialect.caches import cache_in, stored_bytes
from vtc.models import resolve
from vtc.profiling.running import Inputs, forward


@dataclass(frozen=True)
class PrefillTime:
    """One measured prefill of a batch: seconds of its parts (see the module), bytes of all keys and values after it."""

    vision: float
    select: float
    prefill: float
    cache_bytes: int

    @property
    def total(self) -> float:
        """Time to first token."""
        return self.vision + self.select + self.prefill


def time_prefill(model: nn.Module, inputs: Inputs) -> PrefillTime:
    """Run and time one prefill, as the model is: patched or not."""
    _, parts = resolve(model)
    clock = DeviceClock(next(model.parameters()).device)
    with _stations(parts.root, parts.decoder, clock) as (entered, hooked):
        clock.wait()
        start = clock.now()
        outputs = forward(model, inputs)
        stop = clock.now()
        clock.wait()
    before = after = 0.0
    for began, ended, inside in hooked:
        seconds = clock.between(began, ended)
        before, after = (before, after + seconds) if inside else (before + seconds, after)
    return PrefillTime(
        clock.between(start, entered[0]) - before,
        before + after,
        clock.between(entered[0], stop) - after,
        stored_bytes(cache_in(outputs)),
    )


def rounds(
    model: nn.Module, ways: Sequence[tuple[Callable[[], Any], Inputs]], repeats: int, warmup: int = 1
) -> list[list[PrefillTime]]:
    """Prefills of several ways to run a model, in turns; each round begins with the next one.

    Args:
        model: the model.
        ways: for each a context to run in (a patch, say), made anew every time, and the inputs.
        repeats: timed rounds.
        warmup: untimed rounds before them.

    Returns:
        For each way its ``repeats`` prefills, by round.
    """
    prefills: list[list[PrefillTime]] = [[] for _ in ways]
    for turn in range(warmup + repeats):
        for place in range(len(ways)):
            which = (turn + place) % len(ways)
            context, inputs = ways[which]
            with context():
                run = time_prefill(model, inputs)
            if turn >= warmup:
                prefills[which].append(run)
    return prefills


@torch.inference_mode()
def time_decode(model: nn.Module, inputs: Inputs, new_tokens: int) -> list[float]:
    """Seconds of each decode step of a greedy ``generate``, from the end of one forward pass to the end of the next.

    One step more is made than asked for: the first one is slower and left out.
    """
    _, parts = resolve(model)
    clock = DeviceClock(next(model.parameters()).device)
    ends: list[Any] = []
    hook = parts.root.register_forward_hook(lambda *ignored: ends.append(clock.now()))
    try:
        model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=new_tokens + 2,
            min_new_tokens=new_tokens + 2,
            do_sample=False,
            num_beams=1,
            suppress_tokens=sorted(set(parts.placeholders.values())),  # random weights may want to say "<image>"
            pad_token_id=0,
        )
        clock.wait()
    finally:
        hook.remove()
    return [clock.between(a, b) for a, b in pairwise(ends[1:])]


# ---------------------------------------------------------------------------------------------------- points in time


@contextlib.contextmanager
def _stations(root: nn.Module, decoder: nn.Module, clock: DeviceClock) -> Iterator[tuple[list[Any], list[Any]]]:
    """Note when the decoder is entered, ahead of every hook on it, and put a mark before and behind a patch's hooks.

    Yields two lists that fill while the model runs: when the decoder was entered, and for each of the patch's hooks
    (begin, end, whether the decoder was entered by then).
    """
    entered: list[Any] = []
    hooked: list[tuple[Any, Any, bool]] = []
    opened: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(clock.now())

    def begin(*ignored: Any) -> None:
        opened.append(clock.now())

    def end(*ignored: Any) -> None:
        hooked.append((opened.pop(), clock.now(), bool(entered)))

    removers = []
    for module in root.modules():
        if any(map(_ours, module._forward_pre_hooks.values())):
            removers += [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_pre_hook(end)]
        if module is not root and any(map(_ours, module._forward_hooks.values())):
            removers += [module.register_forward_hook(begin, prepend=True), module.register_forward_hook(end)]
    removers.append(decoder.register_forward_pre_hook(enter, prepend=True))
    try:
        yield entered, hooked
    finally:
        for remover in removers:
            remover.remove()


def _ours(hook: Any) -> bool:
    """Whether a hook is the engine's."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("vtc.engine.")


class DeviceClock:
    """Points in time on one device: device events on a GPU, else the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def now(self) -> Any:
        """A point in time."""
        if self.device.type != "cuda":
            self.wait()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds from one point to another; both must have passed (see :meth:`wait`)."""
        return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3
