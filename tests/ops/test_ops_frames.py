"""Cosines from frame to frame, shares of a budget, and windows that stand still, against loops by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync

from vtc.ops import frames
from vtc.ops.frames import STEP, highest_of_each, in_shares, matched_cosines, still_windows


def test_cosines_are_those_of_torch_and_exact_where_rows_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 9, 33, generator=torch.Generator().manual_seed(0))
    x[2, 3], x[1, 4], x[2, 4] = 0.0, x[0, 4] * 3, x[0, 4] * 3
    with NoSync():
        found = matched_cosines(x[1:], x[:-1])
    expected = torch.nn.functional.cosine_similarity(x[1:].double(), x[:-1].double(), dim=-1)
    assert (found - expected).abs().max() <= STEP
    assert found[0, 4] == found[1, 4] == 1
    assert found[1, 3] == found[2, 3] == 0
    monkeypatch.setattr(frames, "ENTRIES", 40)
    assert matched_cosines(x[1:], x[:-1]).equal(found)
    assert matched_cosines(x, x[:, :1])[:, 0].tolist() == [1, 1, 1, 1]
    assert matched_cosines(x[:0], x[:0]).shape == (0, 9)


def test_the_highest_of_each_row_and_ties_to_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -torch.inf, 1.0, 2.0]])
    kept = highest_of_each(scores, torch.tensor([1, 3, 0]))
    assert kept.tolist() == [[False, True, False, False], [True, True, True, False], [False] * 4]
    assert highest_of_each(scores, 2).tolist()[0] == [False, True, True, False]


def shared_by_hand(weights: list[float], total: int, most: int) -> list[int]:
    """Who would get more than most gets most, until nobody does; then whole numbers, by largest remainder."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in full]
        left = total - most * len(full)
        unit = left / sum(weights[i] for i in rest) if rest else 0.0
        more = {i for i in rest if weights[i] * unit >= most}
        if not more:
            break
        full |= more
    exact = [most if i in full else w * unit for i, w in enumerate(weights)]
    counts = [math.floor(e) for e in exact]
    order = sorted((i for i in range(len(weights)) if counts[i] < most), key=lambda i: -(exact[i] - counts[i]))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=9), st.integers(1, 12), st.floats(0, 1))
def test_shares_add_up_and_are_those_of_loops(weights: list[int], most: int, part: float) -> None:
    total = int(part * most * len(weights))
    parts = torch.tensor(weights) / 64  # exact, so that remainders tie as they do by hand
    counts = in_shares(parts, total, most).tolist()
    assert sum(counts) == total
    assert all(0 <= k <= most for k in counts)
    by_hand = shared_by_hand(parts.tolist(), total, most)
    assert max(abs(a - b) for a, b in zip(counts, by_hand, strict=True)) <= 1  # round-off may break ties of remainders


def test_shares_of_equal_weights_and_of_one_that_is_full() -> None:
    with NoSync():
        in_shares(torch.rand(8), 64, 16)
    assert in_shares(torch.full((7,), 1 / 7), 31, 9).tolist() == [5, 5, 5, 4, 4, 4, 4]
    assert in_shares(torch.tensor([0.7, 0.1, 0.2]), 10, 4).tolist() == [4, 2, 4]
    assert in_shares(torch.tensor([0.5, 0.3, 0.2]), 12, 4).tolist() == [4, 4, 4]
    assert in_shares(torch.tensor([0.5, 0.3, 0.2]), 0, 4).tolist() == [0, 0, 0]


def best_by_hand(still: list[list[bool]], longest: int) -> int:
    """The most that any way of cutting saves."""
    frames, best = len(still) + 1, 0
    for cuts in itertools.product((False, True), repeat=frames - 1):
        ends = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), frames]
        spans = list(itertools.pairwise(ends))
        if max(b - a for a, b in spans) <= longest:
            saved = [
                (b - a - 1) * sum(all(row[p] for row in still[a : b - 1]) for p in range(len(still[0])))
                for a, b in spans
            ]
            best = max(best, sum(saved))
    return best


@pytest.mark.parametrize("longest", [1, 2, 3, 99])
@pytest.mark.parametrize("seed", range(3))
def test_windows_save_the_most(seed: int, longest: int) -> None:
    still = torch.rand(7, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
    windows, static = still_windows(still, longest)
    assert [a for a, _ in windows] == [0, *(b for _, b in windows[:-1])]
    assert windows[-1][1] == 8
    assert max(b - a for a, b in windows) <= longest
    for (a, b), row in zip(windows, static, strict=True):
        assert row.equal(still[a : b - 1].all(0) & (b - a > 1))
    saved = sum((b - a - 1) * int(row.sum()) for (a, b), row in zip(windows, static, strict=True))
    assert saved == best_by_hand(still.tolist(), longest)


def test_one_frame_is_a_window_without_static_places() -> None:
    windows, static = still_windows(torch.zeros(0, 5, dtype=torch.bool), 9)
    assert windows == [(0, 1)]
    assert static.tolist() == [[False] * 5]
