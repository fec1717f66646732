"""Measure what pruning saves: the same prompts, pruned and unpruned in turns, in one process.

A prefill is cut at the places the engine hooks. Its parts add up to the time to first token (TTFT):

- *vision*: everything before the decoder is entered: vision tower, projector, text embedding, merging both.
- *select*: the hooks of the patch, wherever they are: signals, selection, shortening embeddings, positions and masks.
  Zero when unpruned. What the patched encoder call does around the tower (layouts) counts as vision.
- *prefill*: the rest: decoder layers and the head for the last position.

On a GPU times come from device events, which are read after the run; on a CPU from ``time.perf_counter``. Every round
runs every configuration once, the first one moving, so that a machine that slows down slows all; a speed-up is the
ratio of two runs of one round. Nothing is called faster before its result was found right: see :func:`faults`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.costs import Decoder
from vtc.dialect.caches import cache_in, stored_bytes
from vtc.engine.context import bypassed
from vtc.methods import Method
from vtc.models import resolve
from vtc.models.base import MODALITIES
from vtc.patching import Patch, patch, requested
from vtc.profiling.workload import Workload

Inputs = Mapping[str, Any]
Result = TypeVar("Result")

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative norm by which the logits of ``keep=1.0`` may differ from the unpatched model's. Methods that prune before
the model do not differ at all; stages inside it hand over explicit masks, and other kernels round differently."""


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements, and how far they reach."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, 10th and 90th percentile of at least one value (linear between neighbours)."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])

    @classmethod
    def range(cls, values: Sequence[float]) -> Spread:
        """Median, smallest and largest."""
        return cls(statistics.median(values), min(values), max(values))

    def __truediv__(self, divisor: float) -> Spread:
        return Spread(self.median / divisor, self.low / divisor, self.high / divisor)


@dataclass(frozen=True)
class Prefill:
    """One measured prefill of a batch: seconds of its parts (see the module), bytes of all keys and values after it."""

    vision: float
    select: float
    prefill: float
    cache_bytes: int

    @property
    def total(self) -> float:
        """Time to first token."""
        return self.vision + self.select + self.prefill


@dataclass(frozen=True)
class Measurement:
    """One configuration at one batch size. Times in seconds of the whole batch, sizes in bytes of the whole batch.

    Attributes:
        config: how it was pruned; ``None``: not at all.
        batch: samples.
        visual_tokens: of a sample.
        kept_tokens: of a sample, averaged over the layers of the language model.
        ttft: time to first token: the sum of the next three.
        vision: see the module.
        select: see the module.
        prefill: see the module.
        decode: one further token, seconds a step; ``None`` if none was asked for.
        peak_bytes: memory needed by the prefill beyond what was held before it (weights are not counted); ``None``
            where it cannot be told.
        cache_bytes: keys and values after the prefill.
        repeats: rounds.
        speedup: unpruned TTFT / this one's, round by round; ``None`` for the unpruned run and where ``faults`` are.
        ideal: the same ratio in FLOPs, vision tower included.
        faults: what is wrong with the result; empty when nothing is.
    """

    config: CompressionConfig | None
    batch: int
    visual_tokens: float
    kept_tokens: float
    ttft: Spread
    vision: Spread
    select: Spread
    prefill: Spread
    decode: Spread | None
    peak_bytes: int | None
    cache_bytes: int
    repeats: int
    speedup: Spread | None = None
    ideal: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def realised(self) -> Spread | None:
        """Realised fraction: measured TTFT ratio / ideal TTFT-FLOPs ratio."""
        return None if self.speedup is None or self.ideal is None else self.speedup / self.ideal

    @property
    def method(self) -> str:
        """Its name, or ``none``."""
        return "none" if self.config is None else self.config.method

    @property
    def keep(self) -> Keep:
        """As given; 1.0 when unpruned."""
        return 1.0 if self.config is None else self.config.build().keep


# ------------------------------------------------------------------------------------------------------------- profile


