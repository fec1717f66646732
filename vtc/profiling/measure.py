"""Measure what pruning saves: the same prompts, pruned and unpruned in turns, in one process.

Every round runs every configuration once, the first one moving, so that a machine that slows down slows all; a speed-up
is the ratio of two runs of one round. :mod:`vtc.profiling.timing` says what is timed; a result that
:mod:`vtc.profiling.correctness` finds wrong has no speed-up.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.binding import parse_request
from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.methods import Method
from vtc.patching import patch
from vtc.profiling.correctness import faults, faults_keeping_all, keeping_all
from vtc.profiling.ideal import encoder_flops, ideal_ratio
from vtc.profiling.memory import with_peak
from vtc.profiling.running import Inputs, forward
from vtc.profiling.spread import Spread
from vtc.profiling.timing import rounds, time_decode
from vtc.profiling.workload import Workload


@dataclass(frozen=True)
class Measurement:
    """One configuration at one batch size. Times in seconds of the whole batch, sizes in bytes of the whole batch.

    Attributes:
        config: how it was pruned; ``None``: not at all.
        batch: samples.
        visual_tokens: of a sample.
        kept_tokens: of a sample, averaged over the layers of the language model.
        ttft: time to first token: the sum of the next three.
        vision: of that, what comes before the decoder; :mod:`vtc.profiling.timing` says where it is cut.
        select: of that, the patch's own work.
        prefill: of that, the rest.
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
    calibration: str | None = None,
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
        calibration: the same.
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
    configs = configurations(method, keep, positions, calibration)
    for config in configs:
        patch(model, config).unpatch()  # what cannot work is refused before the first minute is spent
    inputs_of = functools.partial(inputs.inputs, model) if isinstance(inputs, Workload) else inputs
    measured: list[Measurement] = []
    for batch in batches:
        progress(f"batch {batch}: checking results")
        prompts = inputs_of(batch)
        known = _look(model, prompts, configs)
        progress(f"batch {batch}: {repeats} rounds of {len(configs) + 1} prefills")
        measured += _measure(model, prompts, batch, known, repeats, warmup, new_tokens)
    return measured


def configurations(
    method: str | Method | CompressionConfig | Sequence[str | Method | CompressionConfig],
    keep: Keep | Sequence[Keep] | None = None,
    positions: str | None = None,
    calibration: str | None = None,
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
    found = [parse_request(each, share, positions, {}, calibration)[0] for each in methods for share in keeps]
    if (other := next((config for config in found if config.when != "always"), None)) is not None:
        raise ValueError(
            f"when={other.when!r} leaves prompts alone where pruning does not pay, which is what is to be measured "
            "here; profile the same method with when='always'"
        )
    return found


@dataclass(frozen=True)
class _Known:
    """What one untimed run of a configuration told."""

    config: CompressionConfig | None
    visual_tokens: float
    kept_tokens: float
    peak_bytes: int | None
    ideal: float | None = None
    faults: tuple[str, ...] = ()


def _look(model: nn.Module, inputs: Inputs, configs: Sequence[CompressionConfig]) -> list[_Known]:
    """Run everything once, the unpruned model first, and look at the results and at the memory they took."""
    device = next(model.parameters()).device
    plain, peak = with_peak(device, functools.partial(forward, model, inputs))
    logits, vision = plain.logits, encoder_flops(model, inputs)
    del plain
    known: list[_Known] = []
    checked: dict[str, list[str]] = {}  # keep=1.0 once for each method, whatever keeps are measured
    for config in configs:
        whole = keeping_all(config)
        if repr(whole) not in checked:
            checked[repr(whole)] = [] if whole is None else faults_keeping_all(model, inputs, whole, logits)
        with patch(model, config) as handle:
            outputs, needed = with_peak(device, functools.partial(forward, model, inputs))
            found = [*checked[repr(whole)], *faults(handle, outputs.logits)]
            del outputs
            report = handle.report()
            kept = sum(report.tokens_per_layer) / len(report.tokens_per_layer)
            ideal = ideal_ratio(handle, vision / len(logits), encoder_flops(model, inputs, True) / len(logits))
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


def _pruning(model: nn.Module, config: CompressionConfig | None) -> Callable[[], Any]:
    return contextlib.nullcontext if config is None else functools.partial(patch, model, config)
