"""SCOPE against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import math

import pytest
import torch
from asking import picks
from reference import decoder_call
from test_contract import batch_of, by_sample, check, continued, reached, run, tower_pass
from torch import Tensor
from tower_reference import scores_by_hand
from zoo import get_model

import vtc
from vtc.methods.scope import SCOPE
from vtc.tokens import Layout, VisualTokens


def by_hand(features: Tensor, cls: Tensor, k: int, alpha: float = 1.0, combined: str = "multi") -> list[int]:
    """As the paper writes it: one token, one sum at a time."""
    rows = [[float(v) for v in row] for row in features]
    norms = [math.sqrt(sum(v * v for v in row)) or 1.0 for row in rows]
    n = len(rows)
    cosine = [
        [sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / (norms[i] * norms[j]) for j in range(n)]
        for i in range(n)
    ]
    saliency, cover, taken = [float(c) ** alpha for c in cls], [0.0] * n, []
    for _ in range(k):
        best, value = -1, -math.inf
        for i in range(n):
            gain = sum(max(0.0, cosine[i][j] - cover[j]) for j in range(n))
            now = gain * saliency[i] if combined == "multi" else gain + saliency[i]
            if i not in taken and now > value + 1e-12:
                best, value = i, now
        taken.append(best)
        cover = [max(a, b) for a, b in zip(cover, cosine[best], strict=True)]
    return taken


def drawn(n: int, d: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("combined", ["multi", "add"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_it_picks_what_loops_pick(alpha: float, combined: str) -> None:
    x, cls = drawn(40)
    found = vtc.select("scope", x, keep=25, signals={"cls": cls}, alpha=alpha, combined=combined)
    assert found.order.tolist() == by_hand(x, cls, 25, alpha, combined)


def test_the_first_of_equal_tokens_is_taken_and_the_others_cover_nothing() -> None:
    x, cls = drawn(6)
    x, cls = x.repeat(3, 1), cls.repeat(3)
    order = vtc.select("scope", x, keep=12, signals={"cls": cls}).order.tolist()
    assert sorted(order[:6]) == [*range(6)]
    assert order[6:] == [*range(6, 12)]  # nothing is left to gain


def test_rows_of_zeros_and_a_cls_row_of_zeros_are_no_nan() -> None:
    x, cls = drawn(8)
    x[2] = 0.0
    assert vtc.select("scope", x, keep=7, signals={"cls": cls}).index.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert vtc.select("scope", x, keep=3, signals={"cls": torch.zeros(8)}).order.tolist() == [0, 1, 2]


def test_a_ragged_batch_with_equal_tokens_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (50, 9, 31)
    features, cls = torch.full((3, 50, 64), math.nan), torch.zeros(3, 50)
    for g, n in enumerate(lengths):
        x, row = drawn(n, 64, seed=g)
        features[g, :n], cls[g, :n] = x[torch.arange(n) % 7], row[torch.arange(n) % 7]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2), {"cls": cls})
    together = picks(SCOPE(), tokens, (20, 9, 12))
    monkeypatch.setattr("vtc.methods.scope.ENTRIES", 1)
    assert torch.equal(picks(SCOPE(), tokens, (20, 9, 12)), together)
    for g, (n, k) in enumerate(zip(lengths, (20, 8, 12), strict=True)):
        alone = vtc.select("scope", features[g, :n], keep=k, signals={"cls": cls[g, :n]})
        assert alone.order.tolist() == together[g, :k].tolist()


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"alpha": -1}, ValueError, "alpha=-1"),
        ({"alpha": math.inf}, ValueError, "alpha=inf"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"alpha": "1"}, TypeError, "alpha='1'"),
        ({"alpha": True}, TypeError, "alpha=True"),
        ({"combined": "max"}, ValueError, "combined='max'.*'multi', 'add'"),
        ({"combined": ["add"]}, ValueError, "combined="),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        SCOPE(**options)


def test_a_whole_number_is_an_exponent_too() -> None:
    assert SCOPE(alpha=2) == SCOPE(alpha=2.0)
    assert type(SCOPE(alpha=2).alpha) is float


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_end_to_end(family: str) -> None:
    """The CLS row of layer -2 from an eager pass of the tower, and the embeddings that the decoder is given."""
    model, batch = get_model(family), batch_of(family)
    rows = tower_pass(model, batch).attentions[-2].mean(1)[:, 0, 1:]
    cls = by_sample(batch, [scores_by_hand(rows, image) for image in reached(family)])
    keep = []
    for sample, images, own in zip(batch.samples, batch.images, cls, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        picked = [by_hand(embeds[c], row, max(1, round(0.3 * len(c)))) for c, row in zip(images, own, strict=True)]
        keep.append([torch.tensor(sorted(places)) for places in picked])
    _, _, handle = run(model, batch, SCOPE(keep=0.3))
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, SCOPE(keep=0.3), continued(model, batch, keep))
