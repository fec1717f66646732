"""Numbers for the small jobs that try kernels, in memory as the kernels' compiler tells tensors apart."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.recursion import Job


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


def few_tokens(
    job: Job, n: int, dtype: torch.dtype, width: int, aligned: bool, even: bool, device: torch.device
) -> tuple[Job]:
    """A job for the greedy kernels in the mode of ``job``: two images of n >= 16 tokens [2, n, width], all picked."""
    cpu = torch.device("cpu")
    rows = noise(0, 2, n, width, dtype=torch.float32, device=cpu)
    rows[:, 7], rows[:, 9], rows[:, 11] = rows[:, 2], 0.0, float("nan")
    mask = torch.ones(2, n, dtype=torch.bool, device=cpu)
    mask[0, 3], mask[1, n - 5 :] = False, False
    claim = (noise(1, 2, n, dtype=torch.float32, device=cpu).sigmoid() * 8).round() / 8  # some are alike
    start = None if job.start is None else torch.tensor([n // 2, n - 1], device=device)  # the second is padding
    importance = None if job.importance is None else claim.to(device)
    weights = None if job.weights is None else claim.masked_fill(~mask, 0.0).to(device)
    x, balance = laid_out(rows.to(dtype), device, aligned, even), 0.0 if importance is None else 0.3
    return (Job(x, n, mask.to(device), start, importance, balance, job.running_sum, weights),)
