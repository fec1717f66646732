"""Methods for videos: loops by hand on bare tensors, ties, pictures, ragged batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from asking import entering, keep_mask
from nosync import NoSync
from torch import Tensor

import vtc
from vtc.budget import apportioned
from vtc.methods import Method
from vtc.methods.allocate import Allocate
from vtc.methods.divprune import DivPrune
from vtc.methods.dycoke import DyCoke
from vtc.methods.evs import EVS
from vtc.methods.fastvid import FastVID
from vtc.methods.holitom import HoliTom
from vtc.methods.vcast import VCast
from vtc.methods.vidcom2 import VidCom2
from vtc.ops.frames import still_windows
from vtc.tokens import Layout, Segment, VisualTokens

EXACT = [
    EVS(keep=0.5),
    VidCom2(keep=0.5),
    VCast(keep=0.5),
    VCast(keep=0.5, leftover="one"),
    DyCoke(keep=0.7),
    DyCoke(drop=0.6),
]
COUNTING = [VidCom2(keep=0.5, budgets="released"), FastVID(keep=0.5), HoliTom(keep=0.5)]
WHOLE = [FastVID(keep=30), HoliTom(keep=30), HoliTom(keep=30, beta=None)]
ALL = [*EXACT, *COUNTING, *WHOLE]


def label(method: Method) -> str:
    options = [getattr(method, f.name) for f in dataclasses.fields(method)]
    return "-".join([method.name, *map(str, options)])


def drawn(frames: int = 6, size: int = 9, d: int = 8, seed: int = 0, moving: float = 0.5) -> Tensor:
    """Two scenes; some places hardly move."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2, size, d, generator=generator)
    scene = (torch.arange(frames) >= frames // 2).long()
    noise = torch.randn(frames, size, d, generator=generator) * (0.05 + torch.rand(size, 1, generator=generator) ** 3)
    return base[scene] + moving * noise


def looked(frames: int = 6, size: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(frames, size, generator=torch.Generator().manual_seed(100 + seed))


def clip(frames: int, size: int, newline: bool = False) -> Layout:
    segments = [Segment("frame", f * size, size) for f in range(frames)]
    return Layout(frames * size + newline, (*segments, *[Segment("newline", frames * size, 1)] * newline))


def given(method: Method, frames: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    return {"cls": looked(frames, size, seed), "received": looked(frames, size, seed)} if method.signals() else {}


# -------------------------------------------------------------------------------------------------------------- by hand


def cosine(a: list[float], b: list[float], eps: float = 1e-12) -> float:
    norms = [max(math.sqrt(sum(v * v for v in row)), eps) for row in (a, b)]
    return sum(p * q for p, q in zip(a, b, strict=True)) / (norms[0] * norms[1])


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def squared(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [p - q for p, q in zip(a, b, strict=True)]


def lowest(scores: dict[Any, float], k: int) -> set[Any]:
    return set(sorted(scores, key=lambda i: (scores[i], i))[:k])


def evs(x: list[list[list[float]]], k: int) -> set[tuple[int, int]]:
    like = {(t, p): cosine(x[t][p], x[t - 1][p]) if t else -9.0 for t in range(len(x)) for p in range(len(x[0]))}
    return lowest(like, k)


def vidcom2(x: list[list[list[float]]], keep: float, k: int | None) -> set[tuple[int, int]]:
    flat = [row for frame in x for row in frame]
    middle = mean(flat)
    variance = {c: sum((row[c] - middle[c]) ** 2 for row in flat) / len(flat) for c in range(len(middle))}
    channels = sorted(lowest(variance, len(middle) // 2))
    unit = [[[row[c] / math.sqrt(sum(row[c] ** 2 for c in channels)) for c in channels] for row in f] for f in x]

    def near(row: list[float], centre: list[float]) -> float:
        return sum(math.exp(-squared(row, centre) / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

    video = mean([row for frame in unit for row in frame])
    v = [[near(row, video) for row in frame] for frame in unit]
    score = {(t, p): v[t][p] + near(row, mean(frame)) for t, frame in enumerate(unit) for p, row in enumerate(frame)}
    stands_out = [-sum(row) / len(row) for row in v]
    parts = [math.exp((u - max(stands_out)) / 0.01) for u in stands_out]
    parts = [part / sum(parts) for part in parts]
    kept = set()
    for t, part in enumerate(parts):
        share = min(1.0, keep * (1 + part - sum(parts) / len(parts)))
        budget = max(1, round(share * len(x[t])))
        kept |= lowest({place: s for place, s in score.items() if place[0] == t}, budget)
    while k is not None and len(kept) > k:
        kept.remove(max(kept, key=score.__getitem__))
    while k is not None and len(kept) < k:
        kept.add(min(set(score) - kept, key=score.__getitem__))
    return kept


def vcast(x: list[list[list[float]]], k: int) -> set[tuple[int, int]]:
    frames, size = len(x), len(x[0])
    heads = []
    for frame in x:
        middle = mean(frame)
        norm = math.sqrt(sum(v * v for v in middle))
        heads.append([v / norm for v in middle])
    turn = [
        1.0
        if t in (0, frames - 1)
        else 1 - cosine(minus(heads[t], heads[t - 1]), minus(heads[t + 1], heads[t]), eps=1e-6)
        for t in range(frames)
    ]
    weights = [math.exp(c / 0.7) for c in turn]
    raw = [w / sum(weights) * (k - frames) for w in weights]
    assert max(raw) < size - 1, "a full frame is for another test"
    budgets = [1 + int(r) for r in raw]
    for t in sorted(range(frames), key=lambda t: -(raw[t] % 1))[: k - sum(budgets)]:
        budgets[t] += 1
    kept = set()
    for t, frame in enumerate(x):
        norms = [math.sqrt(sum(v * v for v in row)) for row in frame]
        scaled = [(n - min(norms)) / (max(norms) - min(norms) + 1e-6) for n in norms]
        kept |= lowest({(t, p): cosine(row, heads[t]) - 1 - scaled[p] for p, row in enumerate(frame)}, budgets[t])
    return kept


def dycoke(x: list[list[list[float]]], budgets: dict[int, int]) -> set[tuple[int, int]]:
    frames, size = len(x), len(x[0])
    against = {}
    for i in range(0, frames - 1, 2):
        against[i + 1] = i
    for i in range(0, frames - 4, 4):
        against[i + 2] = i
    kept = {(t, p) for t in range(frames) if t not in against for p in range(size)}
    for t, i in against.items():
        kept |= lowest({(t, p): cosine(x[t][p], x[i][p]) for p in range(size)}, budgets[t])
    return kept


def peaks(rows: list[list[float]], neighbors: int) -> list[float]:
    d, n = len(rows[0]), len(rows)
    gap = [[squared(a, b) / d for b in rows] for a in rows]
    dense = [math.exp(-sum(sorted(row)[:neighbors]) / neighbors) for row in gap]
    apart = []
    for i in range(n):
        denser = [gap[i][j] for j in range(n) if (dense[j], i) > (dense[i], j)]  # of equals the first
        apart.append(math.sqrt(min(denser) if denser else max(map(max, gap))))
    return [a * b for a, b in zip(apart, dense, strict=True)]


def highest(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


Places = dict[tuple[int, int], list[float]]


def fastvid(
    x: list[list[list[float]]], seen: list[list[float]], frames: list[list[float]], n: int, method: FastVID
) -> Places:
    """Count as released: what rounding loses is lost."""
    size, total = len(x[0]), len(x)
    salient = n - int(n * method.context)
    out: Places = {}
    others = []
    for t in range(total):
        top = highest(seen[t], salient)
        out |= {(t, p): x[t][p] for p in top}
        others.append([p for p in range(size) if p not in top])
    alike = [cosine(frames[t], frames[t + 1]) for t in range(total - 1)]
    least = lowest(dict(enumerate(alike)), method.segments - 1)
    ends = [0, *(t + 1 for t in range(total - 1) if t in least or alike[t] < method.tau), total]
    anchors: dict[int, list[int]] = {}
    missing = 0
    scenes = list(itertools.pairwise(ends))
    for a, b in scenes:
        holders = [t for t in range(a, b) if (b - 1 - t) % method.stride == 0]
        k = (n - salient) * (b - a) // len(holders)
        for t in holders:
            missing += max(0, k - len(others[t]))
            found = highest(peaks([x[t][p] for p in others[t]], 4), min(k, len(others[t])))
            anchors[t] = [others[t][i] for i in found]
    left = {(t, p): -seen[t][p] for t in range(total) for p in others[t] if p not in anchors.get(t, [])}
    for t, p in lowest(left, missing):
        others[t].remove(p)
        out[t, p] = x[t][p]
    for a, b in scenes:
        for t in (t for t in range(a, b) if anchors.get(t)):
            alone = all(s in anchors for s in range(a, b))
            members: dict[int, list[list[float]]] = {p: [] for p in anchors[t]}
            for row in (x[s][p] for s in ([t] if alone else range(a, b)) for p in others[s]):
                like = [cosine(row, x[t][q]) for q in anchors[t]]
                members[anchors[t][like.index(max(like))]].append(row)
            for p, rows in members.items():
                w = max(1 / (len(rows) + 1), method.beta)
                out[t, p] = [w * a + (1 - w) * b for a, b in zip(x[t][p], mean(rows), strict=True)]
    return out


def holitom(
    x: list[list[list[float]]], seen: list[list[float]], windows: list[tuple[int, int]], k: int | None, method: HoliTom
) -> Places:
    frames, size = len(x), len(x[0])
    static, dynamic = [], []
    for a, b in windows:
        places = [
            p
            for p in range(size)
            if b - a > 1 and all(cosine(x[t][p], x[t + 1][p]) > method.tau for t in range(a, b - 1))
        ]
        static.append(places)
        dynamic += [[p for p in range(size) if p not in places]] * (b - a)
    left = sum(map(len, static)) + sum(map(len, dynamic))
    share = min(1.0, method.keep * frames * size / left)
    budgets = [round(len(s) * share) for s in static], [math.ceil(len(s) * share) for s in dynamic]
    if k is not None:
        found = apportioned(k, [*map(len, static), *map(len, dynamic)])
        budgets = [*found[: len(static)]], [*found[len(static) :]]
    out: Places = {}
    for t, (places, n) in enumerate(zip(dynamic, budgets[1], strict=True)):
        out |= {(t, places[i]): x[t][places[i]] for i in highest([seen[t][p] for p in places], n)}
    for (a, b), places, n in zip(windows, static, budgets[0], strict=True):
        if not n:
            continue
        rows = [mean([x[t][p] for t in range(a, b)]) for p in places]
        centres = highest(peaks(rows, min(method.neighbors, n)), n)
        joined: dict[int, list[list[float]]] = {c: [] for c in centres}
        for i, row in enumerate(rows):
            if i not in centres:
                gaps = [squared(row, rows[c]) for c in centres]
                joined[centres[gaps.index(min(gaps))]].append(row)
        for c, theirs in joined.items():
            now = rows[c]
            if theirs and method.beta is None:
                now = mean([rows[c], *theirs])
            elif theirs:
                now = [method.beta * p + (1 - method.beta) * q for p, q in zip(rows[c], mean(theirs), strict=True)]
            out[a, places[c]] = now
    return out


def places(found: Any, size: int) -> set[tuple[int, int]]:
    return {divmod(i, size) for i in found.index.tolist()}


def same(found: Any, expected: Places, size: int) -> None:
    assert [divmod(i, size) for i in found.index.tolist()] == sorted(expected)
    torch.testing.assert_close(found.features, torch.tensor([expected[p] for p in sorted(expected)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [9, 10, 27, 53])
def test_evs(seed: int, k: int) -> None:
    x = drawn(seed=seed)
    assert places(vtc.select("evs", x, keep=k), 9) == evs(x.tolist(), k)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_vidcom2(seed: int, keep: float) -> None:
    x = drawn(seed=seed)
    k = max(6, int(54 * keep))
    assert places(vtc.select("vidcom2", x, keep=keep), 9) == vidcom2(x.tolist(), keep, k)
    assert places(vtc.select("vidcom2", x, keep=keep, budgets="released"), 9) == vidcom2(x.tolist(), keep, None)
    assert places(vtc.select("vidcom2", x, keep=25), 9) == vidcom2(x.tolist(), 25 / 54, 25)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [6, 13, 25])
def test_vcast(seed: int, k: int) -> None:
    x = drawn(seed=seed)
    assert places(vtc.select("vcast", x, keep=k), 9) == vcast(x.tolist(), k)


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 8, 9, 13])
def test_dycoke(frames: int) -> None:
    x = drawn(frames)
    found = vtc.select("dycoke", x, drop=0.6)
    assert places(found, 9) == dycoke(x.tolist(), dict.fromkeys(range(frames), 3))
    whole = {2: 1, 3: 2, 4: 2, 5: 2, 8: 3, 9: 3, 13: 4}[frames]
    assert len(found.index) == 9 * whole + 3 * (frames - whole)
    assert places(vtc.select("dycoke", x, keep=len(found.index)), 9) == places(found, 9)
    one_more = vtc.select("dycoke", x, keep=len(found.index) + 1)
    pruned = [t for t in range(frames) if sum(t == s for s, _ in places(found, 9)) < 9]
    assert places(one_more, 9) == dycoke(x.tolist(), dict.fromkeys(range(frames), 3) | {pruned[0]: 4})


@pytest.mark.parametrize(
    "options",
    [{}, {"segments": 2, "tau": -1.0}, {"segments": 1, "tau": -1.0, "stride": 2}, {"stride": 1}, {"context": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_fastvid(options: dict[str, Any], keep: float) -> None:
    x, seen = drawn(7, 12), looked(7, 12)
    frames = torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
    method = FastVID(keep=keep, **options)
    n = int(12 * keep)
    expected = fastvid(x.tolist(), seen.tolist(), frames.tolist(), n, method)
    same(vtc.select(method, x, signals={"cls": seen, "frames": frames}), expected, 12)
    same(vtc.select(method, x, signals={"received": seen, "frames": frames}), expected, 12)
    own = fastvid(x.tolist(), seen.tolist(), x.mean(1).tolist(), n, method)
    same(vtc.select(method, x, signals={"cls": seen}), own, 12)
    if len(expected) == 7 * n:  # nothing is lost by rounding
        same(vtc.select(method, x, keep=7 * n, signals={"cls": seen, "frames": frames}), expected, 12)


@pytest.mark.parametrize("options", [{}, {"tau": 0.95}, {"beta": None}, {"window": 2}, {"neighbors": 2}], ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6])
def test_holitom(options: dict[str, Any], keep: float) -> None:
    x, seen = drawn(moving=0.6), looked()
    method = HoliTom(keep=keep, **options)
    still = torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1) > method.tau
    windows, _ = still_windows(still, method.window)
    expected = holitom(x.tolist(), seen.tolist(), windows, None, method)
    same(vtc.select(method, x, signals={"received": seen}), expected, 9)
    k = len(expected) - 3
    exactly = holitom(x.tolist(), seen.tolist(), windows, k, method)
    assert len(exactly) == k
    same(vtc.select(method, x, keep=k, signals={"received": seen}), exactly, 9)


# ---------------------------------------------------------------------------------------------------- counts and places


@pytest.mark.parametrize("method", [EVS(), VidCom2(), VCast(), DyCoke(), FastVID(), HoliTom()], ids=label)
@pytest.mark.parametrize("shape", [(6, 9), (5, 4), (9, 1), (2, 13)])
def test_an_integer_is_what_stays(method: Method, shape: tuple[int, int]) -> None:
    frames, size = shape
    x, n = drawn(*shape), frames * size
    least = {"evs": size, "dycoke": size * (frames - frames // 2 - len(range(0, frames - 4, 4)))}.get(method.name, 1)
    for k in sorted({least, least + 1, n // 2, n - 1, n} & set(range(least, n + 1))):
        found = vtc.select(method, x, keep=k, signals=given(method, *shape))
        assert len(found.index) == k
        assert found.index.tolist() == sorted(set(found.index.tolist()))


def test_more_than_is_left_after_merging_over_time_keeps_what_would_have_been_merged() -> None:
    """A still video: one frame's worth is left; of 54 tokens 40 are asked for."""
    x, seen = drawn(1).expand(6, -1, -1).contiguous(), looked()
    found = vtc.select("holitom", x, keep=40, signals={"received": seen})
    assert len(found.index) == 40
    assert set(range(9)) <= set(found.index.tolist())
    best = seen.flatten().masked_fill(torch.arange(54) < 9, -1.0).topk(31).indices
    assert set(found.index.tolist()) == {*range(9), *best.tolist()}
    torch.testing.assert_close(found.features, x.flatten(0, 1)[found.index])
    tokens = VisualTokens(x.flatten(0, 1)[None], (clip(6, 9),), (0,), {"received": seen.flatten()[None]})
    method = HoliTom(keep=40, saliency="received")
    reduction = method.reduce(method.stages(vtc.methods.base.ANY_MODEL)[0], tokens, (40,))
    assert reduction.size is not None
    assert float(reduction.size.sum()) == pytest.approx(54)


def test_counts_are_those_of_the_papers() -> None:
    video = [clip(32, 196)]
    assert EVS(keep=0.25).counts(video) == (1568,)
    assert EVS(keep=0.01).counts(video) == (196,)
    assert EVS(keep=5).counts(video) == (196,)
    assert EVS(keep=0.1).counts([clip(100, 1)]) == (10,)
    assert VidCom2(keep=0.25).counts(video) == (1568,)
    assert VidCom2(keep=0.001).counts(video) == (32,)
    assert VCast(keep=0.25).counts(video) == (1568,)
    assert VCast(keep=0.001).counts(video) == (32,)
    assert DyCoke(drop=0.7).counts(video) == (3098,)
    assert DyCoke(keep=0.5).counts(video) == (3136,)
    assert DyCoke(drop=0.7).counts([clip(33, 25)]) == (368 + 25,)  # the last frame, which the original loses
    assert FastVID(keep=0.1).counts(video) is HoliTom(keep=0.1).counts(video) is None
    assert FastVID(keep=700).counts(video) == HoliTom(keep=700).counts(video) == (700,)
    assert VidCom2(budgets="released").counts(video) is None
    for method in (*EXACT, *COUNTING):
        if not (isinstance(method, DyCoke) and method.drop):
            assert dataclasses.replace(method, keep=1.0).counts(video) == (32 * 196,)


@pytest.mark.parametrize("method", ALL, ids=label)
def test_pictures_stay_whole_and_a_choice_in_one_is_refused(method: Method) -> None:
    picture = Layout(12, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 8, (2, 3), True)))
    tokens = VisualTokens(drawn(1, 12), (picture,), (0,), {n: torch.rand(1, 12) for n in ("cls", "received")})
    mask, counts = keep_mask(method, tokens)
    assert counts == (12,)
    assert mask.all()
    signals = {"cls": torch.rand(12), "received": torch.rand(12)}
    if getattr(method, "budgets", "") == "released":  # what an int means is decided by the content of a video
        assert len(vtc.select(method, drawn(1, 12)[0], keep=5, signals=signals).index) == 12
        return
    with pytest.raises(ValueError, match=rf"{method.name}.*a picture.*5 of its 12.*\[frames, n, d\]"):
        vtc.select(method, drawn(1, 12)[0], keep=5, signals=signals)


@pytest.mark.parametrize("method", ALL, ids=label)
def test_a_video_of_one_frame(method: Method) -> None:
    """Whole, where frames are compared; else as any other."""
    x, signals = drawn(1, 40), given(method, 1, 40)
    if isinstance(method, (EVS, VCast, DyCoke)):
        assert len(vtc.select(method, x, signals=signals).index) == 40
        with pytest.raises(ValueError, match=f"{method.name}.*one frame.*30 of its 40"):
            vtc.select(method, x, keep=30, signals=signals)
    else:
        assert len(vtc.select(method, x, signals=signals).index) in (20, 30)


@pytest.mark.parametrize("method", ALL, ids=label)
def test_frames_of_different_sizes_are_refused(method: Method) -> None:
    uneven = Layout(9, (Segment("frame", 0, 4), Segment("frame", 4, 5)))
    mixed = Layout(9, (Segment("frame", 0, 4), Segment("image", 4, 5)))
    for layout, word in ((uneven, "4 to 5 tokens"), (mixed, "other kinds")):
        with pytest.raises(ValueError, match=rf"{method.name}.*{word}.*Allocate"):
            method.counts([layout])


@pytest.mark.parametrize("method", ALL, ids=label)
def test_videos_that_lost_tokens_are_refused(method: Method) -> None:
    tokens = VisualTokens(drawn()[None].flatten(1, 2), (clip(6, 9),), (0,), {}, alive_counts=(50,))
    tokens = dataclasses.replace(tokens, alive=torch.arange(54)[None] < 50)
    with pytest.raises(ValueError, match=f"{method.name}.*50 of a video's 54"):
        keep_mask(method, tokens)
    lost = Layout(20, (Segment("image", 0, 20),))
    pictures = dataclasses.replace(tokens, features=drawn(1, 20), layouts=(lost,), alive_counts=(15,))
    pictures = dataclasses.replace(pictures, alive=torch.arange(20)[None] < 15)
    assert keep_mask(method, pictures)[1] == (15,)


SHAPES = ((6, 9), (1, 20), (3, 7), (13, 4), (2, 9))


@pytest.mark.parametrize("method", ALL, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_ragged_batch_is_each_video_alone(method: Method, dtype: torch.dtype) -> None:
    layouts = (*(clip(*shape, newline=shape[0] % 2 == 0) for shape in SHAPES), Layout.plain(30))
    n = max(layout.length for layout in layouts) + 3
    features = torch.full((len(layouts), n, 8), math.nan, dtype=dtype)
    seen = torch.zeros(len(layouts), n)
    for g, layout in enumerate(layouts):
        features[g, : layout.length] = drawn(1, layout.length, seed=g)[0].to(dtype)
        seen[g, : layout.length] = looked(1, layout.length, seed=g)[0]
        if layout.of_kind("frame") and g % 3 == 0:  # still, with ties
            frame = features[g, : layout.segments[0].length]
            frames = len(layout.of_kind("frame"))
            features[g, : frames * len(frame)] = frame.repeat(frames, 1)
    before = features.clone()
    tokens = VisualTokens(features, layouts, tuple(range(len(layouts))), {"cls": seen, "received": seen})
    if isinstance(method.keep, int):
        method = dataclasses.replace(method, keep=15)
    together = entering(method, tokens)
    torch.testing.assert_close(features, before, rtol=0, atol=0, equal_nan=True)
    for g, layout in enumerate(layouts):
        newlines = layout.newlines()
        assert together.mask[g, newlines].all()
        own = {name: s[g : g + 1, : layout.length] for name, s in tokens.signals.items()}
        one = VisualTokens(features[g : g + 1, : layout.length].clone(), (layout,), (g,), own)
        alone = entering(method, one)
        assert alone.counts[0] == together.counts[g] == int(together.mask[g].sum())
        assert alone.mask[0].equal(together.mask[g, : layout.length])
        if method.merges and alone.features is not None:
            assert together.features is not None
            assert alone.features.dtype == dtype
            written = alone.written[0]
            assert alone.features[0, written].equal(together.features[g, : layout.length][written])
            assert alone.size[0, written].equal(together.size[g, : layout.length][written])
            assert (alone.size[0, written] >= 1).all()


@pytest.mark.parametrize("method", EXACT, ids=label)
def test_exact_methods_do_not_wait_for_the_device(method: Method) -> None:
    tokens = VisualTokens(drawn(9, 9).flatten(0, 1)[None].repeat(2, 1, 1), (clip(9, 9), clip(6, 9)), (0, 1))
    with NoSync():
        keep_mask(method, tokens)


# --------------------------------------------------------------------------------------------------------- still videos


def test_in_a_still_video_ties_go_to_the_first() -> None:
    """Round-off of cosines would choose anywhere."""
    x = (torch.randn(1, 9, 400, generator=torch.Generator().manual_seed(0)) * 7).expand(6, -1, -1).contiguous()
    assert vtc.select("evs", x, keep=25).index.tolist() == [*range(25)]
    assert places(vtc.select("dycoke", x, drop=0.6), 9) >= {(1, 0), (1, 1), (1, 2)}
    per_frame = vtc.select("vcast", x, keep=24).index.view(6, 4)
    assert (per_frame - torch.arange(6)[:, None] * 9).unique(dim=0).shape == (1, 4)
    uneven = torch.bincount(vtc.select("vcast", x, keep=26).index // 9, minlength=6)
    assert uneven.tolist() == [5, 5, 4, 4, 4, 4]
    exact = torch.bincount(vtc.select("vidcom2", x, keep=24).index // 9, minlength=6)
    assert exact.tolist() == [4] * 6


def test_all_that_is_left_over_goes_to_one_frame_until_it_is_full() -> None:
    x = drawn(8, 6, seed=3)
    one = torch.bincount(vtc.select("vcast", x, keep=23, leftover="one").index // 6, minlength=8)
    largest = torch.bincount(vtc.select("vcast", x, keep=23).index // 6, minlength=8)
    assert one.sum() == largest.sum() == 23
    assert int((one - largest).max()) >= 1
    assert int(one.max()) > int(largest.max())


@pytest.mark.parametrize("leftover", ["one", "largest"])
def test_frames_that_are_full_give_to_the_others(leftover: str) -> None:
    x = drawn(8, 4, seed=1)
    for k in range(1, 33):
        counts = torch.bincount(vtc.select("vcast", x, keep=k, leftover=leftover).index // 4, minlength=8)
        assert counts.sum() == k
        assert counts.max() <= 4
        assert counts.min() >= min(1, k // 8)


def test_rows_of_zeros_are_no_nan() -> None:
    x = drawn()
    x[2], x[4, 3] = 0.0, 0.0
    for method in ALL:
        found = vtc.select(method, x, signals=given(method, 6, 9))
        assert found.features is None or found.features.isfinite().all()
    zeros = torch.zeros(4, 5, 1)  # as estimates ask
    for method in (EVS(keep=0.5), VidCom2(keep=0.5), VCast(keep=0.5), DyCoke(), FastVID(keep=0.5), HoliTom(keep=0.5)):
        assert len(vtc.select(method, zeros, signals=given(method, 4, 5)).index)


def test_training_gets_gradients_through_merged_values() -> None:
    for method in (FastVID(keep=20, saliency="cls"), HoliTom(keep=20, saliency="received")):
        x = drawn().flatten(0, 1)[None].requires_grad_()
        signals = {"cls": looked().flatten()[None], "received": looked().flatten()[None]}
        found = method.reduce(
            method.stages(vtc.methods.base.ANY_MODEL)[0], VisualTokens(x, (clip(6, 9),), (0,), signals), (20,)
        )
        assert found.features is not None
        found.features.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("method", "options", "error", "word"),
    [
        (EVS, {"newlines": "candidates"}, ValueError, "newlines='candidates' must be 'keep'"),
        (VidCom2, {"budgets": "vllm"}, ValueError, "budgets='vllm'"),
        (VCast, {"leftover": "all"}, ValueError, "leftover='all'"),
        (DyCoke, {"drop": 1.5}, ValueError, r"drop=1\.5"),
        (DyCoke, {"drop": "half"}, TypeError, "drop='half'"),
        (DyCoke, {"keep": 0.2}, ValueError, r"keep=0\.2.*four frames"),
        (FastVID, {"segments": 0}, ValueError, "segments=0"),
        (FastVID, {"stride": 2.5}, TypeError, r"stride=2\.5"),
        (FastVID, {"context": 2}, ValueError, "context=2"),
        (FastVID, {"beta": -1}, ValueError, "beta=-1"),
        (FastVID, {"tau": math.nan}, ValueError, "tau=nan"),
        (FastVID, {"saliency": "text"}, ValueError, "saliency='text'"),
        (HoliTom, {"window": 0}, ValueError, "window=0"),
        (HoliTom, {"neighbors": True}, TypeError, "neighbors=True"),
        (HoliTom, {"beta": 1.01}, ValueError, r"beta=1\.01"),
        (HoliTom, {"tau": "high"}, TypeError, "tau='high'"),
        (Allocate, {"selector": EVS()}, ValueError, r"selector=EVS\(.*whole videos"),
        (Allocate, {"frames": "most"}, ValueError, "frames='most'"),
        (Allocate, {"frames": "unique", "by": "image"}, ValueError, "frames='unique'.*by='image'"),
    ],
)
def test_a_bad_option_is_named(method: type[Method], options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        method(**options)


def test_what_a_budget_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="evs keeps the first frame of a video whole, 9 tokens, and 8"):
        vtc.select("evs", drawn(), keep=8)
    with pytest.raises(ValueError, match=r"dycoke cannot keep 1672 of 6272.*1764 tokens.*0\.281"):
        DyCoke(keep=1672).counts([clip(32, 196)])
    with pytest.raises(ValueError, match="dycoke cannot keep 17 of 54"):
        vtc.select("dycoke", drawn(), keep=17)


def test_drop_decides_what_keep_is() -> None:
    assert DyCoke(drop=0.7, keep=1.0).keep == DyCoke(drop=0.7).keep == pytest.approx(0.475)
    assert DyCoke(drop=0.7, keep=1.0).prunes_at_entry
    assert not DyCoke(drop=0).prunes_at_entry


# ---------------------------------------------------------------------------------------------------- budgets of frames


@pytest.mark.parametrize("by", ["frame", "uniform"])
@pytest.mark.parametrize("frames", ["curvature", "unique"])
def test_allocate_weighs_frames(frames: str, by: str) -> None:
    """The whole is that of keep; the weights are those of V-CAST and VidCom2; the selector chooses within."""
    x = drawn(8, 12, seed=2)
    x[5] = torch.randn(12, 8, generator=torch.Generator().manual_seed(9)) * 3
    tokens = VisualTokens(
        torch.cat([x.flatten(0, 1), x[:1, 0]])[None].repeat(2, 1, 1),
        (clip(8, 12, newline=True), Layout.plain(40)),
        (0, 1),
    )
    mask, counts = keep_mask(Allocate(keep=0.3, by=by, frames=frames), tokens)
    assert counts == (29 + 1, 12)
    per_frame = mask[0, :96].view(8, 12).sum(1)
    assert per_frame.sum() == 29
    even = keep_mask(Allocate(keep=0.3, by=by), tokens)[0][0, :96].view(8, 12).sum(1)
    assert not per_frame.equal(even)
    for t, k in enumerate(per_frame.tolist()):
        assert k >= 1
        assert (
            mask[0, 12 * t : 12 * t + 12].nonzero()[:, 0].tolist()
            == vtc.select(DivPrune(), x[t], keep=k).index.tolist()
        )
    if frames == "curvature":
        theirs = torch.bincount(vtc.select("vcast", x, keep=29).index // 12, minlength=8)
        assert per_frame.equal(theirs)
    else:
        assert int(per_frame.argmax()) == 5


def test_allocate_refuses_to_weigh_frames_of_different_sizes() -> None:
    layout = Layout(20, (Segment("frame", 0, 8), Segment("frame", 8, 12)))
    tokens = VisualTokens(drawn(1, 20), (layout,), (0,))
    assert keep_mask(Allocate(keep=0.5, by="frame"), tokens)[1] == (10,)
    with pytest.raises(ValueError, match=r"allocate.*8 to 12 tokens"):
        keep_mask(Allocate(keep=0.5, by="frame", frames="curvature"), tokens)


@pytest.mark.parametrize("frames", ["even", "curvature", "unique"])
@pytest.mark.parametrize("k", [1, 3, 8, 20, 95])
def test_allocate_is_exact(frames: str, k: int) -> None:
    x = drawn(8, 12, seed=4)
    assert len(vtc.select(Allocate(by="frame", frames=frames), x, keep=k).index) == k
