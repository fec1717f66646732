"""Layouts, masks, and taking newlines out and finding the way back."""

from __future__ import annotations

import pytest
import torch

from vtc.tokens import Layout, Segment, VisualTokens

# thumbnail 2x2, crops 2x3 with a newline after each row, a lone separator: 4 + 8 + 1 tokens
ANYRES = Layout(
    13, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 8, (2, 3), newline=True), Segment("newline", 12, 1))
)
NEWLINES = [7, 11, 12]


def make(*layouts: Layout, pad: int = 0) -> VisualTokens:
    n = max(layout.length for layout in layouts) + pad
    features = torch.full((len(layouts), n, 2), torch.nan)
    cls = torch.zeros(len(layouts), n)
    for g, layout in enumerate(layouts):
        features[g, : layout.length, 0] = torch.arange(layout.length)
        features[g, : layout.length, 1] = g
        cls[g, : layout.length] = torch.arange(layout.length) + 1.0
    return VisualTokens(features, layouts, tuple(range(len(layouts))), {"cls": cls})


def test_newlines_are_found_where_the_rows_end():
    assert ANYRES.newlines() == NEWLINES
    assert Layout.plain(9, (3, 3)).newlines() == []
    assert [s.kind for s in ANYRES.of_kind("crops")] == ["crops"]


def test_segments_must_cover_the_image_in_order():
    with pytest.raises(ValueError, match="starts at 5"):
        Layout(9, (Segment("image", 0, 4), Segment("image", 5, 4)))
    with pytest.raises(ValueError, match="cover 4 tokens of 9"):
        Layout(9, (Segment("image", 0, 4),))


def test_mask_and_where_leave_padding_and_newlines_out():
    tokens = make(ANYRES, Layout.plain(5), pad=2)
    assert tokens.mask.sum(1).tolist() == [13, 5]
    assert tokens.mask[1].tolist() == [True] * 5 + [False] * 10
    assert tokens.where("thumbnail").int().argmax(1).tolist() == [0, 0]
    assert tokens.where("thumbnail").sum(1).tolist() == [4, 0]
    assert tokens.where("crops")[0].tolist() == [4 <= i < 12 and i not in NEWLINES for i in range(15)]
    assert tokens.where("image", "crops").sum(1).tolist() == [6, 5]


def test_a_layout_without_newlines():
    bare = ANYRES.without_newlines()
    assert bare.length == 10
    assert bare.newlines() == []
    assert [(s.kind, s.start, s.length, s.grid) for s in bare.segments] == [
        ("thumbnail", 0, 4, (2, 2)),
        ("crops", 4, 6, (2, 3)),
    ]
    assert Layout.plain(7).without_newlines() == Layout.plain(7)


def test_tokens_without_newlines_know_where_they_stood():
    tokens = make(ANYRES, Layout.plain(5), pad=2)
    bare, index = tokens.without_newlines()
    assert bare.lengths == (10, 5)
    stood = [i for i in range(13) if i not in NEWLINES]
    assert index[0].tolist() == stood
    assert index[1, :5].tolist() == list(range(5))
    assert bare.features[0, :, 0].tolist() == stood
    assert bare.signals["cls"][0].tolist() == [i + 1.0 for i in stood]
    assert bare.signals["cls"][1].tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]  # padding stays 0
    assert bare.ordinals == tokens.ordinals
