"""HoloV against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import math

import pytest
import torch
from asking import keep_mask
from nosync import NoSync
from test_methods_saliency import compare, embeddings, looked
from torch import Tensor

import vtc
from vtc.methods.holov import HoloV
from vtc.tokens import Layout, VisualTokens


def by_hand(features: Tensor, cls: Tensor, k: int, crops: int | None = None, variant: str = "code") -> list[int]:
    """One crop, one token at a time."""
    n = len(features)
    number = min(n, max(1, 1024 * n // (576 * k)) if crops is None else crops)
    runs, at = [], 0
    for c in range(number):
        length = n // number + (c < n % number)
        runs.append(list(range(at, at + length)))
        at += length
    score = [float(v) for v in cls]
    means = [sum(score[i] for i in run) / len(run) for run in runs]
    whole = sum(means) or 1.0
    quota = [math.floor(mean / whole * k) for mean in means]
    order = sorted(range(number), key=lambda c: -means[c])
    if variant == "code":
        for c in order[: k - sum(quota)]:
            quota[c] += 1
    quota = [min(q, len(run)) for q, run in zip(quota, runs, strict=True)]
    for c in order:
        quota[c] += min(k - sum(quota), len(runs[c]) - quota[c])
    if variant == "paper":
        z = torch.nn.functional.normalize(features.double(), dim=-1)
        for run, mean in zip(runs, means, strict=True):
            spread = []
            for i in run:
                cosines = [float(z[i] @ z[j]) for j in run if j != i]
                middle = sum(cosines) / max(1, len(cosines))
                spread.append(sum((c - middle) ** 2 for c in cosines) / max(1, len(cosines)))
            scale = mean / (sum(spread) / len(run) + 1e-30)
            for i, v in zip(run, spread, strict=True):
                score[i] += scale * v
    kept = []
    for run, q in zip(runs, quota, strict=True):
        kept += sorted(run, key=lambda i: (-score[i], i))[:q]
    assert len(kept) == k
    return sorted(kept)


def drawn(n: int, d: int = 6, seed: int = 0, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), (sharp * torch.randn(n, generator=generator)).softmax(0)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("sharp", [0.5, 4.0])
@pytest.mark.parametrize("crops", [None, 1, 5, 16, 100])
@pytest.mark.parametrize(("n", "k"), [(60, 9), (61, 45), (40, 39), (7, 1)])
def test_it_keeps_what_loops_keep(n: int, k: int, crops: int | None, sharp: float, variant: str) -> None:
    x, cls = drawn(n, sharp=sharp)
    found = vtc.select("holov", x, keep=k, signals={"cls": cls}, crops=crops, variant=variant)
    assert found.index.tolist() == by_hand(x, cls, k, crops, variant)
    assert found.order is None


def test_the_paper_ranks_by_something_else() -> None:
    x, cls = drawn(60, sharp=0.5)
    code, paper = (
        vtc.select("holov", x, keep=20, signals={"cls": cls}, variant=v).index.tolist() for v in ("code", "paper")
    )
    assert code != paper


def test_what_exceeds_a_crop_goes_to_the_next_in_line() -> None:
    """The first of three crops of 4 is looked at alone: it is full at 4, and the rest goes by falling mean."""
    cls = torch.tensor([0.2] * 4 + [0.01] * 4 + [0.02, 0.03, 0.02, 0.02])
    found = vtc.select("holov", torch.ones(12, 2), keep=7, crops=3, signals={"cls": cls})
    assert found.index.tolist() == [0, 1, 2, 3, 8, 9, 10]


def test_ties_rows_of_zeros_and_nothing_looked_at() -> None:
    x = torch.zeros(12, 3)
    for variant in ("code", "paper"):
        found = vtc.select("holov", x, keep=6, crops=3, signals={"cls": torch.zeros(12)}, variant=variant)
        assert len(found.index) == 6
        equal = vtc.select("holov", x, keep=6, crops=3, signals={"cls": torch.ones(12)}, variant=variant)
        assert equal.index.tolist() == [0, 1, 4, 5, 8, 9]
    cls = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, 2.0])
    assert vtc.select("holov", x[:6], keep=3, crops=1, signals={"cls": cls}).index.tolist() == [1, 2, 4]


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_ragged_batch(variant: str) -> None:
    lengths = (50, 9, 31)
    features, cls = torch.full((3, 55, 64), math.nan), torch.zeros(3, 55)
    for g, n in enumerate(lengths):
        x, row = drawn(n, 64, seed=g)
        features[g, :n], cls[g, :n] = x[torch.arange(n) % 23], row[torch.arange(n) % 5]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2), {"cls": cls})
    for crops in (None, 4):
        method = HoloV(keep=0.3, variant=variant, crops=crops)
        together, counts = keep_mask(method, tokens)
        assert counts == (15, 3, 9)
        assert together.sum(1).tolist() == [15, 3, 9]
        for g, n in enumerate(lengths):
            alone = vtc.select(method, features[g, :n], signals={"cls": cls[g, :n]})
            assert alone.index.tolist() == together[g].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_tokens_that_left_before_are_nobody(variant: str) -> None:
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
    kept, _ = keep_mask(HoloV(keep=7, variant=variant), tokens)
    index = alive.nonzero()[:, 0]
    assert kept[0].nonzero()[:, 0].tolist() == index[by_hand(x[alive], cls[alive], 7, variant=variant)].tolist()


def test_nobody_waits_for_the_device() -> None:
    x, cls = drawn(24)
    tokens = VisualTokens(x[None], (Layout.plain(24),), (0,), {"cls": cls[None]})
    with NoSync():
        keep_mask(HoloV(), tokens)
        keep_mask(HoloV(variant="paper", crops=4), tokens)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"crops": 0}, ValueError, "crops=0"),
        ({"crops": 2.5}, TypeError, r"crops=2\.5"),
        ({"variant": "released"}, ValueError, "variant='released'"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        HoloV(**options)


@pytest.mark.parametrize(("kind", "layer"), [("cls", -2), ("received", -1)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_end_to_end(family: str, kind: str, layer: int) -> None:
    variant = "code" if kind == "cls" else "paper"
    keep = [
        by_hand(x, row, max(1, round(0.4 * len(x))), crops=3, variant=variant)
        for x, row in zip(embeddings(family), looked(family, kind, layer), strict=True)
    ]
    compare(family, HoloV(keep=0.4, crops=3, variant=variant, saliency=kind), keep)
