"""Compaction: the same columns out of everything that is aligned with the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vtc.ops.backend import backend
from vtc.ops.proof import proved


def gather_columns(tensors: Sequence[Tensor], index: Tensor, dims: int | Sequence[int] = 1) -> tuple[Tensor, ...]:
    """Take the same columns of each row of a batch out of several tensors: one launch for up to four of them.

    Torch's own gathers where the kernel cannot serve: on the CPU, where gradients are wanted, for complex numbers, for
    tensors on several devices, and under ``torch.compile``, which fuses gathers itself.

    Args:
        tensors: each [B, ..., N, ...], any dtype: hidden states [B, N, d], keys and values [B, H, N, dh], masks.
        index: LongTensor [B, M], columns in [0, N). They are not checked, since that would wait for the device: the
            CPU raises for others, a GPU gives zeros or stops, and reads nothing outside the tensors.
        dims: where the N columns are, >= 1; one for all tensors, or one for each.

    Returns:
        The tensors with M columns instead of N, contiguous.

    Raises:
        TypeError: an index that is no LongTensor.
        ValueError: shapes that do not fit.
    """
    dims = [dims] * len(tensors) if isinstance(dims, int) else list(dims)
    if index.dtype != torch.long:
        raise TypeError(f"index must be a LongTensor, not a tensor of {index.dtype}")
    if index.ndim != 2:
        raise ValueError(f"index must be [B, M], not {tuple(index.shape)}")
    if len(dims) != len(tensors):
        raise ValueError(f"{len(dims)} dims do not fit {len(tensors)} tensors")
    for tensor, dim in zip(tensors, dims, strict=True):
        if not 1 <= dim < tensor.ndim or tensor.shape[0] != index.shape[0]:
            raise ValueError(f"tensor {tuple(tensor.shape)} (dim {dim}) does not fit index {tuple(index.shape)}")
    if len({tensor.shape[dim] for tensor, dim in zip(tensors, dims, strict=True)}) > 1:
        raise ValueError(f"tensors {[tuple(tensor.shape) for tensor in tensors]} differ in columns (dims {dims})")
    if not torch.compiler.is_compiling() and backend(index.device) == "triton":
        from vtc.ops.kernels import gather

        if all(gather.fits(tensor, index) for tensor in tensors):
            taken = gather.launches(tensors, dims)
            if all(proved(index.device, partial(gather.case, some, index), gathered) for some in taken):
                return gather.gather_columns(taken, index)
    return gathered(tensors, index, dims)


def gathered(tensors: Sequence[Tensor], index: Tensor, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """:func:`gather_columns` in torch, for arguments that have been checked."""
    return tuple(_gather(tensor, index, dim) for tensor, dim in zip(tensors, dims, strict=True))


def _gather(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    index = index.to(tensor.device).reshape(
        len(index), *[1] * (dim - 1), index.shape[1], *[1] * (tensor.ndim - 1 - dim)
    )
    return tensor.gather(dim, index.expand(*tensor.shape[:dim], -1, *tensor.shape[dim + 1 :]))
