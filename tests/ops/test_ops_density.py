"""Density peaks against loops by hand, and exact distances."""

from __future__ import annotations

import math

import pytest
import torch
from nosync import NoSync
from torch import Tensor

from vtc.ops import density_peaks, squared_distances, to_peaks


def by_hand(rows: list[list[float]], neighbors: int) -> list[float]:
    """As the paper has it, one pair at a time; of equal tokens the first leads."""
    n = len(rows)
    distance = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    spread = [sum(sorted(row)[:neighbors]) / min(neighbors, n) for row in distance]
    scores = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if spread[j] < spread[i] or (spread[j] == spread[i] and j < i)]
        apart = min(denser) if denser else max(max(row) for row in distance)
        scores.append(math.sqrt(apart) * math.exp(-spread[i]))
    return scores


def drawn(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("neighbors", [1, 4, 30])
def test_scores_are_those_of_loops(neighbors: int) -> None:
    x = drawn(17)
    scores = density_peaks(squared_distances(x), torch.ones(17, dtype=torch.bool), neighbors)
    assert scores.tolist() == pytest.approx(by_hand(x.tolist(), neighbors), rel=1e-5)


def test_of_equal_tokens_the_first_leads_and_the_others_are_no_centres() -> None:
    x = drawn(6).repeat(2, 1)
    scores = density_peaks(squared_distances(x), torch.ones(12, dtype=torch.bool), 4)
    assert scores[6:].tolist() == [0.0] * 6
    assert (scores[:6] > 0).all()


def test_a_set_alone_is_the_same_beside_others_and_padding_may_be_anything() -> None:
    sizes, x = (9, 3, 1, 0), torch.full((4, 12, 5), math.nan)
    for row, n in enumerate(sizes):
        x[row, :n] = drawn(n, seed=row) * 10.0**row
    mask = torch.arange(12) < torch.tensor(sizes)[:, None]
    with NoSync():
        together = density_peaks(squared_distances(x, mask), mask, 4)
    for row, n in enumerate(sizes):
        alone = density_peaks(squared_distances(x[row, :n]), mask[row, :n], 4)
        assert together[row, :n].equal(alone)
        assert (together[row, n:] == -torch.inf).all()


def test_distances_are_exact_symmetric_and_zero_between_equal_rows() -> None:
    x = drawn(40, 300) * 1000
    x[7], x[9], x[11] = x[3], 0.0, 0.0
    found = squared_distances(x)
    assert found.equal(found.mT)
    assert found[3, 7] == found[9, 11] == found[5, 5] == 0
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert squared_distances(x[shuffled]).equal(found[shuffled][:, shuffled])


def test_rows_of_zeros_and_no_rows() -> None:
    assert squared_distances(torch.zeros(3, 4)).equal(torch.zeros(3, 3, dtype=torch.float64))
    assert squared_distances(torch.zeros(2, 0, 4)).shape == (2, 0, 0)
    assert density_peaks(torch.zeros(2, 0, 0), torch.ones(2, 0, dtype=torch.bool), 4).shape == (2, 0)


def test_neighbours_of_each_set() -> None:
    x, mask = drawn(12), torch.ones(2, 12, dtype=torch.bool)
    apart = squared_distances(x).expand(2, -1, -1)
    found = density_peaks(apart, mask, torch.tensor([[2], [30]]))
    assert found[0].equal(density_peaks(apart[0], mask[0], 2))
    assert found[1].equal(density_peaks(apart[1], mask[1], 30))


def grouped(x: Tensor, mask: Tensor, k: Tensor) -> Tensor:
    apart = squared_distances(x, mask)
    return to_peaks(apart, density_peaks(apart / x.shape[-1], mask, k.clamp(min=1)), k)


def test_centres_are_in_the_middle_of_clouds() -> None:
    """Two clouds far apart: one centre each, and everybody goes to their own."""
    cloud = 0.1 * drawn(10)
    x, mask = torch.cat([cloud[:6], cloud[6:] + 50.0])[None], torch.ones(1, 10, dtype=torch.bool)
    with NoSync():
        group = grouped(x, mask, torch.tensor([[2]]))[0]
    first, second = (set(part.tolist()) for part in (group[:6], group[6:]))
    assert len(first) == len(second) == 1
    assert first < set(range(6))
    assert second < set(range(6, 10))


def test_centres_of_equal_rows_and_none() -> None:
    x, mask = torch.ones(2, 6, 3), torch.arange(6) < torch.tensor([[6], [4]])
    group = grouped(x, mask, torch.tensor([[3], [0]]))
    assert group[0].tolist() == [0, 1, 2, 0, 0, 0]  # the lowest index, of which the first is the densest
    assert group[1].tolist() == [6] * 6
    assert grouped(x[:, :0], mask[:, :0], torch.tensor([[1], [1]])).shape == (2, 0)
