"""A mode in which whatever would wait for the device is an error."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.ops.recursion import unbranched


class NoSync(TorchDispatchMode):
    """Raises on whatever reads the device from the host, or has a shape that depends on values.

    The CPU stands for a device here: what branches on values because it runs on a CPU is left out.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "is_nonzero",
        "repeat_interleave",
    )

    def __enter__(self):
        self._as_on_a_device = contextlib.ExitStack()
        self._as_on_a_device.enter_context(unbranched())
        return super().__enter__()

    def __exit__(self, *raised):
        self._as_on_a_device.close()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].lstrip("_")
        if any(name == f.lstrip("_") for f in self.FORBIDDEN):
            raise AssertionError(f"{func} waits for the device")
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                raise AssertionError(f"{func} with a bool index waits for the device")
        return func(*args, **(kwargs or {}))