def profile(
    model: nn.Module,
    inputs: Workload | Callable[[int], Inputs],
    method: str | Method | CompressionConfig | Sequence[str | Method | CompressionConfig],
    keep: Keep | Sequence[Keep] | None = None,
    batches: Sequence[int] = (1,),
    *,
    repeats: int = 7,
    warmup: int = 1,
    new_tokens: int = 0,
    positions: str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Measurement]:
    """Measure a model unpruned and pruned.

    Args:
        model: a transformers model, not patched.
        inputs: what to measure on: a :class:`~vtc.profiling.workload.Workload`, or a function from a batch size to
            the keyword arguments of ``model()``.
        method: one or several, as for :func:`vtc.patch`.
        keep: one or several; every method given by name runs with every one. Not for methods that carry their own.
        batches: batch sizes.
        repeats: timed rounds for each batch size.
        warmup: untimed rounds before them.
        new_tokens: tokens decoded after the prefill to time a decode step; 0 leaves decoding out.
        positions: as for :func:`vtc.patch`.
        progress: called with a line of text at the start of each phase.

    Returns:
        For each batch size the unpruned measurement, then one per configuration.

    Raises:
        ValueError: anything :func:`vtc.patch` refuses; a count out of range. Nothing was run then.
    """
    if repeats < 1 or warmup < 0 or new_tokens < 0 or not batches or min(batches) < 1:
        raise ValueError(
            f"{repeats=} and batches={tuple(batches)} must be at least 1, {warmup=} and {new_tokens=} at least 0"
        )
    configs = configurations(method, keep, positions)
    for config in configs:
        patch(model, config).unpatch()  # what cannot work is refused before the first minute is spent
    make = functools.partial(inputs.inputs, model) if isinstance(inputs, Workload) else inputs
    measured: list[Measurement] = []
    for batch in batches:
        progress(f"batch {batch}: checking results")
        given = make(batch)
        known = _look(model, given, configs)
        progress(f"batch {batch}: {repeats} rounds of {len(configs) + 1} prefills")
        measured += _measure(model, given, batch, known, repeats, warmup, new_tokens)
    return measured


def configurations(
    method: str | Method | CompressionConfig | Sequence[str | Method | CompressionConfig],
    keep: Keep | Sequence[Keep] | None = None,
    positions: str | None = None,
) -> list[CompressionConfig]:
    """Every method with every ``keep``, as configurations; arguments as for :func:`profile`.

    Raises:
        ValueError: no method, or one that :func:`vtc.patch` refuses whatever the model.
        TypeError: ``keep`` beside a method that carries its own.
    """
    methods = [method] if isinstance(method, (str, Method, CompressionConfig)) else list(method)
    keeps = list(keep) if isinstance(keep, Sequence) else [keep]
    if not methods or not keeps:
        raise ValueError(f"{method=} and {keep=} leave nothing to run")
    return [requested(each, share, positions, {})[0] for each in methods for share in keeps]


@dataclass(frozen=True)
class _Known:
    """What one untimed run of a configuration told; the first one is the unpruned model's."""

    config: CompressionConfig | None
    visual_tokens: float
    kept_tokens: float
    peak_bytes: int | None
    ideal: float | None = None
    faults: tuple[str, ...] = ()


def _look(model: nn.Module, inputs: Inputs, configs: Sequence[CompressionConfig]) -> list[_Known]:
    """Run everything once, look at the results and at the memory they took."""
    device = next(model.parameters()).device
    plain, peak = with_peak(device, functools.partial(_forward, model, inputs))
    logits, vision = plain.logits, encoder_flops(model, inputs)
    del plain
    known: list[_Known] = []
    checked: dict[str, list[str]] = {}  # keep=1.0 once for each method, whatever keeps are measured
    for config in configs:
        everything = _keeping_all(config)
        if repr(everything) not in checked:
            checked[repr(everything)] = [] if everything is None else _unlike(model, inputs, everything, logits)
        with patch(model, config) as handle:
            outputs, needed = with_peak(device, functools.partial(_forward, model, inputs))
            found = [*checked[repr(everything)], *faults(handle, outputs.logits)]
            del outputs
            report = handle.report()
            kept = sum(report.tokens_per_layer) / len(report.tokens_per_layer)
            ideal = ideal_ratio(handle, vision / len(logits))
        known.append(_Known(config, report.visual_tokens, kept, needed, ideal, tuple(found)))
    tokens = known[0].visual_tokens
    return [_Known(None, tokens, tokens, peak), *known]


