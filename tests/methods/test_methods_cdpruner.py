"""CDPruner and the CLIP text tower against loops by hand, on bare tensors and end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from asking import picks
from nosync import NoSync
from reference import decoder_call
from test_contract import batch_of, by_sample, check, continued, packed, run, tower_pass
from torch import Tensor
from zoo import get_model

import vtc
from vtc import ops
from vtc.config import CompressionConfig
from vtc.methods.base import ANY_MODEL
from vtc.methods.cdpruner import CDPruner
from vtc.methods.centering import centred
from vtc.methods.cliptext import ClipText
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention
from vtc.ops import determinant
from vtc.tokens import Layout, VisualTokens


def by_hand(features: Tensor, weight: Any, k: int) -> list[int]:
    """Every pick by the determinant of all kernels that it could make."""
    z = features.double().numpy()
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-30)
    r = np.asarray(weight, dtype=float)
    kernel = r[:, None] * (z @ z.T) * r[None]
    taken: list[int] = []
    for _ in range(k):
        value = [
            -math.inf if i in taken else np.linalg.slogdet(kernel[np.ix_([*taken, i], [*taken, i])])[1]
            for i in range(len(z))
        ]
        taken.append(int(np.argmax(np.round(value, 9))))  # the first of equal ones
    return taken


def scaled(raw: Tensor) -> Tensor:
    return (raw - raw.min() + 1e-6) / (raw.max() - raw.min())


def drawn(n: int, d: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- bare tensors


@pytest.mark.parametrize("k", [1, 7, 30])
def test_it_picks_what_determinants_pick(k: int) -> None:
    x, weight = drawn(30), drawn(30, 1, seed=1)[:, 0].sigmoid()
    assert vtc.select("cdpruner", x, keep=k).order.tolist() == by_hand(x, np.ones(30), k)
    found = vtc.select("cdpruner", x, keep=k, signals={"relevance": weight})
    assert found.order.tolist() == by_hand(x, weight, k)
    assert found.order.tolist() != by_hand(x, np.ones(30), k)


def test_relevance_is_minus_the_mean_cosine_to_the_pieces_of_a_text() -> None:
    x, images, texts = drawn(30), drawn(30, 5, seed=1), drawn(3, 5, seed=2)
    raw = torch.tensor([-sum(float(torch.cosine_similarity(i, t, dim=0)) for t in texts) / 3 for i in images])
    found = vtc.select("cdpruner", x, keep=20, signals={"image_embeds": images, "text_embeds": texts})
    assert found.order.tolist() == by_hand(x, scaled(raw), 20)
    same = vtc.select("cdpruner", x, keep=20, signals={"image_embeds": images[:1].expand(30, 5), "text_embeds": texts})
    assert same.order.tolist() == by_hand(x, np.ones(30), 20)  # nothing to scale between


def test_another_importance_is_a_relevance_too() -> None:
    x, cls = drawn(30), drawn(30, 1, seed=1)[:, 0].sigmoid()
    found = vtc.select("cdpruner", x, keep=20, relevance=ClsAttention(), signals={"cls": cls})
    assert found.order.tolist() == by_hand(x, scaled(cls), 20)


@pytest.mark.parametrize("variant", ["llava", "qwen"])
def test_centred(variant: Any) -> None:
    x, weight = drawn(30) + 1, drawn(30, 1, seed=1)[:, 0].sigmoid()
    middle, distinct = centred(x[None], torch.ones(1, 30, dtype=torch.bool), variant)
    found = vtc.select("cdpruner", x, keep=15, centered=True, variant=variant, signals={"relevance": weight})
    assert found.order.tolist() == by_hand(middle[0], weight * distinct[0], 15)


def test_past_the_rank_nothing_is_picked_twice_and_relevance_decides() -> None:
    x, weight = drawn(6, 8).repeat(3, 1), torch.linspace(0.1, 1, 18)
    found = vtc.select("cdpruner", x, keep=18, signals={"relevance": weight})
    order = found.order.tolist()
    assert {i % 6 for i in order[:6]} == {*range(6)}
    assert sorted(order) == [*range(18)]
    assert order[6:] == sorted(order[6:], reverse=True)
    flat = drawn(20, 4)  # of rank 4
    order = vtc.select("cdpruner", flat, keep=20).order.tolist()
    assert order[:4] == by_hand(flat, np.ones(20), 4)
    assert order[4:] == sorted(order[4:])


def test_the_first_of_equal_tokens_is_taken_and_zeros_are_no_nan() -> None:
    x = drawn(6).repeat(3, 1)
    order = vtc.select("cdpruner", x, keep=18).order.tolist()
    assert sorted(order[:6]) == [*range(6)]
    assert order[6:] == [*range(6, 18)]
    x[2], x[4, 1], x[5] = 0.0, math.nan, math.inf
    order = vtc.select("cdpruner", x, keep=18).order.tolist()
    assert sorted(order[:6]) == [0, 1, 3, 8, 10, 11]
    assert order[6:] == [2, 4, 5, 6, 7, 9, *range(12, 18)]
    assert vtc.select("cdpruner", torch.zeros(5, 3), keep=3).order.tolist() == [0, 1, 2]
    odd = {"relevance": torch.full((18,), math.nan)}
    assert vtc.select("cdpruner", x, keep=3, signals=odd).order.tolist() == [0, 1, 2]


def test_a_ragged_batch_with_equal_tokens_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, counts = (50, 9, 31), (40, 8, 12)
    features, relevance = torch.full((3, 57, 64), math.nan), torch.zeros(3, 57)
    for g, n in enumerate(lengths):
        features[g, :n] = drawn(n, 64, seed=g)[torch.arange(n) % 27]
        relevance[g, :n] = drawn(n, 1, seed=g)[torch.arange(n) % 27, 0].sigmoid()
    tokens = VisualTokens(features, tuple(map(Layout.plain, lengths)), (0, 1, 2), {"relevance": relevance})
    with NoSync():
        together = picks(CDPruner(), tokens, counts)
    monkeypatch.setattr(determinant, "ENTRIES", 1)
    assert torch.equal(picks(CDPruner(), tokens, counts), together)
    for g, (n, k) in enumerate(zip(lengths, counts, strict=True)):
        alone = vtc.select("cdpruner", features[g, :n], keep=k, signals={"relevance": relevance[g, :n]})
        assert alone.order.tolist() == together[g, :k].tolist()


def test_sums_are_exact() -> None:
    """A token's variance, and with it every pick, is the same wherever the token stands."""
    x, turned = drawn(64, 32), torch.randperm(64, generator=torch.Generator().manual_seed(3))
    weight = drawn(64, 1, seed=1)[:, 0].sigmoid()
    mask = torch.ones(1, 64, dtype=torch.bool)
    order = ops.max_determinant(x[None], weight[None], 64, mask=mask)[0]
    other = ops.max_determinant(x[turned][None], weight[turned][None], 64, mask=mask)[0]
    assert turned[other].tolist() == order.tolist()


