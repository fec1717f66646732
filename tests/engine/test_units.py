"""Stages in towers where all pictures share a row: the same as a tower that is blind to the units that left.

The Qwen-VL line merges 2x2 patches into a token: they leave together. Qwen2.5-VL attends in windows, whose order its
rows have; Qwen3-VL merges some states on the way (DeepStack).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from masked_tower import BlindTower, overheard_departures
from nosync import NoSync
from test_tower import Twice, answers, broken, by_hand
from torch import Tensor
from transformers import AttentionInterface
from zoo import FAMILIES, GREEDY, get_model, make_batch

import vtc
from vtc.engine.row import Row
from vtc.methods.base import ModelFacts, Reduction, Stage
from vtc.places import Entry, Place, Tower
from vtc.signals import Received, TowerFeatures, TowerKeys
from vtc.tokens import Layout, VisualTokens

UNITS = (
    "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "qwen3_vl_video", "qwen3_vl_moe", "glm46v", "glm46v_video"
)  # fmt: skip
WINDOWS, DEEPSTACK = "qwen2_5_vl_video", "qwen3_vl_video"
ENTRY = Entry()
HYBRID = "qwen3_5"  # its language model cannot be blind to columns


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Loud(vtc.Method):
    """Before one block, the loudest units stay."""

    block: int = 1
    share: float = 0.5

    name: ClassVar[str] = "loud_units"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(Tower(self.block)),)

    def quota(self, n: int, stage: Stage) -> int:
        return max(1, int(self.share * n))

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        assert budget is not None
        scores = tokens.features.double().square().sum(-1).masked_fill(~tokens.mask, -torch.inf)
        return Reduction(scores.sort(dim=1, descending=True, stable=True).indices[:, : max(budget)])


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Uneven(Loud):
    """As many as are louder than the average: content decides."""

    name: ClassVar[str] = "uneven_units"
    content_decides: ClassVar[bool] = True

    def counts(self, layouts: Any, stage: Any = None, given: Any = None) -> None:
        return None

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        loud = tokens.features.double().square().sum(-1).masked_fill(~tokens.mask, 0)
        mask = (loud > loud.sum(1, keepdim=True) / tokens.mask.sum(1, keepdim=True)) & tokens.mask
        return Reduction.of_mask(mask, tuple(mask.sum(1).tolist()))


@vtc.register_method
@dataclass(frozen=True, kw_only=True)
class Onlooker(vtc.Method):
    """Notes what it is given."""

    at: Place = ENTRY
    seen: Any = None

    name: ClassVar[str] = "onlooking_units"

    def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
        signals = (Received(layer=0), TowerKeys(layer=0), TowerFeatures(layer=0))
        return (Stage(self.at, needs=signals),)

    def quota(self, n: int, stage: Stage) -> int:
        return max(1, n // 4)

    def reduce(self, stage: Stage, tokens: VisualTokens, budget: tuple[int, ...] | None) -> Reduction:
        assert budget is not None
        self.seen.append(tokens)
        return Reduction((~tokens.mask).to(torch.int8).argsort(dim=1, stable=True)[:, : max(budget)])


def check(family: str, method: vtc.Method) -> None:
    (logits, tokens), (expected, said) = by_hand(family, method)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(tokens, said)


def apart(family: str, method: vtc.Method) -> float:
    (logits, _), (expected, _) = by_hand(family, method)
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("family", UNITS)
def test_two_stages(family: str) -> None:
    check(family, Twice())


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("family", ["qwen2_vl", WINDOWS, DEEPSTACK])
def test_any_block_works(family: str, block: int) -> None:
    """DeepStack merges behind blocks 0 and 1: all of it, half of it or nothing of it is without those that left."""
    check(family, Loud(block=block))


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK])
def test_few_stay(family: str) -> None:
    """One of a picture: whole windows and frames are empty."""
    check(family, Loud(block=0, share=0.01))


@pytest.mark.parametrize("family", ["qwen2_vl", WINDOWS])
def test_content_may_decide_how_many(family: str) -> None:
    check(family, Uneven())


def pictures_of(model: Any, sample: Any) -> list[Tensor]:
    """[n, d] of each picture and video, as they come out of the encoders."""
    found = []
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in sample:
            encode = getattr(model.model, f"get_{kind}_features")
            found += list(encode(sample[pixels], **{f"{kind}_grid_thw": sample[f"{kind}_grid_thw"]}).pooler_output)
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", [*UNITS, HYBRID])
def test_features_are_those_of_a_tower_that_is_blind(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("eager")
    with overheard_departures() as departures, vtc.patch(model, Twice()):
        ours = pictures_of(model, batch)
    blind, expected = BlindTower(model, departures), {"image": [], "video": []}
    for sample in batch.samples:
        with blind.sample():
            for kind, found in expected.items():
                only = {k: v for k, v in sample.items() if k.startswith(("pixel_values_v", "v")) == (kind == "video")}
                found += pictures_of(model, only)
    dead = [row for kind in expected if kind in departures for row in departures[kind][-1].dead]
    theirs = expected["image"] + expected["video"]
    assert len(ours) == len(theirs) == len(dead) > 2
    for one, other, gone in zip(ours, theirs, dead, strict=True):
        gone = gone[: len(one)]
        assert gone.any()
        assert not one[gone].any()
        torch.testing.assert_close(one[~gone], other[~gone], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK, HYBRID])
def test_a_sample_alone_says_the_same(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, vtc.InTower(keep=0.4, after=1)) as p:
        logits, tokens = answers(model, batch)
        kept = p.last_keep
        for row, sample in enumerate(batch.samples):
            alone = answers(model, sample)
            assert torch.equal(alone[1][0], tokens[row])
            torch.testing.assert_close(alone[0][0], logits[row], rtol=0, atol=5e-4)
            (mine,) = p.last_keep or [[]]
            assert [k.tolist() for k in mine] == [k.tolist() for k in kept[row]] or not batch.images[row]


# ------------------------------------------------------------------------------------------------- what the method sees


@pytest.mark.parametrize("family", [*UNITS, HYBRID])
def test_a_method_sees_what_it_sees_behind_the_tower(family: str) -> None:
    model, batch, inside, behind = get_model(family), make_batch(family), [], []
    adapter, parts = vtc.models.resolve(model)
    assert adapter.facts(parts).tower_depth == 3
    for at, seen in ((Tower(1), inside), (Entry(), behind)):
        with torch.no_grad(), vtc.patch(model, Onlooker(at=at, seen=seen)):
            model(**batch)
    (whole,) = behind
    kinds = [layout.segments[0].kind for layout in whole.layouts]
    order = sorted(range(len(kinds)), key=lambda i: kinds[i] == "frame")  # encoders run one after the other
    if family == "qwen3_vl_video" or len(inside) > 1:
        assert [layout for tokens in inside for layout in tokens.layouts] == [whole.layouts[i] for i in order]
    at = 0
    for tokens in inside:
        assert tokens.features.dtype == torch.float32
        for row, layout in enumerate(tokens.layouts):
            n, other = layout.length, order[at] if len(inside) > 1 else at
            at += 1
            torch.testing.assert_close(tokens.features[row, :n], tokens.signals["tower_features"][row, :n])
            for name, values in tokens.signals.items():
                torch.testing.assert_close(values[row, :n], whole.signals[name][other, :n])
                assert not values[row, n:].any()
    assert at == len(whole.layouts)


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK])
def test_signals_behind_are_at_their_places(family: str) -> None:
    """What later blocks attend to has fewer rows: behind the tower it stands where the units are, 0 elsewhere."""
    model, batch = get_model(family), make_batch(family)
    seen: list[Any] = []

    class Behind(Onlooker):
        def stages(self, model: ModelFacts) -> tuple[Stage, ...]:
            return (
                Stage(Entry(), needs=(Received(layer=2), TowerFeatures(layer=2), TowerFeatures(layer=0, name="0"))),
            )

    with (
        overheard_departures() as departures,
        vtc.patch(model, vtc.InTower(rule="diverse", keep=0.5, after=1, then=Behind(seen=seen))),
        torch.no_grad(),
    ):
        model(**batch)
    ((tokens,), gone) = seen, [row for stages in departures.values() for row in stages[0].dead]
    kinds = [layout.segments[0].kind for layout in tokens.layouts]
    order = sorted(range(len(kinds)), key=lambda i: (kinds[i] == "frame") != (next(iter(departures)) == "video"))
    for dead, at in zip(gone, order, strict=True):
        n = tokens.layouts[at].length
        assert torch.equal(tokens.mask[at, :n], ~dead[:n])
        assert not tokens.signals["received"][at, :n][dead[:n]].any()
        assert not tokens.signals["tower_features"][at, :n][dead[:n]].any()
        assert tokens.signals["0"][at, :n].any(-1).all()  # from before they left
        # each query pays 1 in all, and only those that are there pay
        torch.testing.assert_close(tokens.signals["received"][at].sum(), (~dead[:n]).sum().float())


# ------------------------------------------------------------------------------------------------------------ bit-exact


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK, "glm46v"])
def test_keep_one_changes_no_bit(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    before = answers(model, batch)
    for method in (vtc.InTower(keep=1.0, after=1), Loud(share=1.0)):
        with vtc.patch(model, method):
            for ours, theirs in zip(answers(model, batch), before, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK])
def test_unpatched_it_is_what_it_was(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    before, hooks = answers(model, batch), hooks_of(model)
    patch = vtc.patch(model, vtc.InTower(keep=0.5, after=1))
    assert not torch.equal(answers(model, batch)[0], before[0])
    patch.unpatch()
    assert torch.equal(answers(model, batch)[0], before[0])
    assert hooks == hooks_of(model)


def hooks_of(model: Any) -> dict[Any, int]:
    return {m: len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()}


# ------------------------------------------------------------------------------------- what blocks behind are handed


def row_of(lengths: tuple[int, ...], place: Tensor | None = None) -> Row:
    layouts = tuple(map(Layout.plain, lengths))
    return Row(4, layouts, torch.arange(sum(lengths)) if place is None else place, lengths)


def test_ends_by_hand() -> None:
    row = row_of((3, 4), torch.tensor([2, 0, 1, 3, 6, 5, 4]))
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    rows = row.keep(mask, (2, 1))  # tokens 0, 2 and 4
    assert row.there is not None
    assert row.there.tolist() == [1, 2, 6]
    assert rows.tolist() == [*range(4, 12), *range(24, 28)]
    pictures = torch.tensor([0, 12, 28], dtype=torch.int32)
    assert row.ends(pictures)[0].tolist() == [0, 8, 12]
    assert row.ends(pictures)[1] == 8
    windows = torch.tensor([0, 4, 8, 12, 20, 28], dtype=torch.int32)
    ends, longest = row.ends(windows)
    assert ends.tolist() == [0, 4, 8, 12]  # the others are empty
    assert longest == 4
    assert ends.dtype == torch.int32
    assert row.ends(windows)[0] is ends  # made once
    assert row.alive().tolist() == mask.tolist()
    rows = row.keep(mask & torch.tensor([True, True, False, True]), (1, 1))
    assert row.there.tolist() == [2, 6]
    assert rows.tolist() == [*range(4, 8), *range(8, 12)]
    assert row.ends(windows)[0].tolist() == [0, 4, 8]


def test_nobody_waits_where_a_picture_is_a_sequence() -> None:
    row, ends = row_of((3, 4)), torch.tensor([0, 12, 28], dtype=torch.int32)
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    rotary = torch.rand(28, 8), torch.rand(28, 8)
    with NoSync():
        row.keep(mask, (2, 1))
        row.ends(ends)
        row.rotary(rotary)
        row.spread(torch.rand(1, 12, 5))
        row.gone()
        row.alive()
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        row_of((3, 4)).keep(mask[mask], (2, 1))


def attend_packed(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """As flash attention does it: one row, cut by its ends, which must fill it."""
    ends = kwargs["cu_seq_lens_q"].tolist()
    assert ends[-1] == query.shape[2]
    assert kwargs["max_length_q"] == max(b - a for a, b in itertools.pairwise(ends))
    found = []
    for a, b in itertools.pairwise(ends):
        assert b > a
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        found.append((q @ k.mT * kwargs["scaling"]).softmax(-1) @ v)
    return torch.cat(found, 2).transpose(1, 2), None


@pytest.mark.parametrize("family", [WINDOWS, DEEPSTACK])
def test_flash_attention_is_told_where_sequences_end(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("flash_packed_on_cpu", attend_packed)
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, Twice()):
        expected = answers(model, batch)
        monkeypatch.setattr(model.model.visual.config, "_attn_implementation", "flash_packed_on_cpu")
        logits, tokens = answers(model, batch)
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=1e-4)
    assert torch.equal(tokens, expected[1])


def test_dead_units_are_not_merged() -> None:
    model, batch, rows = get_model(DEEPSTACK), make_batch(DEEPSTACK), []
    visual = model.model.visual
    mergers = [visual.merger, *visual.deepstack_merger_list]
    hooks = [m.register_forward_pre_hook(lambda m, args: rows.append((m, len(args[0])))) for m in mergers]
    with vtc.patch(model, Loud(block=1)):
        model.generate(**batch, **GREEDY)
    for hook in hooks:
        hook.remove()
    units = {name: {n // 4 for m, n in rows if m is merger} for name, merger in zip("l01", mergers, strict=True)}
    video, image = 16 + 18, 8
    assert units == {"l": {video // 2, image // 2}, "0": {video, image}, "1": {video // 2, image // 2}}


# --------------------------------------------------------------------------------------------------- negative controls


def wrong_rotary(self: Row, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert self.there is not None
    return tuple(x[: len(self.there) * self.unit] for x in given)


def one_sequence(self: Row, given: Tensor) -> tuple[Tensor, int]:
    assert self.there is not None
    rows = len(self.there) * self.unit
    return given.new_tensor([0, rows]), rows


def in_token_order(self: Row) -> Tensor:
    assert self.there is not None
    return (1.0 - self._marks(self.there)[self.place].float()).repeat_interleave(self.unit)[None]


def at_the_front(self: Row, tokens: Tensor) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(self.units - len(tokens), tokens.shape[1])])


@pytest.mark.parametrize(
    ("family", "name", "wrong"),
    [
        (WINDOWS, "rotary", wrong_rotary),
        (DEEPSTACK, "rotary", wrong_rotary),
        (WINDOWS, "ends", one_sequence),
        (DEEPSTACK, "ends", one_sequence),
        (WINDOWS, "gone", in_token_order),
        (WINDOWS, "merged", at_the_front),
        (DEEPSTACK, "merged", at_the_front),
    ],
)
def test_control_what_is_not_cut_or_elsewhere_is_found(family: str, name: str, wrong: Callable[..., Any]) -> None:
    with broken(Row, name, wrong):
        assert apart(family, Twice()) > 0.01


@pytest.mark.parametrize("name", ["rotary", "ends"])
def test_control_what_is_handed_on_whole_cannot_run(name: str) -> None:
    whole = (lambda self, given: given) if name == "rotary" else (lambda self, given: (given, 0))
    model, batch = get_model(WINDOWS), make_batch(WINDOWS)
    with broken(Row, name, whole), vtc.patch(model, Twice()), pytest.raises(RuntimeError):
        answers(model, batch)


def test_control_the_reference_is_blind() -> None:
    """With all keys in sight, it says something else."""
    from masked_units import BlindUnits

    with broken(BlindUnits, "hide", lambda self, stages: None):
        assert apart("qwen2_vl", Twice()) > 0.01


# ---------------------------------------------------------------------------------------------------- refused, and why


def test_pictures_that_nobody_knows_are_refused() -> None:
    model, batch = get_model("qwen2_vl"), make_batch("qwen2_vl")
    with (
        vtc.patch(model, Loud()),
        pytest.raises(ValueError, match="4 to a token"),
        broken(type(vtc.models.resolve(model)[0]), "pictures", lambda *args: [Layout.plain(7)]),
    ):
        model(**batch)


def test_gradient_checkpointing_is_refused() -> None:
    model, batch = FAMILIES["qwen2_vl"].build(), make_batch("qwen2_vl")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with vtc.patch(model, Loud()), pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(**batch)


def test_a_tower_that_nobody_hears_runs_whole() -> None:
    model, batch = get_model("qwen2_vl"), make_batch("qwen2_vl")
    run = functools.partial(model.model.visual, batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    before = run().pooler_output
    with vtc.patch(model, Loud()):
        assert torch.equal(run().pooler_output, before)


def test_recorded_states_have_all_places() -> None:
    model, batch = get_model("qwen3_vl"), make_batch("qwen3_vl")
    given = {"image_grid_thw": batch["image_grid_thw"], "output_hidden_states": True}
    with torch.no_grad(), vtc.patch(model, Twice()):
        out = model.model.get_image_features(batch["pixel_values"], **given)
    assert {len(state) for state in (out.last_hidden_state, *out.hidden_states)} == {100}
    zeros = [int((state == 0).all(1).sum()) for state in out.hidden_states]
    assert zeros[0] == 100 - 4 * (4 + 5 + 4)  # transformers hears what enters a block
    assert zeros[-1] == int((out.last_hidden_state == 0).all(1).sum()) == 100 - 4 * (2 + 3 + 2)