def _measure(
    model: nn.Module, inputs: Inputs, batch: int, known: Sequence[_Known], repeats: int, warmup: int, new_tokens: int
) -> list[Measurement]:
    patches = [_pruning(model, each.config) for each in known]
    prefills = rounds(model, [(pruning, inputs) for pruning in patches], repeats, warmup)
    steps: list[list[float]] = [[] for _ in known]
    for which in range(len(known) if new_tokens else 0):
        with patches[which]():
            steps[which] = time_decode(model, inputs, new_tokens)
    measured = []
    for each, runs, ticks in zip(known, prefills, steps, strict=True):
        ratios = [full.total / pruned.total for full, pruned in zip(prefills[0], runs, strict=True)]
        measured.append(
            Measurement(
                config=each.config,
                batch=batch,
                visual_tokens=each.visual_tokens,
                kept_tokens=each.kept_tokens,
                ttft=Spread.of([run.total for run in runs]),
                vision=Spread.of([run.vision for run in runs]),
                select=Spread.of([run.select for run in runs]),
                prefill=Spread.of([run.prefill for run in runs]),
                decode=Spread.of(ticks) if ticks else None,
                peak_bytes=each.peak_bytes,
                cache_bytes=runs[0].cache_bytes,
                repeats=repeats,
                speedup=None if each.config is None or each.faults else Spread.of(ratios),
                ideal=each.ideal,
                faults=each.faults,
            )
        )
    return measured


def rounds(
    model: nn.Module, ways: Sequence[tuple[Callable[[], Any], Inputs]], repeats: int, warmup: int = 1
) -> list[list[Prefill]]:
    """Prefills of several ways to run a model, in turns; each round begins with the next one.

    Args:
        model: the model.
        ways: for each a context to run in (a patch, say), made anew every time, and the inputs.
        repeats: timed rounds.
        warmup: untimed rounds before them.

    Returns:
        For each way its ``repeats`` prefills, by round.
    """
    prefills: list[list[Prefill]] = [[] for _ in ways]
    for turn in range(warmup + repeats):
        for place in range(len(ways)):
            which = (turn + place) % len(ways)
            context, inputs = ways[which]
            with context():
                run = time_prefill(model, inputs)
            if turn >= warmup:
                prefills[which].append(run)
    return prefills


def _pruning(model: nn.Module, config: CompressionConfig | None) -> Callable[[], Any]:
    return contextlib.nullcontext if config is None else functools.partial(patch, model, config)


# -------------------------------------------------------------------------------------------------------- correctness


def faults(handle: Patch, logits: Tensor) -> list[str]:
    """What is wrong with a patch's last run, as sentences; empty when nothing is.

    Every image must keep at least one token, in ascending order, of those it has; fewer than all if ``keep`` says so;
    and the logits must be finite. That ``keep=1.0`` gives the unpruned model's logits is looked at apart.

    Args:
        handle: of the model that was just run.
        logits: what it gave.
    """
    found: list[str] = []
    if not bool(logits.isfinite().all()):
        found.append("its logits are not finite")
    if handle.last_keep is None or handle.last_layouts is None:
        return [*found, "no image was pruned"]
    pairs = [pair for row in zip(handle.last_keep, handle.last_layouts, strict=True) for pair in zip(*row, strict=True)]
    for indices, layout in pairs:
        if not len(indices) or indices[0] < 0 or indices[-1] >= layout.length or bool((indices.diff() <= 0).any()):
            found.append(f"it keeps {indices.tolist()} of an image of {layout.length} tokens")
    total, left = sum(layout.length for _, layout in pairs), sum(len(indices) for indices, _ in pairs)
    keep = handle.method.keep
    if left >= total and (keep < 0.9 if isinstance(keep, float) else keep < total // len(pairs)):
        found.append(f"it keeps {left} of {total} tokens with keep={keep}")
    return found


def _unlike(model: nn.Module, inputs: Inputs, everything: CompressionConfig, plain: Tensor) -> list[str]:
    """Whether a configuration that keeps all gives other logits than the unpruned model."""
    with patch(model, everything) as handle:
        same = _forward(model, inputs).logits
        if any(step.stage.all_or_nothing for step in handle.stage.layers.steps):  # whatever keep is
            had, left = _total(handle.last_keep), _total(handle.last_stages[-1][1])
            given = sum(layout.length for images in handle.last_layouts or [] for layout in images)
            if left < had:
                return [] if had == given else [f"with keep=1.0 it keeps {had} of {given} tokens"]
    error = float((same.float() - plain.float()).norm() / plain.float().norm())
    limit = TOLERANCE[plain.dtype]
    if error <= limit:
        return []
    return [f"with keep=1.0 its logits differ from the unpruned model's by {error:.1e}, above {limit:.0e}"]


def _total(samples: Sequence[Sequence[Tensor]] | None) -> int:
    return sum(len(kept) for images in samples or [] for kept in images)


def _keeping_all(config: CompressionConfig) -> CompressionConfig | None:
    """The configuration with ``keep=1.0``; ``None`` for a chain, whose parts have a ``keep`` each."""
    method = config.build()
    if any(isinstance(value, Method) and name != "selector" for name, value in config.options.items()):
        return None
    return CompressionConfig.of(replace(method, keep=1.0), config.positions)


def ideal_ratio(handle: Patch, encoder: float) -> float:
    """TTFT-FLOPs ratio, unpruned / pruned, of a patch's last prompt: vision tower, projector and language model.

    The language model by :mod:`vtc.costs`, with the tokens that each layer really saw. What selecting costs
    is left out: the ideal has it for nothing.

    Args:
        handle: of the model that was just run.
        encoder: FLOPs of vision tower and projector for one sample, see :func:`encoder_flops`.
    """
    report, parts = handle.report(), handle.stage.parts
    decoder, text = Decoder.of(parts.decoder, parts.root), report.text_tokens
    full = decoder.prefill([round(text + report.visual_tokens)] * len(report.tokens_per_layer)).flops
    pruned = decoder.prefill([round(text + kept) for kept in report.tokens_per_layer]).flops
    return (encoder + full) / (encoder + pruned)


def encoder_flops(model: nn.Module, inputs: Inputs) -> float:
    """FLOPs of vision tower and projector for a batch, by torch's counter, which sees what really runs.

    It does not see into the attention of a flash-attention package, so that of such a tower is missing.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        encode(model, inputs)
    return counter.get_total_flops()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *ignored: Any, **also: Any) -> int:
    """Of full attention, from shapes [B, H, N, d]: scores and sums."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What torch's counter does not know: the kernel behind SDPA on a CPU."""


# -------------------------------------------------------------------------------------------------------------- timing


@torch.inference_mode()
def encode(model: nn.Module, inputs: Inputs) -> None:
    """Run the image encoder alone, as the model would, unheard by the engine."""
    _, parts = resolve(model)
    for modality in MODALITIES:
        pixels = [
            name for name in inputs if name.startswith("pixel_values") and ("video" in name) == (modality == "video")
        ]
        if not pixels or inputs[pixels[0]] is None:
            continue
        function = getattr(parts.base, f"get_{modality}_features")
        names = inspect.signature(function).parameters
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None and name not in pixels}
        key = pixels[0] if pixels[0] in names else "pixel_values"  # releases name it differently
        with bypassed():
            function(**(arguments | {key: inputs[pixels[0]]}), return_dict=True)


