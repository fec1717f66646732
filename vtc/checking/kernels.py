"""Every proof of :mod:`vtc.ops.proof` on one device, for ``vtc doctor``: what the kernels are usually asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.ops import gather, recursion, scores
from vtc.ops.backend import backend
from vtc.ops.proof import Case, Outcome, Reference, examine

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prove(device: str) -> Iterator[Outcome]:
    """Try them one after the other, whatever is known of them; nothing where torch computes on the device."""
    target = torch.device(device)
    if backend(target) != "triton":
        return
    if target.type == "cuda" and target.index is None:  # as tensors have it
        target = torch.device("cuda", torch.cuda.current_device())
    for case, reference in cases(target):
        yield examine(case, reference, target)


def cases(device: torch.device) -> Iterator[tuple[Case, Reference]]:
    """The cases of usual models and pictures, and the same in torch."""
    for case in _greedy(device):
        yield case, recursion.picks
    for case in _rows(device):
        yield case, scores.attention_in_torch
    for case in _transition(device):
        yield case, scores.variation_in_torch
    for case in _gather(device):
        yield case, gather.gathered


def _like(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of which only dtype, shape and device are asked: one number in memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _greedy(device: torch.device) -> Iterator[Case]:
    from vtc.ops.kernels import greedy

    def case(dtype: torch.dtype, tokens: int, width: int, mode: str = "") -> Case | None:
        each = _like(device, torch.float32, 1, tokens)
        start = _like(device, torch.long, 1) if mode in ("start", "sum") else None
        importance, weights = (each if mode == name else None for name in ("importance", "weights"))
        x, mask = _like(device, dtype, 1, tokens, width), _like(device, torch.bool, 1, tokens)
        job = recursion.Job(x, tokens // 10, mask, start, importance, 0.5, mode == "sum", weights)
        return greedy.case(job)

    found = [case(*each) for each in itertools.product(DTYPES, (577, 2880), (896, 4096))]
    found += [case(torch.bfloat16, 577, 4096, mode) for mode in ("start", "sum", "importance", "weights")]
    found += [case(torch.bfloat16, 16384, 4096, mode) for mode in ("", "start", "sum", "importance", "weights")]
    yield from filter(None, found)


def _rows(device: torch.device) -> Iterator[Case]:
    from vtc.ops.kernels import rows

    def case(dtype: torch.dtype, groups: int, share: int, steps: int, width: int, every: bool = False) -> Case | None:
        query = _like(device, dtype, 1, groups * share, steps, width)
        key = _like(device, dtype, 1, groups, 900, width)
        position, mask = _like(device, torch.long, 1, steps), _like(device, torch.bool, 1, 900)
        counted, allowed = _like(device, torch.bool, 1, steps), _like(device, torch.bool, 1, steps, 900)
        rest = (allowed, 1, 1.0) if every else (None, None, None)
        return rows.case(query, key, position, counted, mask, *rest)

    heads = ((32, 1, 64, 128), (4, 7, 64, 128), (2, 7, 1, 64))
    found = [case(dtype, *shape) for dtype, shape in itertools.product(DTYPES, heads)]
    found += [case(torch.bfloat16, 4, 2, 64, 256, True), case(torch.float32, 32, 1, 64, 96, True)]
    yield from filter(None, found)


def _transition(device: torch.device) -> Iterator[Case]:
    from vtc.ops.kernels import transition

    for dtype, width in itertools.product(DTYPES, (896, 3584, 4096)):
        x, mask = _like(device, dtype, 1, 9, width), _like(device, torch.bool, 1, 9)
        if case := transition.case(x, x, mask, False):
            yield case


def _gather(device: torch.device) -> Iterator[Case]:
    from vtc.ops.kernels import gather as kernels

    index = _like(device, torch.long, 1, 9)
    words, flags = (torch.zeros(1, 9, dtype=dtype, device=device) for dtype in (torch.long, torch.bool))
    for dtype in DTYPES:
        hidden, keys = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((1, 9, 4096), (1, 8, 9, 128)))
        for tensors, dims in (([hidden], [1]), ([hidden, words, flags], [1, 1, 1]), ([keys] * 4, [2] * 4)):
            for launch in kernels.launches(tensors, dims):
                if case := kernels.case(launch, index):
                    yield case
