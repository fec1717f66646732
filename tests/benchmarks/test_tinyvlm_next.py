"""The second shipped checkpoint: LLaVA-NeXT shape, larger pictures, small objects."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

tiny = pytest.importorskip("vtc_tinyvlm_next")
from vtc_tinyvlm import questions, scenes  # noqa: E402
from vtc_tinyvlm_next import data  # noqa: E402

HERE = Path(tiny.__file__).parent
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# (width, height) -> crops, image tokens: 144 for the thumbnail, then rows of patches with a newline each.
TOKENS = {
    (192, 192): (4, 144 + 24 * 25),
    (192, 128): (4, 144 + 16 * 25),
    (128, 192): (4, 144 + 24 * 17),
    (192, 96): (2, 144 + 12 * 25),
    (96, 192): (2, 144 + 24 * 13),
}


def scene_of(picture, start=0):
    """The first training scene of this size from `start` on."""
    return next(
        s
        for s in (data.example(data.SPLITS["train"], i, [])[0] for i in range(start, start + 500))
        if (s.width, s.height) == picture
    )


def test_a_scene_is_a_function_of_its_seed():
    one, two, other = (data.example(data.SPLITS["train"], i, list(questions.TYPES)) for i in (5, 5, 6))
    assert one == two
    assert one != other
    np.testing.assert_array_equal(scenes.render(one[0]), scenes.render(two[0]))
    assert scenes.render(one[0]).shape == (one[0].height, one[0].width, 3)


def test_splits_share_no_scene_with_each_other():
    seen = {s: {data.example(k, i, [])[0] for i in range(200)} for s, k in data.SPLITS.items()}
    assert not seen["train"] & seen["evaluation"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["evaluation"]


def test_training_code_never_names_the_evaluation_split():
    for name in ("train.py", "batches.py", "losses.py"):
        source = (HERE / name).read_text()
        assert "888" not in source, name
        assert '"evaluation"' not in source, name


def test_objects_do_not_overlap_and_cross_no_crop_border():
    sizes = set()
    for i in range(200):
        scene = data.example(data.SPLITS["train"], i, [])[0]
        sizes.add((scene.width, scene.height))
        assert 3 <= len(scene.objects) <= 8
        for a in scene.objects:
            for at, size in ((a.x, scene.width), (a.y, scene.height)):
                assert a.radius <= at <= size - a.radius
                assert size == 96 or abs(at - size // 2) >= a.radius
                assert at % scenes.LATTICE == 0
            for b in scene.objects:
                assert a is b or (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2
    assert sizes == set(TOKENS)


def test_every_question_has_one_answer():
    from test_tinyvlm import answers_by_hand

    counted = dict.fromkeys(questions.TYPES, 0)
    for i in range(200):
        scene, asked = data.example(data.SPLITS["train"], i, [*questions.TYPES, "rel", "count"])
        for question in asked:
            assert answers_by_hand(scene.objects, question.text) == {question.answer}, (scene, question)
            counted[question.type] += 1
    assert min(counted.values()) > 100


def test_evaluation_questions_are_stratified_and_stable():
    asked = tiny.evaluation_questions(24)
    assert [q.type for q in asked] == list(questions.TYPES) * 4
    again = tiny.evaluation_questions(6)
    assert [(q.prompt, q.answer) for q in asked[:6]] == [(q.prompt, q.answer) for q in again]
    assert {q.image.size for q in asked} <= set(TOKENS)


def test_datasets_view():
    pytest.importorskip("datasets")
    table = tiny.dataset("validation", 6)
    assert [r["answer"] for r in table] == [q.answer for q in tiny.split_questions(6, "validation")]


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def test_checkpoint_is_small_and_safe():
    files = [f for f in tiny.CHECKPOINT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}


def test_checkpoint_is_a_plain_llava_next(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert type(processor).__name__ == "LlavaNextProcessor"
    assert str(model.dtype) == "torch.float32"


@pytest.mark.parametrize("picture", sorted(TOKENS))
def test_tokens_of_a_picture(loaded, picture):
    """The processor's placeholders are as many as the model's features, for square and unpadded pictures."""
    from vtc_tinyvlm_next.batches import owners, tiles
    from vtc_tinyvlm_next.losses import place_labels

    model, processor = loaded
    scene = scene_of(picture)
    pixels = scenes.render(scene)
    inputs = processor(images=scenes.to_image(pixels), text="<image> how many objects are there ?", return_tensors="pt")
    crops, tokens = TOKENS[picture]
    assert inputs["pixel_values"].shape[1] == len(tiles(pixels)) == 1 + crops
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens == len(place_labels(picture))
    model(**inputs)  # raises when counts differ
    whole, tile = owners(scene)
    assert whole.shape == (picture[1] // 8, picture[0] // 8)
    assert (tile[1:] >= 0).sum() == (whole >= 0).sum()
    assert set(np.unique(whole)) == set(range(-1, len(scene.objects)))


def test_packed_training_pass_is_the_stock_model(loaded):
    """Own preprocessing, token layout and packed forward pass equal processor and stock model, for all sizes."""
    import torch

    from vtc_tinyvlm import fast
    from vtc_tinyvlm.building import BOS, IMAGE
    from vtc_tinyvlm_next import losses
    from vtc_tinyvlm_next.batches import KINDS, make_batch

    model, processor = loaded
    params, done, start = fast.parameters_in(model, torch.float32), set(), 0
    while done != set(TOKENS):
        start += 1
        batch = make_batch(data.SPLITS["validation"], start, 1, KINDS[::4])
        if batch.picture in done:
            continue
        done.add(batch.picture)
        scene, _ = data.example(data.SPLITS["validation"], start, KINDS[::4], batch.picture)
        inputs = processor(images=scenes.to_image(scenes.render(scene)), text="<image>", return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], batch.pixels)
        with torch.no_grad():
            image = losses.image_tokens(params, model.config, batch)
            packed = losses.question_logits(params, model.config, batch, image)[0]
            for j in (0, len(KINDS[::4]) - 1):
                n = int(batch.length[0, j]) + 1
                ids = torch.tensor([[BOS, *[IMAGE] * image.shape[1], *batch.questions[0, j, :n].tolist()]])
                given = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
                stock = model(input_ids=ids, **given).logits[0, -2:]
                torch.testing.assert_close(packed[0, j], stock, atol=2e-3, rtol=1e-4)


def generate(model, processor, asked):
    from vtc_tinyvlm.evaluate import generate, prepare

    return [text for batch in prepare(asked, processor, 15) for text in generate(model, processor, batch)]


def card_table(heading):
    """A per-type table of the model card: {type: {"n": .., "answer": .., "exact": ..}}."""
    table = {}
    part = (HERE / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    for line in part.splitlines():
        match = re.match(
            r"\| (\w+) \| (\d+) \| ([\d.]+) \(([\d.]+)-([\d.]+)\) \| ([\d.]+) \(([\d.]+)-([\d.]+)\) \|", line
        )
        if match and match[1] in questions.TYPES:
            table[match[1]] = {"n": int(match[2]), "answer": float(match[3]) / 100, "exact": float(match[6]) / 100}
    return table


def mean(table, score="exact"):
    return sum(row[score] for row in table.values()) / len(questions.TYPES)


def test_accuracy_on_validation_questions(loaded):
    """Bound: five standard errors under the card's value, so chance failures are out and a broken model is not."""
    asked = tiny.split_questions(36, "validation")
    right = [tiny.is_exact(t, q.answer) for t, q in zip(generate(*loaded, asked), asked, strict=True)]
    expected = mean(card_table("Results on the evaluation split"))
    assert sum(right) / len(right) > expected - 5 * (expected * (1 - expected) / len(asked)) ** 0.5


