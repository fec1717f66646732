"""HiPrune against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import math

import pytest
import torch
from asking import keep_mask
from nosync import NoSync
from test_methods_saliency import compare, embeddings, looked, regions
from torch import Tensor

import vtc
from vtc.methods.grids import neighbours
from vtc.methods.hiprune import HiPrune
from vtc.tokens import Layout, Segment, VisualTokens

ANYRES = Layout(
    4 + 15,
    (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 15, (3, 4), True, (1, 2), (0, 0, 0), (0, 0, 0, 1))),
)
"""A thumbnail of 2 x 2 tokens, and crops of 3 x 3 and 3 x 1, whose rows end in newlines (8, 13, 18)."""
PICTURES = [([0, 1, 2, 3], 2), ([4, 5, 6, 9, 10, 11, 14, 15, 16], 3), ([7, 12, 17], 1)]


def by_hand(
    shallow: Tensor,
    deep: Tensor,
    k: int,
    pictures: list[tuple[list[int], int]],
    alpha: float = 0.1,
    wraps: bool = True,
    released: bool = False,
) -> list[int]:
    """Anchors, then buffers, then registers; of more buffers than there is room for, those that registers prefer."""
    by_deep = sorted(range(len(deep)), key=lambda i: (-float(deep[i]), i))
    number = round(k * alpha / 5)
    number = number if released or not alpha else max(1, number)
    anchors = sorted(range(len(shallow)), key=lambda i: (-float(shallow[i]), i))[:number]
    buffers = set()
    for own, columns in pictures:
        for at, token in enumerate(own):
            if token not in anchors:
                continue
            row, column = divmod(at, columns)
            if wraps:
                buffers |= {own[min(max(at + step, 0), len(own) - 1)] for step in (-columns, columns, -1, 1)}
            else:
                around = (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)
                rows = len(own) // columns
                buffers |= {own[r * columns + c] for r, c in around if 0 <= r < rows and 0 <= c < columns}
    chosen = anchors + [i for i in by_deep if i in buffers and i not in anchors]
    chosen += [i for i in by_deep if i not in chosen]
    return sorted(chosen[:k])


def drawn(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(n, generator=generator) for name in ("received_shallow", "received")}


def selected(layout: Layout, k: int, signals: dict[str, Tensor], **options: object) -> list[int]:
    features = torch.full((layout.length, 2), math.nan)  # nobody looks at them
    found = vtc.select("hiprune", features, keep=k, signals=signals, layout=layout, **options)
    assert found.order is None
    return found.index.tolist()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3, 12, 30, 62])
def test_it_keeps_what_loops_keep(k: int, alpha: float, wraps: bool, released: bool) -> None:
    for seed in range(4):
        signals = drawn(63, seed)
        expected = by_hand(*signals.values(), k, [([*range(63)], 9)], alpha, wraps, released)
        options = {"alpha": alpha, "wraps": wraps, "released": released}
        assert selected(Layout.plain(63, (7, 9)), k, signals, **options) == expected


@pytest.mark.parametrize("wraps", [False, True])
def test_neighbours_are_those_within_a_picture(wraps: bool) -> None:
    for seed in range(8):
        signals = drawn(19, seed)
        for row in signals.values():
            row[[8, 13, 18]] = 0.0
        for k in (4, 9, 18):
            expected = by_hand(*signals.values(), k, PICTURES, 0.9, wraps)
            assert selected(ANYRES, k, signals, alpha=0.9, wraps=wraps) == expected


def test_newlines_leave_first_or_stay_unasked() -> None:
    signals = drawn(19)
    for row in signals.values():
        row[[8, 13, 18]] = 0.0
    assert selected(ANYRES, 16, signals) == [i for i in range(19) if i not in (8, 13, 18)]
    kept = selected(ANYRES, 7, signals, newlines="keep", alpha=0.9)
    assert {8, 13, 18} < set(kept)
    assert len(kept) == 7  # with an int, all of what stays after the call


def test_an_unknown_grid_is_one_row() -> None:
    assert neighbours([Layout.plain(3), Layout.plain(2, (2, 1))], 4, False).tolist() == [
        [[-1, -1, -1, 1], [-1, -1, 0, 2], [-1, -1, 1, -1], [-1] * 4],
        [[-1, 1, -1, -1], [0, -1, -1, -1], [-1] * 4, [-1] * 4],
    ]
    signals = drawn(30)
    assert selected(Layout.plain(30), 9, signals, alpha=0.6) == by_hand(
        *signals.values(), 9, [([*range(30)], 30)], alpha=0.6
    )


def test_ties_go_to_the_first() -> None:
    level = dict.fromkeys(("received", "received_shallow"), torch.ones(16))
    assert selected(Layout.plain(16, (4, 4)), 4, level, wraps=False) == [0, 1, 2, 4]
    level["received_shallow"] = level["received_shallow"].scatter(0, torch.tensor(9), 2.0)
    assert selected(Layout.plain(16, (4, 4)), 6, level) == [0, 5, 8, 9, 10, 13]


def test_a_ragged_batch_of_which_some_left_before() -> None:
    layouts = Layout.plain(30, (5, 6)), ANYRES, Layout.plain(9)
    signals = {name: torch.zeros(3, 33) for name in ("received", "received_shallow")}
    alive = torch.zeros(3, 33, dtype=torch.bool)
    for g, layout in enumerate(layouts):
        for name, row in drawn(layout.length, seed=g).items():
            signals[name][g, : layout.length] = row
        alive[g, : layout.length] = True
    alone = []
    for g, layout in enumerate(layouts):
        own = {name: row[g, : layout.length] for name, row in signals.items()}
        alone.append(
            vtc.select(HiPrune(keep=0.4, alpha=0.9), torch.zeros(layout.length, 2), signals=own, layout=layout)
        )
    tokens = VisualTokens(torch.full((3, 33, 2), math.nan), layouts, (0, 1, 2), signals)
    together, counts = keep_mask(HiPrune(keep=0.4, alpha=0.9), tokens)
    assert counts == (12, 8, 4)
    assert [row.nonzero()[:, 0].tolist() for row in together] == [found.index.tolist() for found in alone]

    alive[:, ::4] = False
    left = tuple(alive.sum(1).tolist())
    tokens = VisualTokens(tokens.features, layouts, (0, 1, 2), signals, alive=alive, alive_counts=left)
    together, counts = keep_mask(HiPrune(keep=0.4, alpha=0.9), tokens)
    assert counts == tuple(round(0.4 * n) for n in left) == tuple(together.sum(1).tolist())
    assert not (together & ~alive).any()


def test_nobody_waits_for_the_device() -> None:
    signals = {name: row[None] for name, row in drawn(19).items()}
    tokens = VisualTokens(torch.zeros(1, 19, 2), (ANYRES,), (0,), signals)
    for wraps in (False, True):
        with NoSync():
            keep_mask(HiPrune(keep=0.4, wraps=wraps), tokens)
            keep_mask(HiPrune(keep=0.4, wraps=wraps, newlines="keep"), tokens)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"alpha": 1.5}, ValueError, "alpha=1.5"),
        ({"alpha": True}, TypeError, "alpha=True"),
        ({"shallow": 1.0}, ValueError, "shallow=1.0"),
        ({"deep": -0.5}, ValueError, "deep=-0.5"),
        ({"wraps": "yes"}, TypeError, "wraps='yes'"),
        ({"released": 0}, TypeError, "released=0"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        HiPrune(**options)


def test_structure_that_was_not_recorded_is_refused() -> None:
    """The engine asks before it guesses a grid."""
    assert HiPrune().reads_layout


@pytest.mark.parametrize("kind", ["received", "cls"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_end_to_end(family: str, kind: str) -> None:
    """Index 1 of the tower's 3 layers is a third of it; the last but one is that as well, so others are tried too."""
    for options, layers in (({}, (1, 1)), ({"shallow": 0.0, "deep": -1}, (0, 2))):
        shallow, deep = (looked(family, kind, layer) for layer in layers)
        keep = [
            by_hand(a, b, max(1, round(0.5 * len(x))), own, alpha=0.7)
            for x, a, b, own in zip(embeddings(family), shallow, deep, regions(family), strict=True)
        ]
        compare(family, HiPrune(keep=0.5, alpha=0.7, saliency=kind, **options), keep)
