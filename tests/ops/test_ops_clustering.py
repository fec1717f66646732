"""Density peaks and squared distances; rows of attention one by one."""

from __future__ import annotations

import torch
from nosync import NoSync

from vtc import ops
from vtc.ops.scores import row_attention


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def test_squared_distances_are_those_of_loops_and_equal_rows_have_none() -> None:
    x = rows(9)
    x[4], x[7] = x[1], 0.0
    found = ops.squared_distances(x[None], torch.ones(1, 9, dtype=torch.bool))[0]
    for i in range(9):
        for j in range(9):
            assert abs(float(found[i, j]) - float((x[i] - x[j]).double().square().sum())) < 1e-5
    assert found[1, 4] == 0
    assert torch.equal(found[1], found[4])
    assert torch.equal(found, found.mT)


def test_distances_have_the_same_bits_in_every_batch_and_scale() -> None:
    x = torch.full((2, 12, 5), torch.nan)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    x[0, :7], x[1], mask[0, :7], mask[1] = rows(7), 1e3 * rows(12, 1), True, True
    together = ops.squared_distances(x, mask)
    alone = ops.squared_distances(x[:1, :7], mask[:1, :7])
    assert torch.equal(together[0, :7, :7], alone[0])
    assert torch.isinf(together[0, 7:]).all()
    assert torch.isinf(together[0, :, 7:]).all()
    assert torch.equal(ops.squared_distances(x[:1, :7] / 1024, mask[:1, :7]), alone / 1024**2)


def test_centres_are_in_the_middle_of_clouds() -> None:
    """Two clouds far apart: one centre each, and everybody goes to their own."""
    cloud = 0.1 * rows(10)
    x = torch.cat([cloud[:6], cloud[6:] + 50.0])[None]
    mask, two = torch.ones(1, 10, dtype=torch.bool), torch.tensor([[2]])
    with NoSync():
        group = ops.density_peaks(x, mask, two, two)
    first, second = (set(part.tolist()) for part in (group[0, :6], group[0, 6:]))
    assert len(first) == len(second) == 1
    assert first < set(range(6))
    assert second < set(range(6, 10))


def test_equal_rows_and_no_centres() -> None:
    x, mask = torch.ones(2, 6, 3), torch.arange(6) < torch.tensor([[6], [4]])
    group = ops.density_peaks(x, mask, torch.tensor([[3], [0]]), torch.tensor([[3], [1]]))
    assert group[0].tolist() == [0, 1, 2, 0, 0, 0]  # the lowest index, of which the first is the densest
    assert group[1].tolist() == [6] * 6
    assert ops.density_peaks(x[:, :0], mask[:, :0], torch.tensor([[1], [1]]), torch.tensor([[1], [1]])).shape == (2, 0)


def test_rows_one_by_one_are_what_their_mean_is_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 70, 8, generator=generator), torch.randn(2, 2, 90, 8, generator=generator)
    counted = torch.arange(70) >= torch.tensor([[0], [66]])
    mask = torch.arange(90) >= torch.tensor([[0], [3]])
    each = row_attention(query, key, 0.3, counted=counted, mask=mask, each=True)
    mean = row_attention(query, key, 0.3, counted=counted, mask=mask)
    assert each.shape == (2, 70, 90)
    assert not each[~counted].any()
    torch.testing.assert_close(each.sum(1) / counted.sum(1, keepdim=True), mean)
    for b, t in ((0, 0), (0, 69), (1, 67)):
        logits = torch.stack([query[b, h, t] @ key[b, h // 2].T for h in range(4)]) * 0.3
        seen = (torch.arange(90) <= 20 + t) & mask[b]
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        torch.testing.assert_close(each[b, t], weights)
