"""vtc's series beside vLLM's at /metrics: visual tokens before and after, keeps, seconds of selection, by model.

Prompts are prepared in the server's process, images are pruned in the engine's. What the first counts goes into
prometheus_client's registry, as vLLM's own series do. What the second measures is written as text into a folder, one
file a process, that the first reads at every scrape. Where several servers share an engine, vLLM has prometheus_client
share everything between processes (PROMETHEUS_MULTIPROC_DIR), and nothing is left to do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, write_to_textfile
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from vtc.config import CompressionConfig

FOLDER = "VTC_METRICS_DIR"
"""The environment variable by which an engine's processes learn of the folder. Not in vLLM's configuration, which is
part of the key of its compiled graphs."""
_SHARED = "PROMETHEUS_MULTIPROC_DIR"
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0)


# ------------------------------------------------------------------------------------------------ the server's process


@functools.cache
def _series() -> tuple[Counter, Counter, Counter, Histogram, Gauge]:
    by = ["model_name"]
    return (
        Counter("vtc:visual_tokens_before", "Visual tokens of prepared prompts, before pruning.", by),
        Counter("vtc:visual_tokens_after", "Visual tokens of prepared prompts, after pruning.", by),
        Counter("vtc:media", "Images and videos of prepared prompts.", [*by, "modality"]),
        Histogram("vtc:keep", "Share of an image's or video's tokens that stays.", by, buckets=_SHARES),
        Gauge(
            "vtc:info",
            "How a model is pruned where a request does not ask for another keep.",
            [*by, "method", "keep", "positions", "config", "version"],
            multiprocess_mode="mostrecent",
        ),
    )


_REHEARSING: ContextVar[bool] = ContextVar("vtc_rehearsing", default=False)


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """While vLLM tries out what the largest images need: those are no prompts, and are not counted."""
    token = _REHEARSING.set(True)
    try:
        yield
    finally:
        _REHEARSING.reset(token)


def prepared(model: str, modality: str, before: int, after: int) -> None:
    """Count an image or video of a prompt.

    Args:
        model: the name that it is served under.
        modality: ``image`` or ``video``.
        before: its tokens.
        after: those that stay.
    """
    if _REHEARSING.get():
        return
    whole, left, media, shares, _ = _series()
    whole.labels(model).inc(before)
    left.labels(model).inc(after)
    media.labels(model, modality).inc()
    shares.labels(model).observe(after / max(1, before))


def announce(model: str, config: CompressionConfig, text: str) -> None:
    """Tell how a model is pruned, and make room for what its engine measures; before the engine's processes start.

    Args:
        model: the name that it is served under.
        config: settled.
        text: the same as JSON.
    """
    method = config.build()
    keep, release = str(method.keep), version("visual-token-compression")
    _series()[-1].labels(model, method.name, keep, str(config.positions), text, release).set(1)
    if _SHARED not in os.environ:
        os.environ[FOLDER] = _folder()


@functools.cache
def _folder() -> str:
    """One for this process, gone with it; its content is at /metrics from now on."""
    made = tempfile.TemporaryDirectory(prefix="vtc-metrics-")
    REGISTRY.register(Engines(made))
    return made.name


class Engines:
    """Collector of prometheus_client: the files in a folder, series of one name together."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Read."""
        found: dict[str, Metric] = {}
        for path in sorted(Path(self._folder.name).glob("*.prom")):
            for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
                found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found[family.name].samples += family.samples
        return found.values()


# ------------------------------------------------------------------------------------------------- the engine's process


class Meter:
    """What one engine measures. Nothing here waits for a device.

    Args:
        model: the name that it is served under.
        engine: which of the engines that share the load.
    """

    def __init__(self, model: str, engine: int) -> None:
        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"labelnames": ["model_name", "engine"], "registry": self._registry}
        seconds = Histogram(
            "vtc:selection_seconds", "From an encoded batch to the tokens that stay.", buckets=_SECONDS, **given
        )
        media = Counter("vtc:selected_media", "Images and videos pruned; others came from a cache.", **given)
        self._seconds, self._media = seconds.labels(model, str(engine)), media.labels(model, str(engine))
        self._running: deque[tuple[Any, Any]] = deque()

    def begin(self, device: torch.device) -> Any:
        """Before a batch of images is pruned on this device; what is returned goes to :meth:`end`."""
        if device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def end(self, begun: Any, count: int) -> None:
        """After it. A GPU's own time is read at a later call, when it has passed.

        Args:
            begun: from :meth:`begin`.
            count: images of which something was dropped; with 0 (as vLLM's rehearsal has it) nothing is told.
        """
        if not count:
            return
        took = []
        if isinstance(begun, float):
            took.append(time.perf_counter() - begun)
        else:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._running.append((begun, mark))
            while self._running and self._running[0][1].query():
                first, last = self._running.popleft()
                took.append(first.elapsed_time(last) / 1000)
        for each in took:
            self._seconds.observe(each)
        self._media.inc(count)
        self._write()

    def _write(self) -> None:
        if _SHARED not in os.environ and (folder := os.environ.get(FOLDER)):
            with contextlib.suppress(OSError):  # a folder of a server that has gone, or of another machine
                write_to_textfile(f"{folder}/{os.getpid()}.prom", self._registry)
