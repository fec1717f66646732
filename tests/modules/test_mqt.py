"""The resampler of MQT: against recorded runs of the original, against itself with fewer queries, and its cache."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtc.modules import MatryoshkaQueryTransformer, draw_queries
from vtc.modules.mqt import PUBLISHED, sincos

FOLDERS = [folder / "shared/conformance/more/mqt_a.npz" for folder in Path(__file__).parents]
RECORDED = next((path for path in FOLDERS if path.is_file()), FOLDERS[0])
NAMES = {
    *("pos_embed", "query", "proj", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"),
    *("attn.out_proj.bias", "ln_q.weight", "ln_q.bias", "ln_k.weight", "ln_k.bias", "ln_v.weight", "ln_v.bias"),
}


def resampler(queries: int = 16, width: int = 32, out: int = 24, heads: int = 4, seed: int = 0) -> Any:
    """Weights that make every part visible: random norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    module = MatryoshkaQueryTransformer(queries, width, out, heads)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "pos_embed":
                scale = 1.0 if "query" in name else 0.4
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("ln" in name))
    return module.eval()


def patches(count: int = 64, width: int = 32, pictures: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(pictures, count, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def by_hand(module: Any, x: Tensor, count: int) -> Tensor:
    """The formula in NumPy, float64, query by query and head by head; bicubic from its own definition (a = -0.75)."""
    w = {name: p.detach().double().numpy() for name, p in module.state_dict().items()}
    queries, width = w["query"].shape
    own, side = round(queries**0.5), round(x.shape[1] ** 0.5)

    def norm(v: Any, name: str) -> Any:
        centred = v - v.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def cubic(t: float) -> float:
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    mix = np.zeros((side, own))
    for i in range(side):
        centre = (i + 0.5) * own / side - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            mix[i, min(max(j, 0), own - 1)] += cubic(centre - j)
    grid = w["pos_embed"].reshape(own, own, width)
    places = np.einsum("ia,jb,abc->ijc", mix, mix, grid).reshape(side * side, width)
    matrix, bias = w["attn.in_proj_weight"].reshape(3, width, width), w["attn.in_proj_bias"].reshape(3, width)
    q = norm(w["query"] + w["pos_embed"], "ln_q")[:count] @ matrix[0].T + bias[0]
    k = norm(places, "ln_k") @ matrix[1].T + bias[1]
    v = norm(x.double().numpy(), "ln_v") @ matrix[2].T + bias[2]
    out, each = np.zeros((x.shape[0], count, width)), width // module.attn.num_heads
    for head in range(module.attn.num_heads):
        at = slice(head * each, (head + 1) * each)
        for m in range(count):
            logits = k[:, at] @ q[m, at] / np.sqrt(each)
            weights = np.exp(logits - logits.max())
            out[:, m, at] = np.einsum("p,bpc->bc", weights / weights.sum(), v[:, :, at])
    out = out @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
    return torch.from_numpy(out @ w["proj"])


@pytest.mark.skipif(not RECORDED.is_file(), reason="the recorded vectors are not here")
@pytest.mark.parametrize("case", [0, 1])
@torch.no_grad()
def test_recorded_runs_of_the_original(case: int) -> None:
    """Weights from their seed, in the order of the state dict, and every recorded m."""
    recorded = np.load(RECORDED)
    meta = json.loads(str(recorded["meta_json"]))[case]
    key, rng = meta["key"], np.random.default_rng(meta["seed"])
    state = {name: torch.from_numpy(recorded[f"{key}__w__{name}"]) for name in meta["layout"]}
    for name, shape in meta["layout"].items():
        if name != "pos_embed":
            rng.standard_normal(shape, dtype=np.float32)
    x = rng.standard_normal((meta["B"], 576, meta["kv"]), dtype=np.float32) * 2 + np.float32(0.5)
    assert x.ravel()[:8].tolist() == meta["first8"]
    module = MatryoshkaQueryTransformer.from_published(state, heads=meta["heads"]).eval()
    for m in (1, 2, 16, 64, 256):
        found, want = module(torch.from_numpy(x), queries=m), torch.from_numpy(recorded[f"{key}__m{m}"])
        assert (found - want).abs().max() <= 2e-5 * want.abs().max(), m
    # the original's table is rounded to half precision
    assert (sincos(16, meta["kv"]) - state["pos_embed"]).abs().max() < 5e-4


@pytest.mark.parametrize("count", [1, 7, 16])
@pytest.mark.parametrize("side", [4, 8])
@torch.no_grad()
def test_the_formula(count: int, side: int) -> None:
    module, x = resampler(), patches(side * side)
    want = by_hand(module, x, count)
    torch.testing.assert_close(module(x, queries=count).double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_the_table_of_places_is_column_then_row() -> None:
    table, rate = sincos(4, 8).double().reshape(4, 4, 8), torch.tensor([1.0, 1e-2], dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            halves = [f(n * rate) for n in (column, row) for f in (torch.sin, torch.cos)]
            torch.testing.assert_close(table[row, column], torch.cat(halves), rtol=0, atol=1e-6)


@torch.no_grad()
def test_fewer_queries_are_the_first_ones() -> None:
    """In double precision: matrix products of other sizes round otherwise. The pattern is a slice, bit for bit."""
    module, x = resampler(), patches()
    whole = module.pattern(64)
    assert all(torch.equal(module.pattern(64, m), whole[:, :m]) for m in range(1, 17))
    module, x = module.double(), x.double()
    all_of_them = module(x)
    for m in range(1, 17):
        torch.testing.assert_close(module(x, queries=m), all_of_them[:, :m], rtol=0, atol=1e-12)
        module.keep = m
        torch.testing.assert_close(module(x), all_of_them[:, :m], rtol=0, atol=1e-12)


def test_prefixes_in_training_too() -> None:
    module, x = resampler().double().train(), patches().double()
    torch.testing.assert_close(module(x, queries=6), module(x)[:, :6], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_picture_alone_and_in_a_batch() -> None:
    module, x = resampler(), patches(pictures=5)
    together = module(x, queries=8)
    for i in range(5):
        torch.testing.assert_close(module(x[i : i + 1], queries=8)[0], together[i], rtol=0, atol=2e-5)


@torch.no_grad()
def test_another_table_of_places_is_another_result() -> None:
    """What a rounded table, rows and columns exchanged, or keys that see content would change."""
    module, x = resampler(), patches()
    before = module(x)
    turned = copy.deepcopy(module)
    turned.pos_embed.copy_(module.pos_embed.roll(16, 1))  # row, then column
    assert (turned(x) - before).abs().max() > 1e-2
    pattern = module.pattern(64).clone()
    module(patches(seed=9))
    assert torch.equal(module.pattern(64), pattern)


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    module, x = resampler(), patches()
    want = module(x)
    cast = copy.deepcopy(module).to(dtype)
    found = cast(x.to(dtype))
    assert found.dtype == dtype
    assert cast.pattern(64).dtype == torch.float32
    assert (found.float() - want).abs().max() <= tolerance * want.abs().max()


@torch.no_grad()
def test_a_table_in_half_precision_beside_float32() -> None:
    """The original raises there."""
    module, x = resampler(), patches()
    want = module(x)
    module.pos_embed = torch.nn.Parameter(module.pos_embed.half(), requires_grad=False)
    torch.testing.assert_close(module(x), want, rtol=0, atol=2e-3 * float(want.abs().max()))


def test_autocast_leaves_the_pattern_alone() -> None:
    module, x = resampler(), patches()
    want = module.pattern(64)
    with torch.autocast("cpu", torch.bfloat16):
        module.train().eval()
        assert torch.equal(module.pattern(64), want)
        assert module(x).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ the cache


def cached(module: Any) -> bool:
    return module._constant is not None


@torch.no_grad()
def test_the_pattern_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, calls = resampler(), patches(), []
    whole = module._attend
    monkeypatch.setattr(module, "_attend", lambda *sizes: calls.append(sizes) or whole(*sizes))
    first = [module(x, queries=m) for m in (3, 16, 3)]
    assert calls == [(64, 16)]
    assert torch.equal(first[0], first[2])
    module(patches(16))
    assert calls == [(64, 16), (16, 16)]


def swap(module: Any, scale: float) -> None:
    """As sharded training does: the same parameter, another storage; the old one is free to be used again."""
    module.query.data = module.query.detach() * scale


WAYS = {
    "in place": lambda m: m.query.mul_(1.5),
    "norm": lambda m: m.ln_k.weight.add_(0.5),
    "bias": lambda m: m.attn.in_proj_bias.add_(torch.linspace(-1, 1, 96)),
    "loaded": lambda m: m.load_state_dict(resampler(seed=5).state_dict()),
    "replaced": lambda m: setattr(m, "query", torch.nn.Parameter(m.query.flip(0))),
    "data, then train and eval": lambda m: (m.query.data.mul_(1.5), m.train(), m.eval()),
    "storage": lambda m: setattr(m.query, "data", m.query.flip(0)),
    "storage, twice": lambda m: (swap(m, 0.5), swap(m, 2.5)),
    "rounded there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_changed_parameter_is_noticed(way: str) -> None:
    module, x = resampler(), patches()
    before = module(x)
    assert cached(module)
    WAYS[way](module)
    fresh = MatryoshkaQueryTransformer(16, 32, 24, 4).eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(module(x), fresh(x))
    assert not torch.equal(module(x), before)


def test_an_optimizer_step_is_noticed_between_evaluations() -> None:
    module, x = resampler(), patches()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with torch.no_grad():
        before = module(x)
    module(x).square().mean().backward()  # eval mode, with gradients: what is kept has none, and is not used
    assert module.query.grad is not None
    assert module.ln_k.weight.grad.any()
    optimizer.step()
    with torch.no_grad():
        fresh = MatryoshkaQueryTransformer.from_published(module.state_dict(), heads=4).eval()
        assert torch.equal(module(x), fresh(x))
        assert not torch.equal(module(x), before)


def test_gradients_reach_what_is_trained_and_not_the_table() -> None:
    module = resampler().train()
    module(patches(), queries=6).square().sum().backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert without == {"pos_embed"}
    assert module.query.grad[:6].abs().min() > 0
    assert not module.query.grad[6:].any()


@torch.no_grad()
def test_copies_do_not_share_the_cache() -> None:
    module, x = resampler(), patches()
    want = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not cached(other)
        assert torch.equal(other(x), want)


@torch.no_grad()
def test_what_was_cached_is_let_go_when_the_module_moves() -> None:
    """It holds the old parameters."""
    module, x = resampler(), patches()
    module(x)
    assert cached(module)
    module.double()
    assert not cached(module)


def test_tensors_of_inference_mode_are_not_cached() -> None:
    """They count no writes."""
    with torch.inference_mode():
        module, x = resampler(), patches()
        module(x)
        assert not cached(module)


# ---------------------------------------------------------------------------------------------- parameters and refusals


def test_parameters_have_the_published_names_and_shapes() -> None:
    module = MatryoshkaQueryTransformer()
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert shapes.keys() == NAMES
    assert shapes["pos_embed"] == shapes["query"] == (256, 1024)
    assert shapes["proj"] == (1024, 4096)
    assert shapes["attn.in_proj_weight"] == (3072, 1024)
    assert module.attn.num_heads == 16
    assert not module.pos_embed.requires_grad


@pytest.mark.parametrize("prefix", ["", PUBLISHED])
@torch.no_grad()
def test_published_parameters_load_strictly(prefix: str) -> None:
    module, x = resampler(), patches()
    state = {prefix + name: p for name, p in module.state_dict().items()}
    others = {"model.norm.weight": torch.ones(3)} if prefix else {}
    loaded = MatryoshkaQueryTransformer.from_published(state | others, heads=4).eval()
    assert torch.equal(loaded(x), module(x))
    for name in (prefix + "ln_q.bias", prefix + "query"):
        with pytest.raises(ValueError, match=name.removeprefix(PUBLISHED)):
            MatryoshkaQueryTransformer.from_published({n: p for n, p in state.items() if n != name}, heads=4)
    with pytest.raises(ValueError, match="mlp"):
        MatryoshkaQueryTransformer.from_published(state | {prefix + "mlp.weight": torch.ones(2)}, heads=4)


def test_loading_takes_the_dtype_of_the_queries() -> None:
    state = resampler().state_dict()
    half = {name: p.half() for name, p in state.items()}
    assert MatryoshkaQueryTransformer.from_published(half, heads=4).pos_embed.dtype == torch.float16


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0, ValueError, "keep=0 is not in 1 .. 16"),
        (17, ValueError, "keep=17 is not in 1 .. 16"),
        (-2, ValueError, "keep=-2 is not in"),
        (True, TypeError, "keep=True is no int"),
        (4.0, TypeError, "keep=4.0 is no int"),
        ("4", TypeError, "keep='4' is no int"),
    ],
)
def test_keep_is_checked(value: Any, error: type[Exception], words: str) -> None:
    module, x = resampler(), patches()
    module.keep = 3
    with pytest.raises(error, match=re.escape(words)):
        module.keep = value
    assert module.keep == 3
    with pytest.raises(error, match=re.escape(words.replace("keep", "queries"))):
        module(x, queries=value)
    module.keep = None
    assert module(x).shape[1] == 16


@pytest.mark.parametrize("shape", [(64, 32), (2, 64, 31), (2, 65, 32)])
def test_patches_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="patches of shape"):
        resampler()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((15, 32, 8, 4), "no square number"), ((16, 30, 8, 2), "divisible by 4"), ((16, 32, 8, 5), "heads=5")],
)
def test_sizes_are_checked(sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MatryoshkaQueryTransformer(*sizes)


def test_a_training_step_draws_every_even_number() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_queries(36, generator) for _ in range(2000)]
    assert set(drawn) == set(range(2, 37, 2))
    torch.manual_seed(3)
    first = [draw_queries(256) for _ in range(8)]
    torch.manual_seed(3)
    assert [draw_queries(256) for _ in range(8)] == first
