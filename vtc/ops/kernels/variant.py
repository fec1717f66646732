"""What a kernel is compiled for: the launches that the wrappers make, written down to compile without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a wrapper launches it.

    Attributes:
        name: of the row in the table of compiled kernels.
        kernel: the ``triton.jit`` function.
        signature: argument name -> Triton type (``*bf16``, ``*i8``, ``i32``, ``fp32``), in the kernel's order;
            constexpr arguments are left out.
        constants: constexpr argument name -> value.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``, as given to the launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