@pytest.mark.parametrize(
    ("heading", "file"),
    [("Results on the evaluation split", "tinyvlm_next.csv"), ("The thumbnail alone", "tinyvlm_next_thumbnail.csv")],
)
def test_the_card_repeats_the_measured_tables(heading, file):
    card = card_table(heading)
    assert set(card) == set(questions.TYPES)
    with (RESULTS / file).open() as handle:
        rows = {r["type"]: r for r in csv.DictReader(handle) if r["type"] in questions.TYPES}
    for kind, shown in card.items():
        assert shown["n"] == int(rows[kind]["questions"])
        for score in ("answer", "exact"):
            assert abs(shown[score] - float(rows[kind][score])) < 6e-4, (kind, score)


def test_the_card_meets_the_bar_and_the_thumbnail_does_not():
    """The project's bar is 85 % over the six types, unpruned; digits must need the crops."""
    assert mean(card_table("Results on the evaluation split")) >= 0.85
    thumbnail = card_table("The thumbnail alone")
    assert mean(thumbnail, "answer") < 0.6
    assert thumbnail["digit"]["answer"] < 0.25


def test_thumbnail_only_is_the_model_without_the_crops_tokens(loaded):
    """Removing crop tokens by mask equals really removing them with positions kept."""
    import torch

    from vtc_tinyvlm.building import IMAGE
    from vtc_tinyvlm.evaluate import prepare
    from vtc_tinyvlm_next.evaluate import generate_from_thumbnail

    model, processor = loaded
    asked = tiny.split_questions(4, "validation")
    (batch,) = prepare(asked, processor, 4)
    texts = generate_from_thumbnail(model, processor, batch)
    for question, text in zip(asked, texts, strict=True):
        one = processor(images=question.image, text=question.prompt, return_tensors="pt")
        ids = one["input_ids"][0]
        image = (ids == IMAGE).nonzero()[:, 0]
        drop = set(image[144:].tolist())
        keep = torch.tensor([i for i in range(len(ids)) if i not in drop])
        with torch.no_grad():
            features = model.get_image_features(one["pixel_values"], one["image_sizes"], return_dict=True).pooler_output
            embedded = model.get_input_embeddings()(one["input_ids"])
            embedded[0, image] = features[0]
            logits = model(inputs_embeds=embedded[:, keep], position_ids=keep[None]).logits[0, -1]
        first = processor.decode([int(logits.argmax())], skip_special_tokens=True)
        assert text.split()[:1] == first.split()


def test_resumed_training_equals_uninterrupted():
    """Optimizer state, counters and data order all survive, and the joint phase leaves the vision tower alone."""
    import copy

    import torch

    from vtc_tinyvlm_next.batches import make_batch
    from vtc_tinyvlm_next.train import VISION, Trainer

    def trainer():
        return Trainer(seed=0, lr=1e-3, muon_lr=2e-3, ground_weight=0.2, place_weight=0.1)

    first = trainer()
    tower = {n: p.clone() for n, p in first.model.state_dict().items() if n.startswith(VISION)}
    first.progress["phase"] = "joint"
    batches = [make_batch(data.SPLITS["train"], start, 1, ["digit", "rel"]) for start in (0, 2)]
    first.step(batches[0])
    state = copy.deepcopy(first.state())
    first.step(batches[1])
    second = trainer()
    second.restore(state)
    second.step(batches[1])
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert name not in tower or torch.equal(value, tower[name]), name
