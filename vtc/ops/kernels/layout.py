"""Numbers for the small jobs that try kernels, in memory as the kernels' compiler tells tensors apart."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(
    seed: int, *shape: int, dtype: torch.dtype, device: torch.device, aligned: bool = True, even: bool = True
) -> Tensor:
    """Normal numbers [*shape] from a generator of their own, laid out as a kernel's compiler sees its rows.

    Args:
        seed: of the numbers, which are the same on every device.
        shape: of the result.
        dtype: of the result.
        device: of the result.
        aligned: strides are multiples of 16, or none of the rows' is.
        even: the tensor begins at a multiple of 16 bytes.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    return laid_out(numbers, device, aligned, even)


def laid_out(x: Tensor, device: torch.device, aligned: bool, even: bool) -> Tensor:
    """A tensor of the CPU on a device, cut out of wider rows; arguments as for :func:`noise`."""
    offset, last = int(not even), x.shape[-1]
    width = max(offset + last, 1)
    if aligned:
        width = -(-width // 16) * 16
    elif width % 16 == 0:
        width += 1
    wide = torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device="cpu")
    wide[..., offset : offset + last] = x
    return wide.to(device)[..., offset : offset + last]


def is_even(x: Tensor) -> bool:
    """Whether a tensor begins at a multiple of 16 bytes, by which Triton tells variants apart."""
    return x.data_ptr() % 16 == 0
