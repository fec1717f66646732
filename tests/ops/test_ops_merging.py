"""vtc.ops.merging against loops, and its promise that no batch changes a bit."""

from __future__ import annotations

import math

import torch
from nosync import NoSync

from vtc import ops


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_are_cosines() -> None:
    x, y = drawn(0, 2, 30, 48), drawn(1, 2, 7, 48)
    expected = torch.nn.functional.normalize(x.double(), dim=-1) @ torch.nn.functional.normalize(y.double(), dim=-1).mT
    torch.testing.assert_close(ops.cosines(x, y), expected, rtol=0, atol=1e-7)
    assert torch.equal(ops.cosines(x), ops.cosines(x, x))


def test_cosines_have_the_same_bits_in_every_batch_and_tie_for_equal_rows() -> None:
    x = drawn(0, 1, 50, 333)
    x[0, 31] = x[0, 4] * 2  # as long as it likes
    like = ops.cosines(x)
    assert torch.equal(like[..., 31], like[..., 4])
    wide = torch.cat([drawn(2, 1, 90, 333), torch.cat([x, drawn(3, 1, 40, 333)], 1)])
    assert torch.equal(ops.cosines(wide)[1, :50, :50], like[0])


def test_rows_without_a_direction_are_like_nothing() -> None:
    x = drawn(0, 1, 4, 5)
    x[0, 1], x[0, 2, 0], x[0, 3, 0] = 0.0, math.nan, math.inf
    like = ops.cosines(x)
    assert like[0, 1:].abs().sum() == like[0, :, 1:].abs().sum() == 0
    assert like[0, 0, 0] == 1 or abs(like[0, 0, 0] - 1) < 1e-7


def test_nearest_takes_the_first_of_equals_and_only_those_who_are_there() -> None:
    like = torch.tensor([[[0.1, 0.5, 0.5], [0.9, 0.2, 0.3], [0.0, -1.0, 0.2]]]).repeat(2, 1, 1)
    joins = torch.tensor([[True, True, False], [True, True, True]])
    there = torch.tensor([[True, True, True], [False, False, False]])
    assert ops.nearest(like, joins, there).tolist() == [[1, 0, 3], [3, 3, 3]]
    there = torch.tensor([[False, True, True], [True, False, False]])
    assert ops.nearest(like, joins, there).tolist() == [[1, 2, 3], [0, 0, 0]]
    assert ops.nearest(like[..., :0], joins, there[:, :0]).tolist() == [[0, 0, 0]] * 2


def test_gathered_sums_each_group() -> None:
    x, group = drawn(0, 2, 9, 4), torch.randint(0, 4, (2, 9), generator=torch.Generator().manual_seed(1))
    x[0, 3], group[0, 3] = math.nan, 3  # in no group
    total, size = ops.gathered(x, group, 3)
    for g in range(2):
        for k in range(3):
            rows = x[g][group[g] == k].double()
            torch.testing.assert_close(total[g, k], rows.sum(0))
            assert size[g, k] == len(rows)


def test_nothing_waits_for_the_device() -> None:
    x, there = drawn(0, 2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    with NoSync():
        ops.gathered(x, ops.nearest(ops.cosines(x), there, there), 9)