@pytest.mark.parametrize(
    ("options", "word"), [({"relevance": "clip"}, "relevance='clip'"), ({"relevance": 1}, "relevance=1")]
)
def test_a_bad_option_is_named(options: dict, word: str) -> None:
    with pytest.raises(TypeError, match=word):
        CDPruner(**options)


def test_no_relevance_asks_for_nothing() -> None:
    assert CDPruner(relevance="none") == CDPruner()  # type: ignore[arg-type]
    assert not CDPruner().query_aware
    assert not CDPruner().signals()


# ------------------------------------------------------------------------------------------------- the CLIP text tower

QUESTIONS = ("what is it", "where is the cat and where is the dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose vision tower has the shape of the tiny models', saved as transformers saves it."""
    path = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tf.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(path)
    vision = get_model("llava").config.vision_config.to_dict()
    text = {"vocab_size": len(words), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 10, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return path


def texts_by_hand(folder: Path, question: str) -> Tensor:
    """[M, e], piece by piece."""
    model, tokenizer = tf.CLIPModel.from_pretrained(folder).eval(), tf.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(question).input_ids
    rows = []
    with torch.no_grad():
        for at in range(0, len(ids), 10):
            piece = ids[at : at + 10]
            mask = [1] * len(piece) + [0] * (10 - len(piece))
            inputs = {
                "input_ids": torch.tensor([piece + [0] * (10 - len(piece))]),
                "attention_mask": torch.tensor([mask]),
            }
            rows.append(model.text_projection(model.text_model(**inputs).pooler_output)[0])
    return torch.stack(rows)


def relevance_by_hand(folder: Path, patches: Tensor, question: str) -> Tensor:
    model = tf.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        images = model.visual_projection(model.vision_model.post_layernorm(patches))
    texts = texts_by_hand(folder, question)
    return torch.stack([-torch.stack([torch.cosine_similarity(i, t, dim=0) for t in texts]).mean() for i in images])


def test_a_question_is_encoded_in_pieces(folder: Path) -> None:
    clip = ClipText(folder)._loaded()  # type: ignore[arg-type]
    for question, pieces in zip(QUESTIONS, (1, 4), strict=True):
        assert len(clip.encoded(question)) == pieces
        torch.testing.assert_close(clip.encoded(question), texts_by_hand(folder, question), rtol=1e-5, atol=1e-6)


def test_patches_are_compared_with_the_question(folder: Path) -> None:
    clip, x = ClipText(str(folder)), drawn(20)
    patches = drawn(20, get_model("llava").config.vision_config.hidden_size, seed=1)
    patches[7] = 0.0  # no patch: a newline
    raw = relevance_by_hand(folder, patches, QUESTIONS[1])
    raw[7] = torch.cat([raw[:7], raw[8:]]).min()
    with clip.asking(QUESTIONS[1]):
        found = vtc.select("cdpruner", x, keep=12, relevance=clip, signals={"clip_features": patches})
    assert found.order.tolist() == by_hand(x, scaled(raw), 12)
    with pytest.raises(ValueError, match="0 questions for 1 samples"):
        vtc.select("cdpruner", x, keep=12, relevance=clip, signals={"clip_features": patches})
    with clip.asking("a"), pytest.raises(ValueError, match=r"of width .*, this model's has 40"):
        vtc.select("cdpruner", x, keep=12, relevance=clip, signals={"clip_features": x})
    for bad in ((), [1], 3):
        with pytest.raises(TypeError), clip.asking(bad):  # type: ignore[arg-type]
            pass


def test_it_is_a_value_that_a_config_holds(folder: Path) -> None:
    method = CDPruner(relevance=ClipText(str(folder)))
    assert CompressionConfig.from_dict(CompressionConfig.of(method).to_dict()).build() == method
    assert method.query_aware
    assert IDPruner(importance=ClipText(str(folder))).query_aware
    assert not IDPruner().query_aware


def test_folders_that_are_no_clip_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder with config.json and .safetensors.*hf download"):
        CDPruner(relevance=ClipText(str(tmp_path))).check(ANY_MODEL)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="model_type='siglip', not 'clip'"):
        CDPruner(relevance=ClipText(str(tmp_path))).check(ANY_MODEL)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is no folder"):
        CDPruner(relevance=ClipText(str(tmp_path))).check(ANY_MODEL)


def test_a_tower_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'clip_features'.*cannot give.*vtc.CDPruner\(\) without relevance"):
        vtc.patch(get_model("idefics3"), CDPruner(relevance=ClipText(str(folder))))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_end_to_end_without_relevance(family: str) -> None:
    model, batch = get_model(family), batch_of(family)
    keep = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        picked = [by_hand(embeds[c], np.ones(len(c)), max(1, round(0.3 * len(c)))) for c in images]
        keep.append([torch.tensor(sorted(places)) for places in picked])
    _, _, handle = run(model, batch, CDPruner(keep=0.3))
    assert [[k.tolist() for k in own] for own in handle.last_keep] == [[k.tolist() for k in own] for own in keep]
    check(model, batch, CDPruner(keep=0.3), continued(model, batch, keep))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_end_to_end_with_questions(family: str, folder: Path) -> None:
    model, batch = get_model(family), batch_of(family)
    clip = ClipText(str(folder))
    hidden = by_sample(batch, packed(model, batch, tower_pass(model, batch).hidden_states[-2][:, 1:]))
    asked = [f"{QUESTIONS[i % 2]} {'abcdefgh'[i]}" for i in range(len(batch.samples))]
    keep = []
    for sample, images, patches, question in zip(batch.samples, batch.images, hidden, asked, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        own = []
        for columns, of_image in zip(images, patches, strict=True):
            raw, real = relevance_by_hand(folder, of_image, question), of_image.ne(0).any(-1)
            raw[~real] = raw[real].min()
            own.append(sorted(by_hand(embeds[columns], scaled(raw), max(1, round(0.3 * len(columns))))))
        keep.append(own)
    method = CDPruner(keep=0.3, relevance=clip)
    with clip.asking(asked):
        _, _, handle = run(model, batch, method)
    assert [[k.tolist() for k in own] for own in handle.last_keep] == keep
    for sample, question, own in zip(batch.samples, asked, keep, strict=True):
        if not own:
            continue
        with clip.asking(question):
            _, _, handle = run(model, sample, method)
        assert [k.tolist() for k in handle.last_keep[0]] == own
    with pytest.raises(ValueError, match="1 questions for 2 samples"), clip.asking("what"):
        run(model, batch, method)
