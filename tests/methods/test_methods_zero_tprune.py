"""Zero-TPrune against loops by hand: on drawn attention, and on what the towers of whole models attend to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from asking import keep_mask
from every import refusal
from masked_tower import overheard_departures
from nosync import NoSync
from torch import Tensor, nn
from zoo import GREEDY, get_model, make_batch

import vtc
from vtc import ops
from vtc.methods.base import ANY_MODEL, ModelFacts, Stage
from vtc.methods.zero_tprune import ZeroTPrune
from vtc.ops import graph
from vtc.places import Entry
from vtc.signals import SpecialHeads, TowerHeads
from vtc.signals.heads import UNSEEN
from vtc.tokens import Layout, VisualTokens

HEADS, WIDTH = 3, 5
Row = list[float]


# --------------------------------------------------------------------------------------------------------- by hand


def voted(graph: Tensor, start: Row, votes: int) -> Row:
    """One head: every token gives what it has to whom it attends."""
    have = start
    for _ in range(votes):
        get = [0.0] * len(have)
        for giver, own in enumerate(have):
            for taker in range(len(have)):
                get[taker] += float(graph[giver, taker]) * own
        have = get
    return have


def importance(
    graphs: Tensor,
    special: int,
    votes: int,
    start: str = "cls",
    variance: tuple[float, float] | None = None,
    hidden: frozenset[int] = frozenset(),
) -> Row:
    """Of patches, by maps [heads, T, T]; ``hidden`` counts special tokens too."""
    total, patches = graphs.shape[1], graphs.shape[1] - special
    first = [
        0.0 if i in hidden else math.sqrt(patches) if i < special and start == "cls" else 1.0 for i in range(total)
    ]
    first = [x / sum(first) for x in first]
    heads = [[total * x for x in voted(graph, first, votes)[special:]] for graph in graphs]
    counting = heads
    if variance is not None:
        means = [sum(head) / patches for head in heads]
        spread = [sum((x - m) ** 2 for x in head) / patches for head, m in zip(heads, means, strict=True)]
        counting = [h for h, v in zip(heads, spread, strict=True) if variance[0] <= v <= variance[1]] or heads
    return [math.sqrt(sum(head[i] ** 2 for head in counting) / len(counting)) for i in range(patches)]


def highest(scores: Row) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def by_hand(
    graphs: Tensor, keys: Tensor, special: int, k: int, votes: int, similar: float = 0.5, **more: Any
) -> list[int]:
    """In the order of picking: I', S, I."""
    graphs, keys, n = graphs.double(), keys.double(), len(keys)
    order = highest(importance(graphs, special, 1, **more))
    more_important, less = order[: n - n // 2], order[n - n // 2 :]
    closest = {i: max(cosine(keys[i], keys[j]) for j in more_important) for i in less} if n > 1 else {}
    drop = min(round(similar * (n - k)), n // 2)
    gone = sorted(less, key=lambda i: (-closest[i], -i))[:drop]
    left = [i for i in range(n) if i not in gone]
    nodes = [*range(special), *(special + i for i in left)]
    graphs = graphs[:, nodes][:, :, nodes]
    graphs = graphs / graphs.sum(2, keepdim=True)
    if "hidden" in more:
        more["hidden"] = frozenset(at for at, node in enumerate(nodes) if node in more["hidden"])
    return [left[i] for i in highest(importance(graphs, special, votes, **more))[:k]]


# ----------------------------------------------------------------------------------------------------- drawn tensors


def drawn(n: int, seed: int, special: int = 1) -> dict[str, Tensor]:
    """Signals of one picture; queries and keys are large, so that attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    heads = 1.5 * torch.randn(special + n, 2, HEADS, WIDTH + 1, generator=generator)
    heads[:, 0, :, -1], heads[:, 1, :, -1] = 1.0, 0.0
    found = {"heads": heads[special:], "keys": torch.randn(n, 4, generator=generator)}
    return found | ({"special_heads": heads[:special]} if special else {})


def maps(signals: dict[str, Tensor]) -> Tensor:
    """Float64 [heads, T, T]."""
    every = torch.cat([signals.get("special_heads", signals["heads"][:0]), signals["heads"]]).double()
    query, key = every[:, 0].transpose(0, 1), every[:, 1].transpose(0, 1)
    return (query @ key.mT).softmax(-1)


def selected(method: ZeroTPrune, signals: dict[str, Tensor], k: int, stage: int = 0) -> list[int]:
    features = torch.full((len(signals["keys"]), 2), math.nan)  # nobody looks at them
    order = vtc.select(method, features, keep=k, signals=signals, stage=stage).order
    assert order is not None
    return order.tolist()


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("similar", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("votes", [1, 8, 40])
def test_it_picks_what_loops_pick(votes: int, similar: float, special: int) -> None:
    for seed, n, k in ((0, 13, 4), (1, 12, 3), (2, 9, 8), (3, 12, 1), (4, 6, 6)):
        signals = drawn(n, seed, special)
        expected = by_hand(
            maps(signals), signals["keys"], special, k, votes, similar, start="cls" if special else "uni"
        )
        assert selected(ZeroTPrune(votes=votes, similar=similar), signals, k) == expected


def test_cls_has_more_to_give_or_not() -> None:
    """With one vote the start shows, with forty it is forgotten."""
    apart: dict[int, int] = {}
    for votes in (1, 40):
        apart[votes] = 0
        for seed in range(6):
            signals = drawn(14, seed)
            picks = {start: selected(ZeroTPrune(votes=votes, start=start), signals, 6) for start in ("cls", "uni")}
            for start, found in picks.items():
                assert found == by_hand(maps(signals), signals["keys"], 1, 6, votes, start=start)
            apart[votes] += picks["cls"] != picks["uni"]
    assert apart[1] > 3
    default = ZeroTPrune(votes=1), ZeroTPrune(votes=1, start="cls")
    assert len({tuple(selected(method, drawn(14, 0), 6)) for method in default}) == 1


def test_heads_may_be_left_out_by_variance() -> None:
    changed = 0
    for seed in range(8):
        signals = drawn(14, seed)
        for variance in ((0.0, 1.0), (1.0, 9.0), (1e6, 1e7)):
            found = selected(ZeroTPrune(votes=8, variance=variance), signals, 5)
            assert found == by_hand(maps(signals), signals["keys"], 1, 5, 8, variance=variance)
            changed += found != selected(ZeroTPrune(votes=8), signals, 5)
        assert selected(ZeroTPrune(votes=8, variance=(1e6, 1e7)), signals, 5) == selected(
            ZeroTPrune(votes=8), signals, 5
        )
    assert changed


def test_padding_that_nobody_sees_is_the_last_to_stay() -> None:
    for seed in range(4):
        signals = drawn(12, seed)
        signals["heads"][[2, 3, 11], 1, :, -1] = UNSEEN
        hidden = frozenset({3, 4, 12})
        for k in (4, 9):
            found = selected(ZeroTPrune(votes=8, similar=0.0), signals, k)
            assert found == by_hand(maps(signals), signals["keys"], 1, k, 8, 0.0, hidden=hidden)
            assert not {2, 3, 11} & set(found)
        assert selected(ZeroTPrune(votes=8), signals, 4) == by_hand(
            maps(signals), signals["keys"], 1, 4, 8, hidden=hidden
        )


def test_ties_go_to_the_first() -> None:
    level = {
        "heads": torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])[:, None].expand(12, 2, 2, 3),
        "keys": torch.ones(12, 3),
    }
    assert selected(ZeroTPrune(votes=8), level, 5) == [0, 1, 2, 3, 4]
    assert selected(ZeroTPrune(votes=8, similar=1.0), level, 6) == [0, 1, 2, 3, 4, 5]
    assert ops.without_similar(torch.ones(9, 2), torch.ones(9), 2).tolist() == [0, 1, 2, 3, 4, 5, 6]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    importance = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4])  # 2, 4, 0 are more important; 3 is like 0
    assert ops.without_similar(rows, importance, 1).tolist() == [0, 1, 2, 4]
    assert ops.without_similar(rows, importance, 2).tolist() == [0, 2, 4]


def test_pagerank_in_parts_is_pagerank(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 5, 20, 4, generator=torch.Generator().manual_seed(0))
    start = torch.full((20,), 0.05)
    whole = ops.pagerank(query, key, start, 7)
    torch.testing.assert_close(whole.sum(1), torch.ones(5))
    monkeypatch.setattr(graph, "ENTRIES", 2 * 20**2)
    torch.testing.assert_close(ops.pagerank(query, key, start, 7), whole)


def test_who_left_before_takes_no_part() -> None:
    """A ragged batch, some of it gone: as each alone, with what is left of it."""
    sizes, gone = (14, 9, 12), ((1, 5), (0, 8), (11, 3))
    batch: dict[str, Tensor] = {}
    alive = torch.zeros(3, 14, dtype=torch.bool)
    alone = []
    method = ZeroTPrune(votes=8, keep=4)
    for g, (n, dead) in enumerate(zip(sizes, gone, strict=True)):
        own = drawn(n, seed=g)
        left = [i for i in range(n) if i not in dead]
        few = {name: s if name == "special_heads" else s[left] for name, s in own.items()}
        alone.append(sorted(left[i] for i in selected(method, few, 4)))
        alive[g, left] = True
        for name, s in own.items():
            rows = 1 if name == "special_heads" else 14
            batch.setdefault(name, torch.zeros(3, rows, *s.shape[1:]))[g, : len(s)] = s
            if rows == 14:
                batch[name][g, list(dead)] = 0.0
    tokens = VisualTokens(
        torch.full((3, 14, 2), math.nan),
        tuple(map(Layout.plain, sizes)),
        (0, 0, 0),
        batch,
        {"special_heads": None},
        alive=alive,
        alive_counts=tuple(alive.sum(1).tolist()),
    )
    with NoSync():
        mask, counts = keep_mask(method, tokens)
    assert counts == (4, 4, 4)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == alone


# ------------------------------------------------------------------------------------------------------------ options


def test_votes_by_depth_and_start_by_the_tower() -> None:
    facts = ModelFacts(
        model_type="toy", width=8, depth=8, tower_depth=24, signals=frozenset({"heads", "special_heads"}), restores=True
    )
    settled: Any = ZeroTPrune(after=(1, 6, 7, 18, 19)).settle(facts)
    assert (settled.votes, settled.start, settled.restore) == ((40, 40, 8, 8, 1), "cls", True)
    assert [stage.at.block for stage in settled.stages(facts)] == [1, 6, 7, 18, 19]
    assert [{s.key: s.layer for s in stage.needs} for stage in settled.stages(facts)][1] == {
        "heads": 5,
        "keys": 5,
        "special_heads": 5,
    }
    bare = ModelFacts(model_type="toy", width=8, depth=8, tower_depth=24, signals=frozenset({"heads"}))
    settled = ZeroTPrune(votes=3, after=(0.25, 0.5)).settle(bare)
    assert (settled.votes, settled.start, settled.restore) == ((3, 3), "uni", None)
    assert settled.blocks(bare) == (6, 12)
    with pytest.raises(ValueError, match="start='cls' needs a CLS token"):
        ZeroTPrune(start="cls").check(bare)
    assert ZeroTPrune(after=(0.25, 0.3, 0.5)).blocks(ModelFacts(model_type="t", width=1, depth=1, tower_depth=4)) == (
        1,
        2,
        3,
    )


def test_shares_of_several_stages() -> None:
    def left(method: ZeroTPrune, n: int = 576) -> list[int]:
        stages = method.stages(ANY_MODEL)
        return [method.quota(n, Stage(s.at, number=at)) for at, s in enumerate(stages)]

    published = ZeroTPrune(after=(2, 4, 6), ratios=(0.75, 0.5, 0.25))
    assert published.keep == 0.25
    assert left(published) == [432, 288, 144] == left(ZeroTPrune(after=(2, 4, 6)))
    assert left(ZeroTPrune(after=(2, 4, 6), ratios=(0.7, 0.7, 0.25))) == [403, 403, 144]
    assert left(ZeroTPrune(after=(2, 4, 6), ratios=(0.75, 0.5, 0.25), keep=0.5)) == [480, 384, 288]
    assert left(ZeroTPrune(after=(2, 4), keep=64)) == [320, 64]
    assert left(ZeroTPrune()) == [144]
    assert ZeroTPrune(after=4) == ZeroTPrune(after=[4]) != ZeroTPrune(after=5)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"after": 0}, ValueError, "after=0"),
        ({"after": -2}, ValueError, "after=-2"),
        ({"after": 1.5}, ValueError, r"after=1\.5"),
        ({"after": "4"}, TypeError, "after='4'"),
        ({"after": ()}, ValueError, r"after=\(\)"),
        ({"after": (4, 2)}, ValueError, r"after=\(4, 2\) must rise"),
        ({"after": (2, 0.5)}, ValueError, "not both"),
        ({"ratios": 0.5}, TypeError, "ratios=0.5"),
        ({"after": (2, 4), "ratios": (0.5,)}, ValueError, "one entry for each stage"),
        ({"after": (2, 4), "ratios": (0.25, 0.5)}, ValueError, "falling"),
        ({"after": (2, 4), "ratios": (1.0, 1.0)}, ValueError, "the last below 1"),
        ({"ratios": (1.5,)}, ValueError, r"ratios=1\.5"),
        ({"votes": 0}, ValueError, "votes=0"),
        ({"votes": True}, TypeError, "votes=True"),
        ({"votes": (1, 2)}, ValueError, r"votes=\(1, 2\) must be one value"),
        ({"start": "all"}, ValueError, "start='all'"),
        ({"similar": 1.5}, ValueError, r"similar=1\.5"),
        ({"similar": (0.5, 0.25)}, ValueError, r"similar=\(0\.5, 0\.25\) must be one value"),
        ({"variance": 0.5}, TypeError, r"variance=0\.5"),
        ({"variance": (0.7, 0.01)}, ValueError, "least and most"),
        ({"restore": "no"}, TypeError, "restore='no'"),
        ({"keep": 0}, ValueError, "keep=0"),
    ],
)
def test_a_bad_option_is_named(options: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        ZeroTPrune(**options)


def test_without_a_tower_that_is_served_it_says_so() -> None:
    reason = str(refusal(get_model("qwen2_vl"), ZeroTPrune(after=1)))
    assert "needs 'heads'" in reason
    assert 'vtc.InTower(rule="received")' in reason
    assert "not built so that vtc could" in str(refusal(get_model("llava_pixtral"), ZeroTPrune(after=1)))
    assert "before block 7" in str(refusal(get_model("llava"), ZeroTPrune(after=7)))
    assert "start='cls' needs a CLS token" in str(refusal(get_model("gemma3"), ZeroTPrune(after=1, start="cls")))


@pytest.mark.parametrize("name", ["rule", "then"])
def test_it_is_no_part_of_intower(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=ZeroTPrune.*does not choose before the language model"):
        vtc.InTower(**{name: ZeroTPrune()})


@pytest.mark.parametrize("signal", [TowerHeads(), SpecialHeads()])
def test_such_signals_do_not_leave_the_tower(signal: TowerHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtc.DivPrune, "stages", lambda self, model: (Stage(Entry(), needs=(signal,)),))
    with pytest.raises(ValueError, match=rf"'{signal.key}' at Entry\(\), and only stages inside the vision tower"):
        vtc.patch(get_model("llava"), "divprune")


# --------------------------------------------------------------------------------------------------------- end to end


def attended(attention: nn.Module, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps [pictures, heads, T, T] and keys [pictures, T, width] of one call of an attention, by its projections."""
    with torch.no_grad():
        query, key = (getattr(attention, f"{side}_proj")(hidden).double() for side in "qk")
    heads = attention.num_heads
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1), key


@pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "gemma3", "idefics3"])
def test_two_stages_in_a_tower(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves is what loops let go, by the maps of the two blocks; the second has fewer rows."""
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("eager")
    if hasattr(model.config, "vision_feature_layer"):
        monkeypatch.setattr(model.config, "vision_feature_layer", -1)  # all three blocks are read
    adapter, parts = vtc.models.resolve(model)
    tower = adapter.tower(parts.base, "image")
    calls: list[list[tuple[Tensor, Tensor]]] = [[], []]

    def listen(at: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            calls[at].append(attended(module, hidden, kwargs.get("attention_mask")))

        return tower.attention(at).register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [listen(at) for at in (0, 1)]
    votes, similar, s = (3, 2), (0.5, 0.25), tower.special
    try:
        method = ZeroTPrune(after=(1, 2), keep=0.3, votes=votes, similar=similar)
        with overheard_departures() as departures, vtc.patch(model, method):
            model.generate(**batch, **GREEDY)
    finally:
        for hook in hooks:
            hook.remove()
    before = torch.zeros_like(departures["image"][0].dead)
    for stage, of_block, t, part in zip(departures["image"], calls, votes, similar, strict=True):
        (graphs, keys), n = of_block[0], stage.dead.shape[1]
        for p, dead in enumerate(stage.dead):
            alive = [i for i in range(n) if not before[p, i]]
            unseen = frozenset((graphs[p].amax((0, 1)) == 0).nonzero()[:, 0].tolist())
            start = "cls" if s else "uni"
            kept = by_hand(graphs[p], keys[p, s:], s, n - int(dead.sum()), t, part, start=start, hidden=unseen)
            assert sorted(alive[i] for i in kept) == (~dead).nonzero()[:, 0].tolist()
        assert before.sum() < stage.dead.sum()
        before = stage.dead
