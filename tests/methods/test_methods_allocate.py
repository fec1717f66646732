"""Allocators: who shares a budget with whom; and the parts of an image that they share it between."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import keep_mask
from hypothesis import given
from hypothesis import strategies as st
from nosync import NoSync
from test_globalcom2 import SHAPES, alone, tokens_of, video

from vtc import ops
from vtc.budget import apportioned, count, share, truncated
from vtc.methods.allocate import Allocate
from vtc.methods.divprune import DivPrune
from vtc.methods.grid import Grid
from vtc.methods.random import Random
from vtc.methods.transprune import TransPrune
from vtc.tokens import Layout, Segment

IMAGES = (SHAPES[1], video(3, 9), alone(), Layout.plain(11))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_apportioning_adds_up_and_is_fair(sizes, part):
    total = int(part * sum(sizes))
    counts = apportioned(total, sizes)
    assert sum(counts) == total
    for k, n in zip(counts, sizes, strict=True):
        assert 0 <= k <= n
        assert abs(k - total * n / max(sum(sizes), 1)) < 1


def test_apportioning_gives_the_rest_to_the_largest_remainders_then_the_first():
    assert apportioned(5, (3, 3, 3)) == (2, 2, 1)
    assert apportioned(4, (1, 6, 3)) == (1, 2, 1)
    with pytest.raises(ValueError, match="total=4"):
        apportioned(4, (1, 2))


def test_truncation_and_shares():
    assert truncated(0.1, 576) == 57
    assert truncated(0.29, 100) == 29  # the product is 28.999999999999996
    assert share(64, 256) == 0.25
    assert share(300, 256) == 1.0
    assert share(0.3, 7) == 0.3


@pytest.mark.parametrize("by", ["uniform", "image", "frame"])
@pytest.mark.parametrize("keep", [0.3, 7, 1, 1.0])
@pytest.mark.parametrize("selector", [DivPrune(), Random(), Grid()])
def test_totals_are_those_of_keep_and_an_image_alone_keeps_the_same(by, keep, selector):
    method = Allocate(keep=keep, by=by, selector=selector)
    mask, counts = keep_mask(method, tokens_of(*IMAGES, pad=2))
    assert mask.sum(1).tolist() == list(counts)
    for g, layout in enumerate(IMAGES):
        newlines = layout.newlines()
        assert counts[g] == count(keep, layout.length - len(newlines)) + len(newlines)
        assert mask[g, newlines].all()
        one = dataclasses.replace(tokens_of(layout), ordinals=(g,))
        assert torch.equal(keep_mask(method, one)[0][0], mask[g, : layout.length])


def test_uniform_gives_every_part_the_same_share():
    layout = SHAPES[0]
    mask, _ = keep_mask(Allocate(keep=0.25), tokens_of(layout))
    assert [int(mask[0, list(part.tokens)].sum()) for part in layout.regions()] == [9] * 5


def test_by_image_is_the_selector_itself():
    tokens = tokens_of(*IMAGES)
    ours = keep_mask(Allocate(keep=0.3, by="image", selector=DivPrune()), tokens)
    theirs = keep_mask(DivPrune(keep=0.3, newlines="keep"), tokens)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_by_frame_splits_videos_alone():
    tokens = tokens_of(*IMAGES)
    mask, _ = keep_mask(Allocate(keep=0.34, by="frame"), tokens)
    frames = IMAGES[1].regions()
    assert [int(mask[1, list(part.tokens)].sum()) for part in frames] == [3, 3, 3]
    whole, _ = keep_mask(Allocate(keep=0.34, by="image"), tokens)
    assert torch.equal(mask[0], whole[0])
    picks = ops.farthest_first(tokens.features[1, :9], 3)
    assert set(mask[1, :9].nonzero()[:, 0].tolist()) == set(picks.tolist())


def test_parts_draw_different_random_numbers():
    tokens = tokens_of(video(4, 40))
    mask, _ = keep_mask(Allocate(keep=0.25, selector=Random()), tokens)
    rows = {tuple(mask[0, 40 * f : 40 * f + 40].tolist()) for f in range(4)}
    assert len(rows) == 4


def test_allocating_does_not_wait_for_the_device():
    tokens = tokens_of(*IMAGES)
    with NoSync():
        keep_mask(Allocate(keep=0.3), tokens)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"by": "crop"}, ValueError, "'crop'"),
        ({"selector": None}, TypeError, "selector"),
        ({"selector": TransPrune()}, ValueError, "vtc.Chain"),
        ({"newlines": "candidates"}, ValueError, "newlines"),
    ],
)
def test_bad_options_are_named(options, error, word):
    with pytest.raises(error, match=word):
        Allocate(**options)


# --- parts


def test_the_parts_of_a_cut_image():
    layout = Layout(
        4 + 8,
        (
            Segment("thumbnail", 0, 4, (2, 2)),
            Segment("crops", 4, 8, (2, 3), True, (1, 2), (0, 0), (0, 1, 1)),
        ),
    )
    parts = layout.regions()
    assert [(p.kind, p.tokens, p.cell, p.mosaic) for p in parts] == [
        ("thumbnail", (0, 1, 2, 3), 0, None),
        ("crops", (4, 8), 0, (1, 2)),
        ("crops", (5, 6, 9, 10), 1, (1, 2)),
    ]
    assert [p.layout.segments[0].grid for p in parts] == [(2, 2), (2, 1), (2, 2)]
    assert [p.tokens for p in layout.without_newlines().regions()] == [(0, 1, 2, 3), (4, 7), (5, 6, 8, 9)]


@pytest.mark.parametrize("layout", [*SHAPES, video(3, 9), alone(), Layout.plain(5)], ids=lambda x: str(x.length))
def test_parts_cover_everything_but_newlines_once(layout):
    tokens = sorted(i for part in layout.regions() for i in part.tokens)
    assert tokens == sorted(set(range(layout.length)) - set(layout.newlines()))
    assert all(part.layout.length == len(part.tokens) for part in layout.regions())


def test_splitting_finds_every_token_again():
    tokens = tokens_of(*IMAGES, pad=1)
    parts = [layout.regions() for layout in tokens.layouts]
    pieces, place = tokens.split(parts)
    n = tokens.features.shape[1]
    flat = [(g, part) for g, own in enumerate(parts) for part in own]
    for row, (g, part) in enumerate(flat):
        k = len(part.tokens)
        assert place[row, :k].tolist() == [g * n + i for i in part.tokens]
        assert (place[row, k:] == len(IMAGES) * n).all()
        assert torch.equal(pieces.features[row, :k], tokens.features[g, list(part.tokens)])
        assert torch.equal(pieces.signals["cls"][row, :k], tokens.signals["cls"][g, list(part.tokens)])
        assert not pieces.signals["cls"][row, k:].any()
    assert len(set(pieces.ordinals)) == len(flat)


def test_geometry_that_does_not_fit_the_grid_is_named():
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        Segment("crops", 0, 8, (2, 3), True, (1, 2), (0, 0), (0,))
