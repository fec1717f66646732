"""PruMerge and PruMerge+ against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from asking import reduce
from test_contract import TOLERANCE, batch_of, by_sample, check, continued, packed, run, tower_pass
from torch import Tensor
from zoo import get_model

import vtc
from vtc.methods.base import ANY_MODEL, Method
from vtc.methods.prumerge import PruMerge
from vtc.methods.prumerge_plus import PruMergePlus
from vtc.tokens import Layout, Segment, VisualTokens


def places(cls: Tensor, k: int | None, plus: bool) -> list[int]:
    """Which tokens stay, ascending; ``k=None``: adaptive."""
    n, row = len(cls), cls.tolist()
    falling = sorted(range(n), key=lambda i: (-row[i], i))
    if k is None:
        low, high = np.percentile(np.array(row), [25, 75])
        top = max(1, sum(v > high + 1.5 * (high - low) for v in row))
        grid = range(0, n - 1, max(1, int(1 / (top / n)) // 3)) if plus else ()
        return sorted({*falling[:top], *grid})
    top = max(1, k // 4) if plus else k
    rest, more = sorted(falling[top:]), k - top
    spread = [i for r, i in enumerate(rest) if (r + 1) * more // len(rest) > r * more // len(rest)]
    return sorted({*falling[:top], *spread})


def by_hand(x: Tensor, cls: Tensor, keys: Tensor, k: int | None, plus: bool = False) -> tuple[list[int], Tensor]:
    kept = places(cls, k, plus)
    values = []
    for i in kept:
        like = [float(torch.cosine_similarity(keys[i].double(), row.double(), dim=0)) for row in keys]
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-round(like[j], 12), j))[:32]
        values.append(x[i] + sum((cls[j] * x[j] for j in near), torch.zeros_like(x[i])))
    return kept, torch.stack(values)


def drawn(n: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, keys = torch.randn(n, 6, generator=generator), torch.randn(n, 9, generator=generator)
    return x, {"cls": (3 * torch.randn(n, generator=generator)).softmax(0), "keys": keys}


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("k", [None, 1, 3, 18, 49])
@pytest.mark.parametrize("n", [50, 90])
def test_it_keeps_and_merges_what_loops_do(n: int, k: int | None, plus: bool) -> None:
    x, signals = drawn(n)
    options = {"adaptive": True} if k is None else {"keep": k}
    found = vtc.select("prumerge", x, signals=signals, plus=plus, **options)
    kept, values = by_hand(x, **signals, k=k, plus=plus)
    assert found.index.tolist() == kept
    torch.testing.assert_close(found.features, values, rtol=1e-5, atol=1e-6)
    if plus:
        assert vtc.select("prumerge+", x, signals=signals, **options).index.tolist() == kept


def test_few_tokens_have_fewer_neighbours_and_no_outlier_leaves_one() -> None:
    x, signals = drawn(5)
    found = vtc.select("prumerge", x, keep=2, signals=signals)
    torch.testing.assert_close(found.features, by_hand(x, **signals, k=2)[1], rtol=1e-5, atol=1e-6)
    flat = signals | {"cls": torch.full((5,), 0.2)}
    assert vtc.select("prumerge", x, adaptive=True, signals=flat).index.tolist() == [0]
    assert vtc.select("prumerge+", x, adaptive=True, signals=flat).index.tolist() == [0, 1, 2, 3]
    one = {name: signal[:1] for name, signal in signals.items()}
    found = vtc.select("prumerge+", x[:1], adaptive=True, signals=one)
    assert found.index.tolist() == [0]
    assert torch.equal(found.features, x[:1])


def test_ties_go_to_the_lowest_index_and_zeros_are_no_nan() -> None:
    x, signals = drawn(80)
    keys = signals["keys"][torch.arange(80) % 4]  # twenty equal keys each: neighbours are the first of them
    keys[7] = 0.0
    cls = torch.full((80,), 1 / 80)
    found = vtc.select("prumerge", x, keep=10, signals={"cls": cls, "keys": keys})
    assert found.index.tolist() == [*range(10)]
    torch.testing.assert_close(found.features, by_hand(x, cls, keys, 10)[1], rtol=1e-5, atol=1e-6)
    nothing = {"cls": torch.zeros(80), "keys": torch.zeros(80, 9)}
    assert torch.equal(vtc.select("prumerge", x, keep=10, signals=nothing).features, x[:10])


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_ragged_batch(method: type[Method], adaptive: bool) -> None:
    lengths, counts = (50, 9, 31), (20, 8, 12)
    features, cls, keys = torch.full((3, 57, 6), math.nan), torch.zeros(3, 57), torch.zeros(3, 57, 9)
    for g, n in enumerate(lengths):
        features[g, :n], signals = drawn(n, seed=g)
        cls[g, :n], keys[g, :n] = signals["cls"], signals["keys"]
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2), {"cls": cls, "keys": keys})
    own: Any = method(adaptive=adaptive)  # type: ignore[call-arg]
    assert (own.counts(tokens.layouts) is None) is adaptive
    together = reduce(own, tokens, None if adaptive else counts)  # type: ignore[arg-type]
    for g, n in enumerate(lengths):
        one = {"cls": cls[g, :n], "keys": keys[g, :n]}
        alone = vtc.select(own, features[g, :n], keep=None if adaptive else counts[g], signals=one)
        k = together.counts[g]
        order = together.index[g, :k].argsort()
        assert alone.index.tolist() == together.index[g, :k][order].tolist()
        assert torch.equal(alone.features, together.features[g, :k][order])


def test_newlines_stay() -> None:
    x, signals = drawn(12)
    layout = Layout(12, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 8, (2, 3), newline=True)))
    found = vtc.select("prumerge", x, keep=5, signals=signals, layout=layout)
    assert {7, 11} < set(found.index.tolist())
    assert torch.equal(found.features[found.index == 7], x[7:8])
    assert len(found.index) == 5


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"adaptive": 1}, TypeError, "adaptive=1"),
        ({"plus": "yes"}, TypeError, "plus='yes'"),
        ({"newlines": "candidates"}, ValueError, "newlines='candidates'"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        PruMerge(**options)


def test_it_needs_a_tower_with_a_cls_token() -> None:
    assert [s.key for s in PruMerge().stages(ANY_MODEL)[0].needs] == ["cls", "keys"]
    with pytest.raises(ValueError, match=r"'prumerge\+' acts in front of the projector.*cannot give"):
        vtc.patch(get_model("idefics3"), PruMergePlus())


@functools.cache
def expected(family: str, k: int | None, plus: bool) -> tuple[list[Any], list[Any]]:
    """Kept places and embeddings of every image, from an eager pass of the tower; newlines stay as they are."""
    model, batch = get_model(family), batch_of(family)
    output, tower = tower_pass(model, batch), model.model.vision_tower
    last = getattr(tower, "vision_model", tower).encoder.layers[-1]
    with torch.no_grad():
        entering = last.layer_norm1(output.hidden_states[-2])
        query, key = last.self_attn.q_proj(entering)[:, 0], last.self_attn.k_proj(entering)
        rows = torch.stack([(k @ q / len(q) ** 0.5).softmax(0) for q, k in zip(query, key, strict=True)])[:, 1:, None]
        hidden = output.hidden_states[model.config.vision_feature_layer][:, 1:]
        features = [packed(model, batch, each) for each in (hidden, rows, key[:, 1:])]
        keep, values = [], []
        for image, cls, keys in zip(*features, strict=True):
            patches = keys.abs().sum(-1).nonzero()[:, 0]
            kept, now = by_hand(image[patches], cls[patches, 0], keys[patches], k, plus)
            newlines = torch.tensor([i for i in range(len(image)) if i not in patches.tolist()], dtype=torch.long)
            index = torch.cat([patches[kept], newlines])
            projected = model.model.multi_modal_projector(now)
            line = model.model.image_newline.expand(len(newlines), -1) if len(newlines) else projected[:0]
            order = index.argsort()
            keep.append(index[order])
            values.append(torch.cat([projected, line])[order])
    return by_sample(batch, keep), by_sample(batch, values)


@pytest.mark.parametrize("method", [PruMerge(keep=5), PruMergePlus(adaptive=True)], ids=["keep", "adaptive"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_end_to_end(family: str, method: Any) -> None:
    model, batch = get_model(family), batch_of(family)
    keep, values = expected(family, None if method.adaptive else 5, method.plus)
    _, _, handle = run(model, batch, method)
    assert [[i.tolist() for i in own] for own in handle.last_keep] == [[i.tolist() for i in own] for own in keep]
    by_reference = continued(model, batch, keep, values)
    check(model, batch, method, by_reference)
    plain = continued(model, batch, keep)  # what merging adds is above the tolerance
    assert (plain[0].logits - by_reference[0].logits).abs().max() > 10 * TOLERANCE
