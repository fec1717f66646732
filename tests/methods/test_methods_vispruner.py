"""VisPruner against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import math

import pytest
import torch
from asking import keep_mask
from nosync import NoSync
from test_methods_saliency import compare, embeddings, looked
from torch import Tensor

import vtc
from vtc.methods.vispruner import VisPruner, fine_cosines
from vtc.tokens import Layout, VisualTokens


def by_hand(features: Tensor, cls: Tensor, k: int, important: float = 0.5, released: bool = False) -> list[int]:
    """As the paper tells it: one round, one pair at a time."""
    rows = [[float(v) for v in row] for row in features]
    norms = [math.sqrt(sum(v * v for v in row)) or 1.0 for row in rows]

    def cosine(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / (norms[i] * norms[j])

    order = sorted(range(len(rows)), key=lambda i: (-float(cls[i]), i))
    first = int(k * important)
    rest, wanted = order[first:], k - first
    rest = rest if released else sorted(rest)
    while len(rest) > wanted > 0:
        drop = min(8, len(rest) // 2, len(rest) - wanted)
        a, b = rest[::2], rest[1::2]
        closest = {i: max(cosine(i, j) for j in b) for i in a}
        a = sorted(a, key=lambda i: -closest[i])[drop:]
        rest = a + b if released else sorted(a + b)
    return sorted(order[:first] + (rest if wanted else []))


def drawn(n: int, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("important", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("n", "k"), [(60, 9), (61, 20), (40, 39), (7, 1), (12, 2)])
def test_it_keeps_what_loops_keep(n: int, k: int, important: float, released: bool) -> None:
    x, cls = drawn(n)
    found = vtc.select("vispruner", x, keep=k, signals={"cls": cls}, important=important, released=released)
    assert found.index.tolist() == by_hand(x, cls, k, important, released)
    assert found.order is None


@pytest.mark.parametrize("released", [False, True])
def test_duplicates_rows_of_zeros_and_equal_attention(released: bool) -> None:
    """Cosines of 0 and 1, so that nearly all is a tie: of equals the first in line leaves."""
    generator = torch.Generator().manual_seed(3)
    x = torch.eye(5)[torch.randint(5, (50,), generator=generator)] * 2.0 ** torch.arange(50)[:, None].remainder(4)
    x[::7] = 0.0
    cls = torch.randint(3, (50,), generator=generator).float()
    for k in (4, 11, 30):
        found = vtc.select("vispruner", x, keep=k, signals={"cls": cls}, released=released)
        assert found.index.tolist() == by_hand(x, cls, k, released=released)


def test_float64_features_are_compared_in_float64() -> None:
    """Of the two at the even places, that which is closer to the other by 1e-10 leaves; in float32 they are equal."""
    x = torch.tensor([1 + 1e-10, 0.0, 1.0], dtype=torch.double)
    x = torch.stack([x.cos(), x.sin()], -1)
    options = {"keep": 2, "important": 0.0, "signals": {"cls": torch.zeros(3)}}
    assert vtc.select("vispruner", x, **options).index.tolist() == [0, 1]
    assert vtc.select("vispruner", x.float(), **options).index.tolist() == [1, 2]


def test_fine_cosines_are_fine_and_the_same_in_every_batch() -> None:
    x = torch.randn(3, 30, 900, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 0.0
    found = fine_cosines(x)
    exact = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(found, exact @ exact.mT, rtol=0, atol=1e-12)
    assert torch.equal(fine_cosines(x[1:2, 5:20])[0], found[1, 5:20, 5:20])
    assert not found[0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("released", [False, True])
def test_a_ragged_batch_worked_off_in_parts(
    released: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (50, 9, 31)
    features, cls = torch.full((3, 55, 64), math.nan, dtype=dtype), torch.zeros(3, 55)
    for g, n in enumerate(lengths):
        x, row = drawn(n, 64, seed=g)
        features[g, :n], cls[g, :n] = x[torch.arange(n) % 23], row[torch.arange(n) % 5]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2), {"cls": cls})
    method = VisPruner(keep=0.3, released=released)
    together, counts = keep_mask(method, tokens)
    assert counts == (15, 3, 9)
    assert together.sum(1).tolist() == [15, 3, 9]
    monkeypatch.setattr("vtc.methods.vispruner.ENTRIES", 1)
    assert torch.equal(keep_mask(method, tokens)[0], together)
    for g, n in enumerate(lengths):
        alone = vtc.select(method, features[g, :n], signals={"cls": cls[g, :n]})
        assert alone.index.tolist() == together[g].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("released", [False, True])
def test_beside_a_longer_image_nobody_is_compared_with_padding(released: bool) -> None:
    """All cosines are negative, padding's would be 0: the token at 120 degrees is closer to the one at 0."""
    angle = torch.tensor([170.0, 0.0, 120.0]).deg2rad()
    features = torch.ones(2, 9, 2)
    features[0, :3] = torch.stack([angle.cos(), angle.sin()], -1)
    tokens = VisualTokens(features, (Layout.plain(3), Layout.plain(9)), (0, 1), {"cls": torch.zeros(2, 9)})
    kept, counts = keep_mask(VisPruner(keep=0.67, important=0.0, released=released), tokens)
    assert counts == (2, 6)
    assert kept[0].tolist() == [True, True, *[False] * 7]


def test_tokens_that_left_before_are_nobody() -> None:
    x, cls = drawn(30)
    alive = torch.arange(30) % 3 != 1
    tokens = VisualTokens(
        x.masked_fill(~alive[:, None], math.nan)[None],
        (Layout.plain(30),),
        (0,),
        {"cls": cls[None]},
        alive=alive[None],
        alive_counts=(20,),
    )
    kept, _ = keep_mask(VisPruner(keep=7), tokens)
    index = alive.nonzero()[:, 0]
    assert kept[0].nonzero()[:, 0].tolist() == index[by_hand(x[alive], cls[alive], 7)].tolist()


def test_nobody_waits_for_the_device() -> None:
    x, cls = drawn(24)
    tokens = VisualTokens(x[None], (Layout.plain(24),), (0,), {"cls": cls[None]})
    with NoSync():
        keep_mask(VisPruner(), tokens)
        keep_mask(VisPruner(released=True), tokens)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"important": 1.5}, ValueError, "important=1.5"),
        ({"important": "half"}, TypeError, "important='half'"),
        ({"released": 1}, TypeError, "released=1"),
        ({"saliency": "last"}, ValueError, "saliency='last'"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        VisPruner(**options)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_end_to_end(family: str) -> None:
    keep = [
        by_hand(x, row, max(1, round(0.4 * len(x))))
        for x, row in zip(embeddings(family), looked(family, "cls", -2), strict=True)
    ]
    compare(family, VisPruner(keep=0.4), keep)
