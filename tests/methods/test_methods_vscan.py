"""VScan against loops by hand, on bare tensors and end to end: places, means, and the stage inside the model."""

from __future__ import annotations

import math

import pytest
import torch
from asking import entering
from nosync import NoSync
from reference import Continuation, blind
from test_contract import batch_of, by_sample, check
from test_methods_hiprune import ANYRES, PICTURES
from test_methods_saliency import compare, embeddings, looked, regions
from torch import Tensor
from zoo import GREEDY, NEW_TOKENS, get_model

import vtc
from vtc.methods.base import ModelFacts, Stage
from vtc.methods.grids import windows
from vtc.methods.vscan import VScan
from vtc.places import Entry, Layer
from vtc.tokens import Layout, VisualTokens


def chosen(
    shallow: Tensor, deep: Tensor, k: int, pictures: list[tuple[list[int], int]], side: int = 6, released: bool = False
) -> list[int]:
    """Local tokens, window by window, then global ones."""
    cut = []
    for own, columns in pictures:
        rows = len(own) // columns
        high, wide = math.ceil(rows / side), math.ceil(columns / side)
        parts: dict[tuple[int, int], list[int]] = {}
        for at, token in enumerate(own):
            row, column = divmod(at, columns)
            parts.setdefault((row * high // rows, column * wide // columns), []).append(token)
        cut += parts.values()
    kept: list[int] = []
    for window in cut:
        kept += sorted(window, key=lambda i: (-float(shallow[i]), i))[: k // 2 // len(cut)]
    more = k - k // 2 if released else k - len(kept)
    others = [i for own, _ in pictures for i in own if i not in kept]
    return sorted(kept + sorted(others, key=lambda i: (-float(deep[i]), i))[:more])


def melted(features: Tensor, kept: list[int], others: list[int], sizes: list[float] | None = None) -> Tensor:
    """Each of the others joins one kept token; all become means."""
    sizes = sizes or [1.0] * len(features)
    x = features.double()
    total = {i: x[i] * sizes[i] for i in kept}
    weight = {i: sizes[i] for i in kept}
    for i in others:
        alike = [float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in kept]
        to = kept[alike.index(max(alike))]
        total[to], weight[to] = total[to] + x[i] * sizes[i], weight[to] + sizes[i]
    return torch.stack([total[i] / weight[i] for i in kept]).to(features.dtype)


def drawn(n: int, d: int = 6, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    signals = {name: torch.rand(n, generator=generator) for name in ("cls_shallow", "cls")}
    return torch.randn(n, d, generator=generator), signals


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("side", [2, 3, 6])
@pytest.mark.parametrize("k", [1, 2, 9, 30, 62])
def test_it_keeps_and_melts_what_loops_do(k: int, side: int, released: bool) -> None:
    x, signals = drawn(63)
    grid = Layout.plain(63, (7, 9))
    found = vtc.select("vscan", x, keep=k, signals=signals, layout=grid, window=side, released=released)
    kept = chosen(*signals.values(), k, [([*range(63)], 9)], side, released)
    assert found.index.tolist() == kept
    assert released or len(kept) == k
    others = [i for i in range(63) if i not in kept]
    torch.testing.assert_close(found.features, melted(x, kept, others), rtol=1e-5, atol=1e-6)


def test_windows_are_nearly_equal_and_within_a_picture() -> None:
    found, sizes = windows([Layout.plain(35, (5, 7)), Layout.plain(10)], 36, 3)
    down, across = [0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2]
    assert found[0].tolist() == [3 * r + c for r in down for c in across] + [6]
    assert found[1].tolist() == [0] * 5 + [1] * 5 + [6] * 26
    assert sizes == ((9, 6, 6, 6, 4, 4), (5, 5))
    bare = ANYRES.without_newlines()
    found, sizes = windows([bare], 16, 2)
    assert found[0].tolist() == [0] * 4 + [1, 1, 2, 5] * 2 + [3, 3, 4, 6]
    assert sizes[0] == (4, 4, 2, 2, 1, 2, 1)
    assert windows([Layout.plain(576, (24, 24))], 576, 6)[1] == ((36,) * 16,)


def test_pictures_have_windows_of_their_own_and_newlines_stay() -> None:
    x, signals = drawn(19, seed=1)
    newlines = [8, 13, 18]
    for row in signals.values():
        row[newlines] = 0.0
    found = vtc.select(VScan(keep=14, window=2), x, signals=signals, layout=ANYRES)
    kept = chosen(*signals.values(), 14, PICTURES, 2)
    assert found.index.tolist() == sorted(kept + newlines)
    others = [i for own, _ in PICTURES for i in own if i not in kept]
    values = dict(zip(kept, melted(x, kept, others), strict=True)) | {i: x[i] for i in newlines}
    torch.testing.assert_close(found.features, torch.stack([values[i] for i in sorted(values)]), rtol=1e-5, atol=1e-6)


def test_duplicates_join_the_first_and_rows_of_zeros_are_no_nan() -> None:
    x = torch.eye(3)[torch.tensor([0, 1, 0, 1, 2, 2])]
    x[4:] = 0.0
    signals = {"cls": torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0, 0.0]), "cls_shallow": torch.zeros(6)}
    found = vtc.select(
        "vscan", torch.cat([x, x[:1]]), keep=3, signals={n: torch.cat([s, s[3:4]]) for n, s in signals.items()}
    )
    assert found.index.tolist() == [0, 1, 2]
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(found.features, expected)  # 3 joined 1, and 6 joined 0; 4 and 5 are like nobody


def tokens_of(layouts: list[Layout], pad: int = 3, poison: float = math.nan) -> VisualTokens:
    n = max(layout.length for layout in layouts) + pad
    features = torch.full((len(layouts), n, 16), poison)
    signals = {name: torch.zeros(len(layouts), n) for name in ("cls", "cls_shallow")}
    for g, layout in enumerate(layouts):
        x, own = drawn(layout.length, 16, seed=g)
        features[g, : layout.length] = x
        for name, row in own.items():
            signals[name][g, : layout.length] = row
    return VisualTokens(features, tuple(layouts), tuple(range(len(layouts))), signals)


def test_a_ragged_batch() -> None:
    layouts = [Layout.plain(40, (5, 8)), ANYRES, Layout.plain(9), Layout.plain(1, (1, 1))]
    tokens, method = tokens_of(layouts), VScan(keep=0.4, window=3)
    together = entering(method, tokens)
    assert together.counts == (16, 6 + 3, 4, 1)
    for g, layout in enumerate(layouts):
        n = layout.length
        signals = {name: row[g, :n] for name, row in tokens.signals.items()}
        alone = vtc.select(method, tokens.features[g, :n], signals=signals, layout=layout)
        assert alone.index.tolist() == together.mask[g].nonzero()[:, 0].tolist()
        if alone.features is not None:
            own = torch.where(together.written[g, :, None], together.features[g], tokens.features[g])
            assert torch.equal(own[alone.index], alone.features)


def test_sizes_count_and_weigh() -> None:
    tokens = tokens_of([Layout.plain(20, (4, 5))], pad=0)
    kept = entering(VScan(keep=6), tokens)
    assert kept.size.sum() == 20
    sizes = 1.0 + torch.arange(20.0).remainder(3)
    again = entering(VScan(keep=6), VisualTokens(**{**vars(tokens), "size": sizes[None]}))
    assert torch.equal(again.mask, kept.mask)
    assert again.size.sum() == sizes.sum()
    index = kept.mask[0].nonzero()[:, 0].tolist()
    others = [i for i in range(20) if i not in index]
    expected = melted(tokens.features[0], index, others, sizes.tolist())
    torch.testing.assert_close(again.features[0, index], expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_left_before_are_nobody() -> None:
    tokens = tokens_of([Layout.plain(30, (5, 6))], pad=0)
    alive = torch.arange(30) % 3 != 1
    gone = tokens.features.masked_fill(~alive[:, None], math.nan)
    tokens = VisualTokens(**{**vars(tokens), "features": gone, "alive": alive[None], "alive_counts": (20,)})
    kept = entering(VScan(keep=7, window=2), tokens)
    assert kept.counts == (7,)
    assert kept.mask.sum() == 7
    assert not (kept.mask[0] & ~alive).any()
    assert kept.size.sum() == 20
    assert kept.features[0, kept.mask[0]].isfinite().all()


def test_nobody_waits_for_the_device() -> None:
    tokens = tokens_of([ANYRES, Layout.plain(30, (5, 6))])
    with NoSync():
        entering(VScan(keep=0.3, window=2), tokens)
        entering(VScan(keep=0.3, window=2, released=True), tokens)


# -------------------------------------------------------------------------------------------------------------- stage 2


def facts(depth: int) -> ModelFacts:
    return ModelFacts(model_type="toy", width=8, depth=depth, signals=frozenset({"cls"}))


def test_counts_of_both_stages() -> None:
    layouts = [Layout.plain(576, (24, 24)), ANYRES]
    one, two = VScan(keep=96), VScan(keep=96, stage2=True)
    assert one.counts(layouts[:1]) == (96,)
    assert two.counts(layouts[:1]) == (32,)
    first, second = two.stages(facts(32))
    assert [first.at, second.at] == [Entry(), Layer(16)]
    assert two.counts(layouts[:1], Stage(Entry(), number=0)) == (96,)
    assert VScan(keep=0.5, stage2=True, then=0.25).counts(layouts) == (72, 2 + 3)
    assert VScan(keep=0.5, released=True).counts(layouts) is None
    assert two.stages(facts(28))[1].at == Layer(14)
    assert [VScan(stage2=on).query_aware for on in (False, True)] == [False, True]
    with pytest.raises(ValueError, match="layer 0"):
        vtc.methods.stages.steps_of(two, facts(1))


def test_stage_2_keeps_what_the_last_row_looks_at() -> None:
    x, _ = drawn(9)
    last = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.0, 0.9, 0.2, math.nan, 0.1])
    found = vtc.select("vscan", x, keep=4, stage=1, signals={"last": last}, stage2=True)
    assert found.order.tolist() == [5, 1, 3, 2]
    found = vtc.select("vscan", x, keep=1.0, stage=1, signals={"last": last}, stage2=True, released=True)
    assert found.order.tolist() == [5, 1, 3]


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 2.0}, TypeError, r"window=2\.0"),
        ({"shallow": 1.5}, ValueError, r"shallow=1\.5"),
        ({"then": 0.0}, ValueError, r"then=0\.0"),
        ({"stage2": 1}, TypeError, "stage2=1"),
        ({"released": "no"}, TypeError, "released='no'"),
        ({"newlines": "candidates"}, ValueError, "newlines='candidates' must be 'keep'"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        VScan(**options)


# ----------------------------------------------------------------------------------------------------------- end to end


def first_stage(family: str, kind: str, side: int) -> tuple[list[list[int]], list[Tensor]]:
    """Places and values of every image; newlines stay as they are."""
    shallow, deep = (looked(family, kind, layer) for layer in (0, -2 if kind == "cls" else -1))
    keep, values = [], []
    for x, a, b, pictures in zip(embeddings(family), shallow, deep, regions(family), strict=True):
        patches = [i for own, _ in pictures for i in own]
        kept = chosen(a, b, max(1, round(0.5 * len(patches))), pictures, side)
        newlines = [i for i in range(len(x)) if i not in patches]
        now = dict(zip(kept, melted(x, kept, [i for i in patches if i not in kept]), strict=True))
        now |= {i: x[i] for i in newlines}
        keep.append(sorted(now))
        values.append(torch.stack([now[i] for i in sorted(now)]))
    return keep, values


@pytest.mark.parametrize("kind", ["cls", "received"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_end_to_end(family: str, kind: str) -> None:
    """Layer 0 of 3 is 5 / 24 of the tower."""
    keep, values = first_stage(family, kind, side=2)
    compare(family, VScan(keep=0.5, window=2, saliency=kind), keep, values)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_both_stages_end_to_end(family: str) -> None:
    """Against an unpatched model, in which a hook writes the means and columns are hidden layer by layer."""
    model, batch = get_model(family), batch_of(family)
    found, means = first_stage(family, "cls", side=2)
    keep, values = by_sample(batch, found), by_sample(batch, means)
    lines = by_sample(
        batch,
        [
            [i for i in kept if not any(i in own for own, _ in p)]
            for kept, p in zip(found, regions(family), strict=True)
        ],
    )
    model.set_attn_implementation("eager")
    depth = len(model.get_decoder().layers)
    half, expected = depth // 2, []
    for s, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        gone = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
        for columns, kept in zip(images, keep[s], strict=True):
            gone[columns] = True
            gone[columns[kept]] = False

        def write(module, args, kwargs, s=s, images=images):
            hidden = args[0].clone()
            for columns, kept, now in zip(images, keep[s], values[s], strict=True):
                hidden[:, columns[kept]] = now
            return (hidden, *args[1:]), kwargs

        hook = model.get_decoder().layers[0].register_forward_pre_hook(write, with_kwargs=True)
        try:
            with blind(model, [gone] * depth), torch.no_grad():
                row = model(**sample, output_attentions=True).attentions[half][0].mean(0)[-1]
            later = gone.clone()
            for columns, kept, own in zip(images, keep[s], lines[s], strict=True):
                patches = torch.tensor([i for i in kept if i not in own])
                stay = row[columns[patches]].topk(max(1, round(0.4 * len(patches)))).indices
                later[columns[patches]] = True
                later[columns[patches[stay]]] = False
            hidden = [later if index >= half else gone for index in range(depth)]
            with blind(model, hidden):
                out = model.generate(
                    **sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True
                )
        finally:
            hook.remove()
        logits = torch.stack(out.logits, 1)[0]
        expected.append(Continuation(out.sequences[0, -NEW_TOKENS:], logits, later, logits))
    check(model, batch, VScan(keep=0.5, window=2, stage2=True, then=0.4, saliency="cls"), expected)
