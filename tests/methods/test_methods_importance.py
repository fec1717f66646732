"""IDPruner, where its importance comes from, and what is refused."""

from __future__ import annotations

import json
import os

import asking
import pytest
import torch
from asking import needs
from safetensors.torch import save_file

from vtc import ops
from vtc.config import CompressionConfig
from vtc.methods.base import ModelFacts
from vtc.methods.idpruner import IDPruner, scaled
from vtc.methods.importance import (
    ClsAttention,
    FeatureNorm,
    Importance,
    SelectorWeights,
    register_importance,
)
from vtc.tokens import Layout, VisualTokens


def facts(width: int = 8, *signals: str, **more) -> ModelFacts:
    return ModelFacts(model_type="toy", width=width, depth=4, signals=frozenset(signals), **more)


def tokens_of(*lengths: int, width: int = 8, pad: int = 0) -> VisualTokens:
    n = max(lengths) + pad
    features, cls = torch.full((len(lengths), n, width), torch.nan), torch.zeros(len(lengths), n)
    for g, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        features[g, :length] = torch.randn(length, width, generator=generator)
        cls[g, :length] = torch.rand(length, generator=generator)
    return VisualTokens(features, tuple(map(Layout.plain, lengths)), tuple(range(len(lengths))), {"cls": cls})


def scorer(width: int = 8, hidden: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj.weight": (hidden, width), "k_proj.weight": (hidden, width), "q_proj.bias": (hidden,)}
    shapes["k_proj.bias"] = (hidden,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("importance", [ClsAttention(), FeatureNorm()])
def test_idpruner_is_maximal_marginal_relevance_of_scaled_scores(importance, balance):
    tokens = tokens_of(30, 12, pad=3)
    method = IDPruner(keep=0.3, importance=importance, balance=balance)
    picks = asking.picks(method, tokens, (9, 4))
    for g, (n, k) in enumerate(((30, 9), (12, 4))):
        x = tokens.features[g, :n]
        s = tokens.signals["cls"][g, :n] if importance == ClsAttention() else x.norm(dim=-1)
        s = (s - s.min()) / (s.max() - s.min() + 1e-6)
        expected = ops.max_marginal_relevance(x, s, k, balance)
        assert picks[g, :k].tolist() == expected.tolist()
    assert method.counts(tokens.layouts) == (9, 4)  # round(30 * 0.3), round(12 * 0.3)


def test_scaling_leaves_padding_out():
    scores = torch.tensor([[5.0, 1.0, 3.0, -99.0], [2.0, 2.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    assert torch.allclose(scaled(scores, mask), torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0] * 4]), atol=1e-6)


def test_the_importance_follows_the_model_unless_it_is_given():
    assert IDPruner().settle(facts(8, "cls")).importance == ClsAttention()
    assert IDPruner().settle(facts(8)).importance == FeatureNorm()
    given = IDPruner(importance=FeatureNorm())
    assert given.settle(facts(8, "cls")) is given
    assert needs(IDPruner()) == set()
    assert needs(IDPruner(importance=ClsAttention())) == {"cls"}
    assert "FeatureNorm" in IDPruner(importance=ClsAttention()).remedy


@pytest.mark.parametrize("prefix", ["", "module.", "visual.importance_scorer.", "_orig_mod.module."])
@pytest.mark.parametrize("folder", [True, False])
def test_selector_weights_score_by_the_mean_product(tmp_path, prefix, folder):
    weights = scorer()
    file = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in weights.items()}, file)
    (tmp_path / "config.json").write_text(json.dumps({"in_features": 8, "hidden_dim": 4}))
    importance = SelectorWeights(str(tmp_path if folder else file))
    importance.check(facts(8))
    tokens = tokens_of(30, 12, pad=3)
    scores = importance.score(tokens)
    assert scores.dtype == torch.float32
    for g, n in enumerate((30, 12)):
        x = tokens.features[g, :n]
        q = x @ weights["q_proj.weight"].T + weights["q_proj.bias"]
        k = x @ weights["k_proj.weight"].T + weights["k_proj.bias"]
        assert torch.allclose(scores[g, :n], (q @ k.T / 2.0).mean(-1), atol=1e-4)
    alone = importance.score(tokens_of(12))
    assert torch.equal(alone[0], scores[1, :12])


