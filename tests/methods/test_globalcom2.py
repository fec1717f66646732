"""GlobalCom² against the published algorithm written as loops, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from asking import keep_mask, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync

from vtc import ops
from vtc.methods import returns
from vtc.methods.base import ModelFacts
from vtc.methods.divprune import DivPrune
from vtc.methods.globalcom2 import GlobalCom2, distance
from vtc.methods.random import Random
from vtc.methods.todre import ToDRE
from vtc.methods.transprune import TransPrune
from vtc.tokens import Layout, Segment, VisualTokens

NEXT = ModelFacts(
    model_type="llava_next", width=8, depth=8, signals=frozenset({"cls", "cls_logits"}), has_thumbnail=True
)
PLAIN = ModelFacts(model_type="llava", width=8, depth=8, signals=frozenset({"cls", "cls_logits"}))


def cut(side: int, mosaic: tuple[int, int], valid: tuple[int, int]) -> Layout:
    """A thumbnail of side x side, then a mosaic of crops of the same side, of which ``valid`` rows and columns stay."""
    rows, columns = mosaic
    top, left = (rows * side - valid[0]) // 2, (columns * side - valid[1]) // 2
    n = side * side
    crops = Segment(
        "crops",
        n,
        valid[0] * (valid[1] + 1),
        valid,
        True,
        mosaic,
        tuple((top + i) // side for i in range(valid[0])),
        tuple((left + j) // side for j in range(valid[1])),
    )
    return Layout(n + crops.length, (Segment("thumbnail", 0, n, (side, side)), crops))


def video(frames: int, each: int) -> Layout:
    segments = [Segment("frame", f * each, each) for f in range(frames)]
    return Layout(frames * each + 1, (*segments, Segment("newline", frames * each, 1)))


def alone() -> Layout:
    return Layout(17, (Segment("image", 0, 16, (4, 4)), Segment("newline", 16, 1)))


def tokens_of(*layouts: Layout, seed: int = 0, pad: int = 0, spread: float = 1.0) -> VisualTokens:
    n = max(layout.length for layout in layouts) + pad
    features = torch.full((len(layouts), n, 8), torch.nan)
    signals = {name: torch.zeros(len(layouts), n) for name in ("cls", "cls_logits")}
    for g, layout in enumerate(layouts):
        generator = torch.Generator().manual_seed(1000 * seed + layout.length)
        features[g, : layout.length] = torch.randn(layout.length, 8, generator=generator)
        logits = spread * torch.randn(layout.length, generator=generator)
        signals["cls_logits"][g, : layout.length] = logits
        signals["cls"][g, : layout.length] = logits.softmax(0)
    return VisualTokens(features, layouts, tuple(range(len(layouts))), signals)


def top(scores: torch.Tensor, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k]


def by_hand(tokens: VisualTokens, g: int, keep: float, signal: str, tau: float = 10.0) -> set[int]:
    """The published algorithm for one cut image, one crop and one token at a time; newlines kept."""
    layout = tokens.layouts[g]
    thumbnail, mosaic = layout.segments
    side = math.isqrt(thumbnail.length)
    score = tokens.signals[signal][g].double()
    kept = set(layout.newlines()) | set(top(score[: thumbnail.length].float(), int(thumbnail.length * keep)))
    rows, columns = mosaic.crops
    claims = [0.0] * (rows * columns)
    for i in range(side):
        for j in range(side):
            crop = min(i // (side // rows), rows - 1) * columns + min(j // (side // columns), columns - 1)
            claims[crop] += float(score[i * side + j])
    weights = [math.exp((c - max(claims)) / tau) for c in claims]
    sigma = [w / (sum(weights) + 1e-8) for w in weights]
    shares = [min(1.0, keep * (1 + s - sum(sigma) / len(sigma))) for s in sigma]
    view = torch.nn.functional.interpolate(
        score[: thumbnail.length].reshape(1, 1, side, side), size=mosaic.grid, mode="bilinear", align_corners=False
    )[0, 0]
    for crop in range(rows * columns):
        places = [
            (i, j)
            for i in range(mosaic.grid[0])
            for j in range(mosaic.grid[1])
            if mosaic.crop_rows[i] * columns + mosaic.crop_columns[j] == crop
        ]
        if not places:
            continue
        index = [mosaic.start + i * (mosaic.grid[1] + 1) + j for i, j in places]
        local, whole = score[index], torch.stack([view[i, j] for i, j in places])
        both = (local / local.norm() + whole / whole.norm()).float()
        kept |= {index[p] for p in top(both, int(len(index) * shares[crop]))}
    return kept


SHAPES = [
    cut(6, (2, 2), (12, 12)),
    cut(6, (2, 2), (8, 12)),
    cut(6, (1, 3), (6, 14)),
    cut(6, (4, 1), (10, 6)),  # the first and the last crop are all padding
    cut(5, (2, 2), (10, 7)),  # 5 // 2: the remainder goes to the last row and column
]


@pytest.mark.parametrize("signal", ["logits", "probabilities"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("layout", SHAPES, ids=lambda x: str(x.segments[1].grid))
def test_it_is_the_published_algorithm(layout, keep, signal):
    tokens = tokens_of(layout, seed=3)
    mask, counts = keep_mask(GlobalCom2(keep=keep, scores=signal), tokens)
    expected = by_hand(tokens, 0, keep, {"logits": "cls_logits", "probabilities": "cls"}[signal])
    assert set(mask[0].nonzero()[:, 0].tolist()) == expected
    assert counts == (len(expected),)


def test_the_reference_notices_another_command():
    tokens = tokens_of(SHAPES[0], seed=3, spread=3.0)
    ours = set(keep_mask(GlobalCom2(scores="logits"), tokens)[0][0].nonzero()[:, 0].tolist())
    assert by_hand(tokens, 0, 0.25, "cls_logits", tau=1e6) != ours
    assert by_hand(tokens, 0, 0.25, "cls") != ours


@pytest.mark.parametrize("scores", ["logits", "probabilities", "distance", None])
@pytest.mark.parametrize("selector", [None, DivPrune(), Random(), ToDRE()])
def test_an_image_alone_keeps_the_same_as_beside_others(scores, selector):
    method = GlobalCom2(keep=0.3, scores=scores, selector=selector)
    layouts = (*SHAPES, video(3, 9), alone(), Layout.plain(11))
    mask, counts = keep_mask(method, tokens_of(*layouts, pad=4))
    assert mask.sum(1).tolist() == list(counts)
    for g, layout in enumerate(layouts):
        one = dataclasses.replace(tokens_of(layout), ordinals=(g,))
        own, (count,) = keep_mask(method, one)
        assert torch.equal(own[0], mask[g, : layout.length])
        assert count == counts[g]
        assert not mask[g, layout.length :].any()
        assert mask[g, layout.newlines()].all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    keep=st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0, 1, 7, 10**6]),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    at=st.integers(0, len(SHAPES) - 1),
)
def test_counts_hold(keep, seed, spread, at):
    tokens = tokens_of(SHAPES[at], video(4, 6), seed=seed, spread=spread)
    for scores in ("logits", "distance"):
        method = GlobalCom2(keep=keep, scores=scores)
        mask, counts = keep_mask(method, tokens)
        assert mask.sum(1).tolist() == list(counts)
        for layout, count in zip(tokens.layouts, counts, strict=True):
            bare = layout.length - len(layout.newlines())
            spent = count - len(layout.newlines())
            share = keep if isinstance(keep, float) else min(1.0, keep / bare)
            assert 1 <= spent <= bare
            assert spent <= 1 + 2 * share * bare  # a one-hot sigma gives one part less than twice its share
            assert share < 1.0 or spent == bare


def test_equal_claims_get_equal_budgets():
    tokens = tokens_of(SHAPES[0], spread=0.0)
    mask, _ = keep_mask(GlobalCom2(keep=0.25, scores="logits"), tokens)
    parts = SHAPES[0].regions()
    assert [int(mask[0, list(part.tokens)].sum()) for part in parts] == [9] * 5


def test_the_commanded_crop_gets_most():
    layout = SHAPES[0]
    tokens = tokens_of(layout)
    logits = torch.zeros(1, layout.length)
    logits[0, torch.arange(36).reshape(6, 6)[3:, :3].flatten()] = 9.0  # the lower left of the thumbnail
    tokens = dataclasses.replace(tokens, signals={"cls_logits": logits})
    mask, _ = keep_mask(GlobalCom2(keep=0.25, scores="logits"), tokens)
    sizes = {part.cell: int(mask[0, list(part.tokens)].sum()) for part in layout.regions()[1:]}
    assert sizes == {0: 6, 1: 6, 2: 15, 3: 6}  # 36 * 0.25 * 0.75 and * 1.75, cut to integers


def test_any_selector_chooses_within_the_budgets():
    tokens = tokens_of(SHAPES[1], seed=5)
    own, counts = keep_mask(GlobalCom2(keep=0.3, scores="logits"), tokens)
    other, same = keep_mask(GlobalCom2(keep=0.3, scores="logits", selector=DivPrune()), tokens)
    assert counts == same
    assert not torch.equal(own, other)
    for part in SHAPES[1].regions():
        index = list(part.tokens)
        k = int(own[0, index].sum())
        picks = ops.farthest_first(tokens.features[0, index], k)
        assert set(other[0, index].nonzero()[:, 0].tolist()) == set(picks.tolist())


def test_video_frames_that_differ_from_the_rest_get_more():
    layout = video(4, 30)
    features = torch.zeros(1, layout.length, 8)
    features[..., 0] = 1.0
    features[0, 60:90, :2] = torch.tensor([0.0, 1.0])  # the third frame
    tokens = VisualTokens(features, (layout,), (0,))
    mask, _ = keep_mask(GlobalCom2(keep=0.4, scores="distance"), tokens)
    sizes = [int(mask[0, list(part.tokens)].sum()) for part in layout.regions()]
    assert sizes[2] > max(sizes[:2] + sizes[3:])
    logits = dataclasses.replace(tokens, signals={"cls_logits": torch.zeros(1, layout.length)})
    assert torch.equal(keep_mask(GlobalCom2(keep=0.4, scores="logits"), logits)[0], mask)


def test_distance_is_minus_the_cosine_to_the_mean():
    x = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [torch.nan, 1.0]]])
    mask = torch.tensor([[True, True, True, False]])
    half = -math.sqrt(0.5)
    assert torch.allclose(distance(x, mask), torch.tensor([[half, half, 0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("selector", [None, DivPrune()])
def test_only_the_shares_are_waited_for(selector, monkeypatch):
    waits = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(self.shape) or real(self))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("a second wait"))
    monkeypatch.setattr(returns, "_looks", lambda method, device: False)  # as on a GPU
    tokens = tokens_of(*SHAPES, video(3, 9), alone())
    with NoSync():
        keep_mask(GlobalCom2(keep=0.3, scores="logits", selector=selector), tokens)
    assert waits == [(4 + 4 + 3 + 4 + 4 + 3,)]


def test_counts_are_told_only_where_everything_stays():
    method, layouts = GlobalCom2(keep=0.3, scores="logits"), [SHAPES[2], video(3, 9)]
    assert method.counts(layouts) is None
    assert dataclasses.replace(method, keep=1.0).counts(layouts) == tuple(layout.length for layout in layouts)


# --- what is settled, and what is refused


def test_scores_follow_the_tower():
    assert GlobalCom2().settle(NEXT).scores == "logits"
    no_cls = dataclasses.replace(NEXT, signals=frozenset())
    assert GlobalCom2().settle(no_cls).scores == "distance"
    assert needs(GlobalCom2(scores="probabilities").settle(NEXT)) == {"cls"}
    assert needs(GlobalCom2(scores="logits", selector=ToDRE())) == {"cls", "cls_logits"}
    assert needs(GlobalCom2()) == set()
    assert 'scores="distance"' in GlobalCom2(scores="logits").remedy


def test_a_model_without_a_thumbnail_is_refused():
    with pytest.raises(ValueError, match=r"'llava'.*LLaVA-NeXT"):
        GlobalCom2().check(PLAIN)
    GlobalCom2().settle(NEXT).check(NEXT)


def test_a_thumbnail_that_is_no_square_is_named():
    layout = Layout(
        9,
        (
            Segment("thumbnail", 0, 3),
            Segment("crops", 3, 6, (2, 2), True, (1, 1), (0, 0), (0, 0)),
        ),
    )
    with pytest.raises(ValueError, match="3 tokens"):
        keep_mask(GlobalCom2(keep=0.5, scores="distance"), tokens_of(layout))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"scores": "attention"}, ValueError, "'attention'"),
        ({"tau": 0.0}, ValueError, "tau=0.0"),
        ({"newlines": "candidates"}, ValueError, "must be .keep.: newlines belong to no region"),
        ({"selector": "divprune"}, TypeError, "'divprune'"),
        ({"selector": TransPrune()}, ValueError, "vtc.Chain"),
    ],
)
def test_bad_options_are_named(options, error, word):
    with pytest.raises(error, match=word):
        GlobalCom2(**options)