@torch.inference_mode()
def _forward(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs, use_cache=True, logits_to_keep=1)


class Clock:
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


def time_prefill(model: nn.Module, inputs: Inputs) -> Prefill:
    """Run and time one prefill, as the model is: patched or not."""
    _, parts = resolve(model)
    clock = Clock(next(model.parameters()).device)
    with _stations(parts.root, parts.decoder, clock) as (entered, hooked):
        clock.wait()
        start = clock.now()
        outputs = _forward(model, inputs)
        stop = clock.now()
        clock.wait()
    before = after = 0.0
    for began, ended, inside in hooked:
        seconds = clock.between(began, ended)
        before, after = (before, after + seconds) if inside else (before + seconds, after)
    return Prefill(
        clock.between(start, entered[0]) - before,
        before + after,
        clock.between(entered[0], stop) - after,
        stored_bytes(cache_in(outputs)),
    )


@contextlib.contextmanager
def _stations(root: nn.Module, decoder: nn.Module, clock: Clock) -> Iterator[tuple[list[Any], list[Any]]]:
    """Note when the decoder is entered, ahead of every hook on it, and put a mark before and behind a patch's hooks.

    Yields the first list, and one of (begin, end, whether the decoder was entered by then).
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


@torch.inference_mode()
def time_decode(model: nn.Module, inputs: Inputs, new_tokens: int) -> list[float]:
    """Seconds of each decode step of a greedy ``generate``, from the end of one forward pass to the end of the next.

    One step more is made than asked for: the first one is slower and left out.
    """
    _, parts = resolve(model)
    clock = Clock(next(model.parameters()).device)
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


def with_peak(device: torch.device, run: Callable[[], Result]) -> tuple[Result, int | None]:
    """Call ``run``; also return the bytes that it needed at its peak beyond what was held before.

    On CUDA from the allocator. On Linux from the peak resident memory of the process, after free memory went back to
    the system; what other threads of the process take counts too. Elsewhere ``None``.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - held
    try:
        if device.type != "cpu":
            raise OSError
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        held = _resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return run(), None
    result = run()
    return result, max(0, _resident("VmHWM") - held)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
