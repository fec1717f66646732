"""What must hold beside speed: which backends there are, no wait for the host, one graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.suite import forced
from vtc.ops.backend import backend


def has_kernel(call: Callable[[], object]) -> bool:
    """Whether an op asks which backend to use, that is, has a kernel beside its torch reference.

    Asked by experiment: forced to a backend that cannot run, an op that asks refuses.

    Args:
        call: the op on small tensors on the CPU.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with forced("triton"):
            call()
    except RuntimeError as error:
        return "VTC_BACKEND" in str(error)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return False


def no_triton(device: torch.device) -> str:
    """Why the Triton backend cannot run on this device; empty if it can."""
    try:
        with forced("triton"):
            backend(device)
    except RuntimeError as error:
        return str(error)
    return ""


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Raise where the host would wait for the device.

    On a GPU by torch's own sync debug mode; on the CPU, which cannot wait for itself, by refusing the operations that
    would: a number read by the host, a shape that depends on data.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    else:
        with _NoHostReads():
            yield


class _NoHostReads(TorchDispatchMode):
    reads = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.reads:
            raise RuntimeError(f"the host waits for the device in aten::{name}")
        return func(*args, **(kwargs or {}))


def captured(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of one call: what replays it, and the tensor it writes."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # warm-up: compiling and autotuning must not fall into the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels that one call starts on a GPU; on the CPU, operators it calls."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    run()
    with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profile.events()
    if device.type == "cuda":
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    return sum(e.name.startswith("aten::") and e.cpu_parent is None for e in events)
