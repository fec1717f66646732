"""vtc.ops against naive float64 references, and the promises its docstrings make."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nosync import NoSync
from torch import Tensor

from vtc import ops
from vtc.ops import recursion

FAST = settings(max_examples=40, deadline=None, derandomize=True)
MODES = ["isolated", "k_center", "max_sum", "mmr", "weights"]
PER_TOKEN = {"mmr": "importance", "weights": "weights"}  # what else is given for each token


def data(seed: int, *shape: int, kind: str = "gauss") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if kind == "shift":
        return x + 1
    if kind == "coarse":  # few distinct cosines: ties everywhere
        return x.round()
    if kind == "duplicates":
        return x[..., torch.randint(0, max(1, shape[-2] // 3), shape[-2:-1], generator=generator), :]
    return x


def run(mode: str, x: Tensor, k: int, **options) -> Tensor:
    n = x.shape[-2]
    if mode == "isolated":
        return ops.farthest_first(x, k, **options)
    if mode == "k_center":
        return ops.farthest_first(x, k, start=options.pop("start", n // 2), **options)
    if mode == "max_sum":
        return ops.max_sum(x, k, options.pop("start", n // 2), **options)
    falling = torch.linspace(0, 1, n).flip(0).expand(x.shape[:-1]).to(x.device)
    if mode == "weights":
        return ops.farthest_first(x, k, weights=options.pop("weights", falling), **options)
    importance = options.pop("importance", falling)
    return ops.max_marginal_relevance(x, importance, k, options.pop("balance", 0.4), **options)


def cosines(x: Tensor) -> Tensor:
    z = x.double()
    z = torch.where(torch.isfinite(z).all(-1, keepdim=True), z, 0.0)
    norm = z.norm(dim=-1, keepdim=True)
    z = torch.where(norm > 0, z / norm, 0.0)
    return z @ z.T


def naive(
    mode: str, x: Tensor, k: int, start: int, importance: Tensor, balance: float
) -> tuple[list[int], list[float]]:
    """Picks in float64 from the definitions, with Python loops, and the margin by which each was won."""
    s, n = cosines(x).tolist(), len(x)
    picks: list[int] = []
    margins: list[float] = []

    def best(score: dict[int, float]) -> None:
        order = sorted(score, key=lambda i: (-score[i], i))
        picks.append(order[0])
        margins.append(score[order[0]] - score[order[1]] if len(order) > 1 else math.inf)

    if mode in ("isolated", "weights"):
        best({i: sorted(1 - s[j][i] for j in range(n))[min(1, n - 1)] for i in range(n)})
    elif mode == "mmr":
        best({i: importance[i].item() for i in range(n)})
    else:
        picks.append(start)
        margins.append(math.inf)
    while len(picks) < k:
        rest = [i for i in range(n) if i not in picks]
        if mode == "max_sum":
            best({i: -sum(s[i][c] for c in picks) for i in rest})
        elif mode == "mmr":
            best({i: balance * importance[i].item() - (1 - balance) * max(s[i][c] for c in picks) for i in rest})
        else:
            weight = importance.tolist() if mode == "weights" else [1.0] * n
            best({i: weight[i] * min(1 - s[i][c] for c in picks) for i in rest})
    return picks, margins


def agree(got: Tensor, expected: list[int], margins: list[float], eps: float) -> bool:
    sure = next((i for i, m in enumerate(margins) if m < eps), len(margins))
    return got.tolist()[:sure] == expected[:sure]


@pytest.mark.parametrize("mode", MODES)
@FAST
@given(
    n=st.sampled_from([1, 2, 3, 17, 40]),
    d=st.sampled_from([1, 3, 64]),
    kind=st.sampled_from(["gauss", "shift"]),
    part=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_picks_are_those_of_the_definition(mode, n, d, kind, part, seed):
    x, importance = data(seed, n, d, kind=kind), data(seed + 1, n, 1)[:, 0].sigmoid()
    k, start = 1 + int(part * (n - 1)), seed % n
    options = {"start": start} if mode in ("k_center", "max_sum") else {}
    if mode == "mmr":
        options = {"importance": importance, "balance": 0.3}
    if mode == "weights":
        options = {"weights": importance}
    got = run(mode, x, k, **options)
    expected, margins = naive(mode, x, k, start, importance, 0.3)
    assert got.dtype == torch.long
    assert got.shape == (k,)
    assert len(set(got.tolist())) == k
    assert agree(got, expected, margins, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_real_size(mode):
    x, importance = data(5, 577, 64), data(6, 577, 1)[:, 0].sigmoid()
    options = {"importance": importance, "balance": 0.3} if mode == "mmr" else {}
    if mode == "weights":
        options = {"weights": importance}
    expected, margins = naive(mode, x, 48, 577 // 2, importance, 0.3)
    assert sum(m > 1e-6 for m in margins) > 40  # else this test compares nothing
    assert agree(run(mode, x, 48, **options), expected, margins, 1e-6)


def test_all_tokens_in_the_order_of_the_definition():
    x = data(3, 17, 8)
    assert sorted(ops.farthest_first(x, 17).tolist()) == list(range(17))


@pytest.mark.parametrize("mode", MODES)
@FAST
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), kind=st.sampled_from(["gauss", "coarse", "duplicates"]))
def test_fewer_picks_are_the_first_of_more(mode, n, seed, kind):
    x = data(seed, n, 3, kind=kind)
    most = run(mode, x, n)
    for k in {1, (n + 1) // 2, max(1, n - 1)}:
        assert torch.equal(run(mode, x, k), most[:k])


@pytest.mark.parametrize("mode", MODES)
@FAST
@given(
    lengths=st.lists(st.sampled_from([1, 2, 5, 17, 33]), min_size=1, max_size=4),
    d=st.sampled_from([1, 3, 64]),
    kind=st.sampled_from(["gauss", "coarse", "duplicates", "shift"]),
    poison=st.sampled_from([math.nan, math.inf, 0.0, 1e30]),
    extra=st.integers(0, 7),
    seed=st.integers(0, 10**6),
)
def test_a_row_picks_the_same_alone_and_in_a_padded_batch(mode, lengths, d, kind, poison, extra, seed):
    n = max(lengths) + extra
    x = torch.full((len(lengths), n, d), poison)
    importance = torch.full((len(lengths), n), poison)
    starts = torch.tensor([m // 2 for m in lengths])
    for g, m in enumerate(lengths):
        x[g, :m] = data(seed + g, m, d, kind=kind)
        importance[g, :m] = data(seed + g, m, 1)[:, 0].sigmoid()
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    options = {"start": starts} if mode in ("k_center", "max_sum") else {}
    if mode in PER_TOKEN:
        options = {PER_TOKEN[mode]: importance}
    batch = run(mode, x, n, mask=mask, **options)
    for g, m in enumerate(lengths):
        alone = {PER_TOKEN[mode]: importance[g, :m]} if mode in PER_TOKEN else {}
        assert torch.equal(batch[g, :m], run(mode, x[g, :m], m, **alone))
        assert sorted(batch[g].tolist()) == list(range(n))


@pytest.mark.parametrize("width", [577, 600, 1024])
def test_similarities_are_the_same_bits_in_every_batch_shape(width):
    x = data(0, 3, 1024, 96, kind="shift")
    x[1, 577:] = math.nan
    alone = recursion._by_gram(recursion._unit_integers(x[1:2, :577]))
    batch = recursion._by_gram(recursion._unit_integers(x[:, :width]))
    product = recursion._by_product(recursion._unit_integers(x[1:2, :577]))
    everything = slice(0, 577)
    assert torch.equal(alone(everything)[0], batch(everything)[1, :, :577])
    assert torch.equal(alone(everything), product(everything))
    assert torch.equal(alone(everything), alone(everything).mT)
    assert torch.equal(alone(torch.tensor([5])), product(torch.tensor([5])))
    assert (alone(everything)[0].double() - cosines(x[1, :577])).abs().max() < 4e-7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["gauss", "coarse", "duplicates"])
def test_with_and_without_the_gram_matrix_and_in_parts(mode, kind, monkeypatch):
    x = data(9, 3, 300, 16, kind=kind)
    expected = run(mode, x, 60)
    monkeypatch.setattr(recursion, "GRAM_ENTRIES", 0)
    assert torch.equal(run(mode, x, 60), expected)
    monkeypatch.setattr(recursion, "GRAM_ENTRIES", 2 * 300 * 300)
    assert torch.equal(run(mode, x, 60), expected)
    monkeypatch.setattr(recursion, "GRAM_ROWS_PER_PICK", 0)
    assert torch.equal(run(mode, x, 60), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_ties_go_to_the_lowest_index(mode, n):
    x = torch.ones(n, 4)
    options = {"importance": torch.full((n,), 0.5)} if mode == "mmr" else {}
    start = n // 2 if mode in ("k_center", "max_sum") else 0
    expected = [start, *(i for i in range(n) if i != start)]
    assert run(mode, x, n, **options).tolist() == expected


def test_padding_is_nobodys_neighbour():
    angles = torch.tensor([0.0, 100.0, 225.0]).deg2rad()  # all cosines negative: a zero row would be nearer
    x = torch.zeros(1, 5, 2)
    x[0, :3] = torch.stack([angles.cos(), angles.sin()], 1)
    mask = torch.arange(5)[None] < 3
    assert ops.farthest_first(x, 3, mask=mask).tolist() == [[2, 0, 1]]
    assert ops.farthest_first(x[0, :3], 3).tolist() == [2, 0, 1]


def test_first_max():
    score = torch.tensor([[1.0, 3, 3, 2], [-math.inf] * 4, [0, 0, 0, 5]])
    assert ops.first_max(score).tolist() == [1, 0, 3]


def test_duplicates_are_picked_last_by_farthest_first():
    x = data(2, 10, 8).repeat(3, 1)
    picks = ops.farthest_first(x, 30)
    assert sorted(i % 10 for i in picks[:10].tolist()) == list(range(10))
    assert sorted(picks.tolist()) == list(range(30))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_rows_without_a_direction_count_as_zero(mode, bad):
    x = data(4, 12, 6)
    zeroed = x.clone()
    zeroed[[3, 7]] = 0.0
    x[3], x[7, 2] = (0.0, 0.0) if bad == 0.0 else (bad, bad)
    x[7] = 0.0 if bad == 0.0 else x[7]
    importance = torch.linspace(0, 1, 12)
    got, expected = run(mode, x, 12), run(mode, zeroed, 12)
    assert torch.equal(got, expected)
    assert sorted(got.tolist()) == list(range(12))
    reference, margins = naive(mode, zeroed, 12, 6, importance.flip(0), 0.4)
    assert agree(got, reference, margins, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_zeros_and_nan(mode):
    for value in (0.0, math.nan):
        assert sorted(run(mode, torch.full((5, 3), value), 5).tolist()) == list(range(5))


@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1e18, 3e38])
def test_length_does_not_matter(scale):
    x = data(1, 20, 5).clamp(-1, 1)
    factor = torch.ones(20, 1)
    factor[::2] = scale
    scaled = x * factor
    coarse = scaled / factor  # what the subnormal rows really are
    assert torch.equal(ops.farthest_first(scaled, 20), ops.farthest_first(coarse, 20))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_features_only_rounds_them(mode, dtype):
    x = data(8, 120, 64, kind="shift").to(dtype)
    assert torch.equal(run(mode, x, 40), run(mode, x.float().to(torch.float64), 40))


def test_autocast_does_not_reach_the_scores():
    x = data(8, 200, 64, kind="shift")
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.farthest_first(x, 80), ops.max_sum(x, 80, 0)
    assert torch.equal(got[0], ops.farthest_first(x, 80))
    assert torch.equal(got[1], ops.max_sum(x, 80, 0))


def test_inputs_are_left_alone_and_may_need_grad():
    x = data(0, 2, 9, 4).double().requires_grad_()
    importance = torch.rand(2, 9)
    before = x.detach().clone(), importance.clone()
    assert not ops.farthest_first(x, 3).requires_grad
    ops.max_marginal_relevance(x, importance, 3)
    ops.max_sum(x.transpose(0, 1).contiguous().transpose(0, 1), 3, 0)  # not contiguous
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(importance, before[1])


def test_start_may_differ_in_each_row():
    x = data(0, 3, 9, 4)
    starts = torch.tensor([2, 0, 8])
    got = ops.max_sum(x, 4, starts)
    assert got[:, 0].tolist() == [2, 0, 8]
    for g in range(3):
        assert torch.equal(got[g], ops.max_sum(x[g], 4, int(starts[g])))
        assert torch.equal(got[g], ops.max_sum(x[g], 4, starts[g]))


def test_an_empty_batch():
    assert ops.farthest_first(torch.zeros(0, 5, 3), 2).shape == (0, 2)


def test_importance_nan_counts_as_nothing():
    importance = torch.tensor([0.2, math.nan, 0.1])
    assert ops.max_marginal_relevance(torch.eye(3), importance, 3, balance=1.0).tolist() == [0, 2, 1]


def test_equal_weights_change_nothing_and_odd_ones_are_tamed():
    x = data(4, 30, 6)
    assert torch.equal(ops.farthest_first(x, 30, weights=torch.full((30,), 0.5)), ops.farthest_first(x, 30))
    odd = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 3e38, 0.5] * 5)
    tame = torch.tensor([0.0, 1e30, 0.0, 0.0, 1e30, 0.5] * 5)
    picks = ops.farthest_first(x, 30, weights=odd)
    assert sorted(picks.tolist()) == list(range(30))
    assert torch.equal(picks, ops.farthest_first(x, 30, weights=tame))


def test_the_first_pick_is_the_most_isolated_whatever_it_weighs():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]])
    assert ops.farthest_first(x, 3, weights=torch.tensor([1.0, 0.5, 0.0])).tolist() == [2, 0, 1]
    assert ops.farthest_first(x, 3, start=1, weights=torch.tensor([1.0, 0.5, 0.001])).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: ops.farthest_first(x, 3, weights=torch.ones(6)), ValueError, ["weights (6,)", "(7, 3)"]),
        (lambda x: ops.farthest_first(x, 8), ValueError, ["8", "7"]),
        (lambda x: ops.farthest_first(x, 0), ValueError, ["0", "7"]),
        (lambda x: ops.max_sum(x, 3, 7), ValueError, ["start=7", "7"]),
        (lambda x: ops.max_sum(x, 3, -1), ValueError, ["start=-1"]),
        (lambda x: ops.max_sum(x, 3, None), TypeError, ["start"]),
        (lambda x: ops.max_sum(x, 3, True), TypeError, ["True"]),
        (lambda x: ops.max_sum(x, 3, torch.tensor([1, 2])), ValueError, ["(2,)"]),
        (lambda x: ops.max_sum(x, 3, torch.tensor([1.0])), TypeError, ["float32"]),
        (lambda x: ops.farthest_first(x.long(), 3), TypeError, ["int64"]),
        (lambda x: ops.farthest_first(x[0], 3), ValueError, ["(3,)"]),
        (lambda x: ops.farthest_first(x, 3, mask=torch.ones(6, dtype=torch.bool)), ValueError, ["(6,)", "(7, 3)"]),
        (lambda x: ops.farthest_first(x, 3, mask=torch.ones(7)), TypeError, ["float32"]),
        (lambda x: ops.max_marginal_relevance(x, torch.ones(6), 3), ValueError, ["(6,)", "(7, 3)"]),
        (lambda x: ops.max_marginal_relevance(x, torch.ones(7), 3, balance=1.5), ValueError, ["1.5"]),
        (lambda x: ops.max_marginal_relevance(x, torch.ones(7), 3, balance=math.nan), ValueError, ["nan"]),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error) as caught:
        call(torch.randn(7, 3))
    assert all(word in str(caught.value) for word in words)


def every_op(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    b = x.shape[0]
    return (
        ops.farthest_first(x, 4, mask=mask),
        ops.farthest_first(x, 4, mask=mask, weights=x[..., 0].abs()),
        ops.max_sum(x, 4, torch.zeros(b, dtype=torch.long), mask=mask),
        ops.max_sum(x, 4, 1),
        ops.max_marginal_relevance(x, x[..., 0].sigmoid(), 4, mask=mask),
        ops.transition_variation(x, x.flip(-1), mask=mask),
        ops.instruction_attention(x[:, None, 5:], x[:, None], 0.5, slice(1, 4), mask=mask),
        ops.crop_budgets(x[0, :9, 0], (3, 2), 0.25),
    )


def test_no_op_waits_for_the_device(monkeypatch):
    x, mask = data(0, 2, 9, 4), torch.arange(9) < torch.tensor([[9], [6]])
    with NoSync():
        every_op(x, mask)
        monkeypatch.setattr(recursion, "GRAM_ENTRIES", 0)
        every_op(x, mask)


@pytest.mark.parametrize(
    "sync", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any())]
)
def test_the_sync_detector_detects(sync):
    with pytest.raises(AssertionError), NoSync():
        sync(torch.randn(4))


def test_every_op_compiles_into_one_graph():
    x, mask = data(0, 2, 9, 4), torch.arange(9) < torch.tensor([[9], [6]])
    compiled = torch.compile(every_op, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(x, mask), every_op(x, mask), strict=True):
        assert torch.equal(got, expected)


# --- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transition_variation_is_the_formula(dtype):
    a, b = data(0, 2, 7, 5).to(dtype), data(1, 2, 7, 5, kind="shift").to(dtype)
    got = ops.transition_variation(a, b)
    assert got.dtype == torch.float32
    for g in range(2):
        u, v = a[g].double(), b[g].double()
        turn = [math.exp(1 - float(p @ q / p.norm() / q.norm())) for p, q in zip(u, v, strict=True)]
        expected = [float(q.norm() / p.norm()) * t / sum(turn) for p, q, t in zip(u, v, turn, strict=True)]
        torch.testing.assert_close(got[g].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_transition_variation_alone_padded_and_poisoned():
    a, b = data(0, 2, 7, 5), data(1, 2, 7, 5)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    a[1, 4:], b[1, 4:] = math.nan, math.inf
    got = ops.transition_variation(a, b, mask=mask)
    torch.testing.assert_close(got[1, :4], ops.transition_variation(a[1:, :4], b[1:, :4])[0])
    torch.testing.assert_close(got[0], ops.transition_variation(a[:1], b[:1])[0])
    assert got[1, 4:].eq(0).all()
    a[0, 2], a[0, 3], b[0, 4] = 0.0, math.nan, 0.0
    odd = ops.transition_variation(a[:1], b[:1])[0]
    assert torch.isfinite(odd).all()
    assert odd[2:5].eq(0).all()
    assert odd[[0, 1, 5, 6]].gt(0).all()
    with pytest.raises(ValueError, match=r"\(2, 7, 5\).*\(2, 6, 5\)"):
        ops.transition_variation(a, b[:, :6])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_instruction_attention_is_the_attention(groups):
    b, heads, length, t, dh = 2, 4, 11, 3, 8
    q, k = data(0, b, heads, t, dh), data(1, b, groups, length, dh)
    full = torch.cat([torch.zeros(b, heads, length - t, dh), q], 2)
    logits = full.double() @ k.repeat_interleave(heads // groups, 1).double().mT * 0.3
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
    expected = weights[:, :, length - t :].mean((1, 2))[:, 2:7]
    got = ops.instruction_attention(q, k, 0.3, slice(2, 7))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-8)
    half = ops.instruction_attention(q.bfloat16(), k.bfloat16(), 0.3, slice(2, 7))
    torch.testing.assert_close(
        half, ops.instruction_attention(q.bfloat16().float(), k.bfloat16().float(), 0.3, slice(2, 7))
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_instruction_attention_ignores_padding(side):
    q, k = data(0, 1, 2, 5, 4), data(1, 1, 2, 9, 4)
    expected = ops.instruction_attention(q[:, :, :3] if side == "right" else q, k, 0.5, slice(1, 5))
    pad = torch.full((1, 2, 2, 4), math.nan)
    if side == "left":
        mask = torch.arange(11)[None] >= 2
        got = ops.instruction_attention(q, torch.cat([pad, k], 2), 0.5, slice(3, 7), mask=mask)
    else:  # the last two of five query rows are padding
        q = torch.cat([q[:, :, :3], pad], 2)
        mask = torch.arange(11)[None] < 9
        got = ops.instruction_attention(q, torch.cat([k, pad], 2), 0.5, slice(1, 5), mask=mask)
    torch.testing.assert_close(got, expected)


def test_instruction_attention_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 4\)"):
        ops.instruction_attention(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 9, 4), 1.0, slice(0, 2))
    with pytest.raises(ValueError, match="do not fit"):
        ops.instruction_attention(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 9, 4), 1.0, slice(0, 2))


@pytest.mark.parametrize(
    ("n", "grid"), [(24, (2, 2)), (24, (1, 4)), (24, (5, 3)), (7, (2, 3)), (3, (3, 3)), (1, (1, 1))]
)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_crop_budgets_are_the_formula(n, grid, scale):
    scores, keep, (columns, rows) = data(n, n * n, 1)[:, 0] * scale, 0.6, grid
    claim = [0.0] * (columns * rows)
    for i in range(n):
        for j in range(n):
            crop = min(i // (n // rows), rows - 1) * columns + min(j // (n // columns), columns - 1)
            claim[crop] += float(scores[i * n + j])
    weight = [math.exp((c - max(claim)) / 10) for c in claim]
    sigma = [w / (sum(weight) + 1e-8) for w in weight]
    expected = [min(1.0, keep * (1 + s - sum(sigma) / len(sigma))) for s in sigma]
    got = ops.crop_budgets(scores, grid, keep)
    assert got.shape == (columns * rows,)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert ops.crop_budgets(scores, grid, 1.0).max() <= 1.0


@pytest.mark.parametrize(
    ("scores", "grid", "keep", "word"),
    [(8, (2, 2), 0.5, "8"), (9, (4, 1), 0.5, "(4, 1)"), (9, (0, 1), 0.5, "(0, 1)"), (9, (1, 1), 1.5, "1.5")],
)
def test_crop_budgets_names_what_is_wrong(scores, grid, keep, word):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ops.crop_budgets(torch.zeros(scores), grid, keep)
    assert word in str(caught.value)


def test_turning_a_token_round_is_no_change_in_absolute_terms():
    a, b = data(1, 2, 9, 8), data(2, 2, 9, 8)
    signed, absolute = ops.transition_variation(a, b), ops.transition_variation(a, b, absolute=True)
    assert torch.allclose(ops.transition_variation(a, -b, absolute=True), absolute, atol=1e-7)
    assert not torch.allclose(ops.transition_variation(a, -b), signed, atol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    expected = b.norm(dim=-1) / a.norm(dim=-1) * (1 - cosine.abs()).exp() / (1 - cosine.abs()).exp().sum(-1, True)
    assert torch.allclose(absolute, expected, atol=1e-6)
