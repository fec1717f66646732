"""keep -> counts: what is refused, and how a fraction is rounded."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtc.budget import check_keep, count


@pytest.mark.parametrize(
    ("keep", "error", "words"),
    [
        (0, ValueError, ["keep=0", "at least 1"]),
        (-3, ValueError, ["keep=-3"]),
        (0.0, ValueError, ["keep=0.0"]),
        (-0.5, ValueError, ["keep=-0.5"]),
        (1.5, ValueError, ["keep=1.5", "(0, 1]"]),
        (64.0, ValueError, ["keep=64.0", "keep=64"]),
        (math.nan, ValueError, ["nan"]),
        (math.inf, ValueError, ["inf"]),
        (True, TypeError, ["True"]),
        ("0.5", TypeError, ["'0.5'"]),
        (None, TypeError, ["None"]),
        (1j, TypeError, ["1j"]),
    ],
)
def test_a_bad_keep_is_named(keep, error, words):
    with pytest.raises(error) as caught:
        check_keep(keep)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("keep", "kind"), [(1, int), (1.0, float), (np.int64(5), int), (np.float32(0.25), float), (Fraction(1, 4), float)]
)
def test_numbers_become_plain(keep, kind):
    assert type(check_keep(keep)) is kind
    assert check_keep(keep) == keep


@pytest.mark.parametrize(
    ("keep", "n", "expected"),
    [
        (0.098, 576, 56),  # DivPrune's published setting
        (0.5, 5, 2),  # halves to even, as Python rounds
        (0.5, 7, 4),
        (0.001, 576, 1),
        (1.0, 576, 576),
        (1, 576, 1),
        (64, 576, 64),
        (0.25, 0, 0),
    ],
)
def test_counts(keep, n, expected):
    assert count(keep, n) == expected


def test_more_than_there_are_is_all_with_a_warning():
    with pytest.warns(UserWarning, match=r"keep=64.*10 visual tokens"):
        assert count(64, 10) == 10


@given(keep=st.floats(0, 1, exclude_min=True), n=st.integers(1, 5000))
def test_a_fraction_keeps_at_least_one_at_most_all(keep, n):
    k = count(keep, n)
    assert 1 <= k <= n
    assert abs(k - keep * n) <= 0.5 or k == 1
