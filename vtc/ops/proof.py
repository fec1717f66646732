"""Kernels that prove themselves: on a GPU, the first use of each compiled variant is compared with torch.

What decides about the compiled code (dtype, width, tile sizes, which arguments are there) is a :class:`Case`. The
kernels' own modules say which case a call is and which small job tries it, with the very constants of that call, so
that nothing is compiled twice. The job's numbers come from seeds, its reference is computed on the CPU, and comparing
waits for the device: once for each case in a process, or not at all where :mod:`vtc.ops.remembered` knows that the case
was right with this device, driver, torch, Triton, vtc and source. Only successes are kept.

A case that is wrong, or cannot run, is computed in torch as long as the process lives, with one warning; where
``VTC_BACKEND=triton`` forces the kernels it is an error. **While a CUDA graph is captured** nothing can be compared:
what is known by then decides, and what is unknown goes to torch (forced, it is an error: call once before the capture).
**Under torch.compile** nothing is asked: the ops are torch there, and forced kernels are traced as they are.

What a small job cannot show: offsets beyond 32 bits, races that need a full chip, and each mixture of alignments.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.ops import remembered
from vtc.ops.backend import VARIABLE, forced, launching
from vtc.values import shortened

CPU = torch.device("cpu")

Reference = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One compiled variant of a kernel, and a small job that tries it.

    Attributes:
        kernel: what users know it by.
        facts: what decides which code is compiled: pairs of a name and a value that can be hashed.
        arguments: makes the job's arguments on a device, the same numbers on every one.
        run: the kernel, given these; a tensor or a tuple of them.
        tolerance: relative and absolute, of each value; ``None`` where every bit has to be the same.
    """

    kernel: str
    facts: tuple[tuple[str, Any], ...]
    arguments: Callable[[torch.device], tuple[Any, ...]]
    run: Callable[..., Any]
    tolerance: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Kernel and facts, as one line; it names the case in the cache, too."""
        told = (f"{name} {str(value).replace('torch.', '')}" for name, value in self.facts)
        return f"{self.kernel}: {', '.join(told)}"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: the case's name, what was wrong (empty: nothing), and the seconds with compiling."""

    name: str
    reason: str
    seconds: float


_VERDICTS: dict[tuple[Any, ...], str] = {}
"""What was wrong with a case on a device in this process; empty: nothing."""
_LOCK = threading.Lock()
_UNTRIED = "it was not tried before, and nothing can be compared while a CUDA graph is captured; call it once before"


def proved(device: torch.device, describe: Callable[[], Case | None], reference: Reference) -> bool:
    """Whether the kernel may run: it gave what torch gives, here and now or earlier.

    Args:
        device: of the tensors, where :func:`vtc.ops.backend.backend` chose Triton.
        describe: which case the call is; ``None`` if nothing would be launched.
        reference: the same in torch, for a case's arguments.

    Raises:
        RuntimeError: the kernels are forced, and this one is wrong or cannot be tried now.
    """
    if torch.compiler.is_compiling() or not _on_trial(device):
        return True
    case = describe()
    if case is None:
        return True
    reason = _verdict(case, reference, device)
    if reason and forced():
        raise RuntimeError(
            f"{VARIABLE}=triton, but {_told(case, device, reason)}; unset {VARIABLE} to have torch instead"
        )
    return not reason


def examine(case: Case, reference: Reference, device: torch.device) -> Outcome:
    """Try a case now, whatever is known of it; the outcome counts from then on. Nothing is raised, nobody is warned."""
    began = time.perf_counter()
    with _LOCK:
        try:
            reason = _try(case, reference, device)
        except torch.cuda.OutOfMemoryError as error:
            reason = _line(error)
        else:
            _remember(case, device, reason)
    return Outcome(case.name, reason, time.perf_counter() - began)


def _on_trial(device: torch.device) -> bool:
    """Triton's interpreter on the CPU is for tests, which compare for themselves."""
    return device.type == "cuda"


def _verdict(case: Case, reference: Reference, device: torch.device) -> str:
    """What is wrong with a case; empty if nothing is."""
    key = _key(case, device)
    if (known := _VERDICTS.get(key)) is not None:
        return known
    if _capturing(device):
        return "" if case.name in remembered.names(device) else _UNTRIED
    with _LOCK:  # another thread may have tried it meanwhile
        if (known := _VERDICTS.get(key)) is not None:
            return known
        if case.name in remembered.names(device):
            _VERDICTS[key] = ""
            return ""
        try:
            reason = _try(case, reference, device)
        except torch.cuda.OutOfMemoryError as error:  # says nothing about the kernel: the next call tries again
            return _line(error)
        _remember(case, device, reason)
    if reason and not forced():
        warnings.warn(
            f"vtc: {_told(case, device, reason)}. This process computes it in torch from now on, which "
            f"takes longer. Please report what `vtc doctor` prints; {VARIABLE}=torch asks for torch from the start.",
            RuntimeWarning,
            stacklevel=4,
        )
    return reason


def _told(case: Case, device: torch.device, reason: str) -> str:
    return f"the Triton kernel for {case.name} cannot be trusted on {remembered.device_name(device)}: {reason}"


def _key(case: Case, device: torch.device) -> tuple[Any, ...]:
    return device, case.kernel, case.facts


def _remember(case: Case, device: torch.device, reason: str) -> None:
    _VERDICTS[_key(case, device)] = reason
    if not reason:
        remembered.add(device, case.name)


def _try(case: Case, reference: Reference, device: torch.device) -> str:
    """Run both and compare; what was wrong, or empty.

    Raises:
        torch.cuda.OutOfMemoryError: the device is full.
    """
    try:
        with _undisturbed(device):
            expected = reference(*case.arguments(CPU))
            got = case.run(*case.arguments(device))
            pairs = zip(_tuple(got), _tuple(expected), strict=True)
            return next(filter(None, (_difference(g.cpu(), e, case.tolerance) for g, e in pairs)), "")
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and drivers raise what they like
        return _line(error)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, autocast, inference mode or default device of the caller's; waiting for the device is allowed."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("default")
        for context in (torch.inference_mode(False), torch.no_grad(), CPU):
            stack.enter_context(context)
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _difference(got: Tensor, expected: Tensor, tolerance: tuple[float, float] | None) -> str:
    """How a result departs from the reference's, both on the CPU; empty if it does not."""
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if tolerance is None:
        wrong, unit = _bytes(got) != _bytes(expected), "bytes"
    else:
        relative, absolute = tolerance
        wrong, unit = ~torch.isclose(got.double(), expected.double(), rtol=relative, atol=absolute), "values"
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()} {unit} differ from torch's" if count else ""


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _line(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _capturing(device: torch.device) -> bool:
    with launching(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
