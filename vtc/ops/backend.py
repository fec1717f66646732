"""Which implementation of an op runs: the torch reference or the Triton kernel. One rule, one environment variable.

Tensors on a GPU (CUDA or ROCm) go to the kernels where Triton can be imported, and where :mod:`vtc.ops.proof` finds
them right; all others go to torch. ``VTC_BACKEND=torch`` or ``VTC_BACKEND=triton`` forces one; a forced backend that
cannot run says why. On the CPU the kernels run only in Triton's interpreter (``TRITON_INTERPRET=1``): slow, and exactly
what the tests need. Under torch.compile the device's choice is torch: there a kernel cannot prove itself, and what is
traced must not depend on what ran before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

import torch

from vtc.values import shown

Backend = Literal["torch", "triton"]

VARIABLE = "VTC_BACKEND"

_PLAIN: ContextVar[bool] = ContextVar("vtc_plain", default=False)


@contextmanager
def plain() -> Iterator[None]:
    """Torch for a while (in this thread), whatever was forced: for trials on the CPU, which are no user's tensors."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def backend(device: torch.device) -> Backend:
    """The backend for tensors on ``device``.

    Raises:
        ValueError: ``VTC_BACKEND`` has an unknown value.
        RuntimeError: ``VTC_BACKEND=triton``, but Triton is missing or cannot run on the device.
    """
    if not torch.compiler.is_compiling() and _PLAIN.get():
        return "torch"
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "torch", "triton"):
        raise ValueError(
            f"{VARIABLE}={shown(asked)} is neither 'torch' nor 'triton'; unset it to let the device decide"
        )
    if asked == "torch":
        return "torch"
    if asked == "triton":
        _require_triton(device)
        return "triton"
    eager_gpu = device.type == "cuda" and not torch.compiler.is_compiling()
    return "triton" if eager_gpu and not _missing() else "torch"


def forced() -> bool:
    """Whether the user insists on the kernels."""
    return os.environ.get(VARIABLE, "") == "triton"


def launching(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on this device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on, which has to be so before the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


def _require_triton(device: torch.device) -> None:
    if reason := _missing():
        raise RuntimeError(
            f"{VARIABLE}=triton, but {reason}; pip install 'visual-token-compression[kernels]', or unset {VARIABLE}"
        )
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise RuntimeError(
            f"{VARIABLE}=triton, but Triton has no {device.type} backend: move the tensors to a GPU, set "
            f"TRITON_INTERPRET=1 to interpret the kernels on the CPU, or unset {VARIABLE}"
        )


@functools.cache
def _missing() -> str:
    """Why Triton cannot be imported; empty if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""