def test_the_scorer_is_found_inside_a_whole_checkpoint(tmp_path):
    weights = {f"model.visual.importance_scorer.{name}": tensor for name, tensor in scorer().items()}
    names = sorted(weights)
    save_file({names[0]: weights[names[0]], "lm_head.weight": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({name: weights[name] for name in names[1:]}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    SelectorWeights(str(tmp_path)).check(facts(8))


def test_a_changed_file_is_read_again(tmp_path):
    file, tokens = tmp_path / "a.safetensors", tokens_of(9)
    save_file(scorer(seed=1), file)
    first = SelectorWeights(str(file)).score(tokens)
    save_file(scorer(seed=2), file)
    os.utime(file, ns=(1, 1))
    assert not torch.equal(SelectorWeights(str(file)).score(tokens), first)


def test_selector_weights_of_the_wrong_width_are_refused(tmp_path):
    save_file(scorer(width=16), tmp_path / "a.safetensors")
    method = IDPruner(importance=SelectorWeights(str(tmp_path)))
    with pytest.raises(ValueError, match=r"width 16.*'toy'.*width 8.*vtc.IDPruner\(\)"):
        method.check(facts(8))
    method.check(facts(16))


@pytest.mark.parametrize(
    ("change", "config", "word"),
    [
        ({"v_proj.weight": torch.zeros(4, 8)}, None, "v_proj.weight"),
        ({"k_proj.weight": None}, None, "only"),
        ({"k_proj.weight": torch.zeros(4, 9)}, None, "k_proj"),
        ({"q_proj.bias": torch.zeros(5)}, None, "q_proj"),
        ({}, {"in_features": 9}, "in_features=9"),
        ({}, {"hidden_dim": 3}, "hidden_dim=3"),
        ({}, [1], "mapping"),
    ],
)
def test_other_selectors_are_refused_by_name(tmp_path, change, config, word):
    tensors = {name: tensor for name, tensor in (scorer() | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=word):
        SelectorWeights(str(tmp_path)).check(facts(8))


def test_paths_that_hold_no_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="hf download"):
        SelectorWeights("AngelSlim/Qwen2.5-VL-7B-Instruct-Selector").check(facts(8))
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"weights\.bin"):
        SelectorWeights(str(tmp_path / "weights.bin")).check(facts(8))
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        SelectorWeights(str(tmp_path)).check(facts(8))


@pytest.mark.parametrize("importance", [None, ClsAttention(), FeatureNorm(), SelectorWeights("x")])
def test_importances_survive_json(importance):
    config = CompressionConfig.of(IDPruner(importance=importance))
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == IDPruner(importance=importance)


@pytest.mark.parametrize(
    ("nested", "word"),
    [
        ({"importance": "os.system", "options": {}}, "os.system"),
        ({"importance": "selector_weights", "options": {"path": "x", "evil": 1}}, "evil"),
        ({"importance": "feature_norm", "code": "x"}, "code"),
        ({"importance": 3}, "3"),
    ],
)
def test_nothing_but_a_known_importance_is_read(nested, word):
    data = {"version": 1, "method": "idpruner", "options": {"importance": nested}}
    with pytest.raises(ValueError, match=word):
        CompressionConfig.from_dict(data)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match="'cls'"):
        IDPruner(importance="cls")
    with pytest.raises(ValueError, match="balance=2"):
        IDPruner(balance=2)

    class Mine(FeatureNorm):
        pass

    with pytest.raises(ValueError, match="Mine"):
        CompressionConfig.of(IDPruner(importance=Mine())).to_dict()
    with pytest.raises(ValueError, match="feature_norm"):
        register_importance(type("Other", (Importance,), {"name": "feature_norm"}))
