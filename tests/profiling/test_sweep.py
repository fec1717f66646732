"""`vtc sweep`: nothing measured is lost, baselines are what they say, and a browser shows the plot."""

import csv
import dataclasses
import json
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
import zoo
from PIL import Image
from transformers import Dinov2Config
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.profiling import sweep as work
from vtc.profiling import tasks
from vtc.profiling.beside import beside_downsampled, beside_unpruned
from vtc.profiling.downsample import coarse
from vtc.profiling.exam import Answers, fingerprint
from vtc.profiling.intervals import paired_loss, wilson
from vtc.profiling.page import write_report
from vtc.profiling.tasks import Task, answers, get_task

tiny = pytest.importorskip("vtc_tinyvlm")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def exam():
    task = get_task("tinyvlm")
    return work.Exam(*tiny.load(), task, task.questions(12), size=6)


@pytest.fixture(scope="module")
def swept(exam, tmp_path_factory):
    """A small sweep: its cells, its rows and its file."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.csv"
    cells = work.plan(exam, ["downsample", "pool", "grid", "divprune"], [0.25])
    return cells, work.sweep(exam, cells, [1, 2], path, name="tinyvlm", repeats=1), path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


# ------------------------------------------------------------------------------------------------------------ intervals


def test_wilson_as_published():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}
    for counts, interval in published.items():
        assert wilson(*counts) == pytest.approx(interval, abs=1e-4)


def test_a_paired_interval_holds_the_truth_as_often_as_it_says():
    rng, held, runs = random.Random(0), 0, 600
    for _ in range(runs):
        pairs = [rng.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.8, 0.12, 0.03, 0.05])[0] for _ in range(100)]
        _, low, high = paired_loss([a for a, _ in pairs], [b for _, b in pairs])
        held += low <= 0.09 <= high
    assert 0.92 <= held / runs <= 0.99


def test_pairs_tell_more_than_two_samples():
    before = [1.0] * 80 + [0.0] * 20
    same, crossed = paired_loss(before, before), paired_loss(before, before[::-1])
    assert same[0] == crossed[0] == 0
    assert same[2] < 0.05 < crossed[2]
    assert paired_loss([1.0] * 50, [1.0] * 50)[2] > 0.05  # nothing changed, yet 50 questions prove little
    with pytest.raises(ValueError, match="3 and 2 scores"):
        paired_loss([1, 1, 1], [1, 1])


def test_the_front_is_what_nothing_beats():
    rng = random.Random(1)
    points = [(rng.randrange(9), rng.randrange(9)) for _ in range(40)]
    chosen = [points[i] for i in work.front(points)]
    beaten = {(x, y) for x, y in points for a, b in points if (a <= x and b > y) or (a < x and b >= y)}
    assert set(chosen) == set(points) - beaten
    assert chosen == sorted(chosen)


# ------------------------------------------------------------------------------------------------------------ baselines


def logits(model, way, asked):
    with way.running(), torch.inference_mode():
        return model(**way.inputs(asked)).logits[:, -1]


@pytest.mark.parametrize("name", ["downsample", "pool"])
def test_a_coarse_picture_of_full_size_is_the_picture(exam, name):
    asked, model = exam.asked[:2], exam.model
    with torch.inference_mode():
        plain = model(**exam.inputs(asked)).logits[:, -1]
    torch.testing.assert_close(logits(model, coarse(name, model, exam.processor, 1.0), asked), plain)
    way = coarse(name, model, exam.processor, 0.25)
    inputs = way.inputs(asked)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [36, 36]
    assert inputs["pixel_values"].shape[-1] == {"downsample": 48, "pool": 96}[name]
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
    assert not torch.equal(logits(model, way, asked), plain)
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]


def test_dinov2_reads_smaller_squares():
    """Its position embeddings are interpolated without being asked, so nothing is hooked."""
    home = pytest.importorskip("vtc_photovlm.model")
    vision = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    vision.intermediate_size, vision.mlp_ratio = 32, 1
    model = home.assemble(home.build_config(64, 1, vision)).eval()
    asked = [SimpleNamespace(image=Image.effect_noise((224, 224), 60).convert("RGB"), prompt="<image> what?")]
    way = coarse("downsample", model, home.build_processor(), 0.25)
    inputs = way.inputs(asked)
    assert inputs["pixel_values"].shape[-1] == 112
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 64
    assert logits(model, way, asked).isfinite().all()
    full = coarse("pool", model, home.build_processor(), 1.0)
    plain = coarse("downsample", model, home.build_processor(), 1.0)
    torch.testing.assert_close(logits(model, full, asked), logits(model, plain, asked))


def test_a_cut_picture_falls_back_on_its_thumbnail():
    home = pytest.importorskip("vtc_tinyvlm_next")
    model, processor = home.load()
    asked = home.evaluation_questions(3)
    way = coarse("downsample", model, processor, 1.0)
    inputs, full = way.inputs(asked), tasks.batches_of(asked, processor, 3, "cpu", torch.float32)[0]
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144] * 3
    assert inputs["attention_mask"].sum(1).tolist() == [
        int(mask.sum()) - int((ids == model.config.image_token_id).sum()) + 144
        for mask, ids in zip(full["attention_mask"], full["input_ids"], strict=True)
    ]
    with way.running(), torch.inference_mode():
        small = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    with torch.inference_mode():
        whole = model.model.get_image_features(full["pixel_values"], full["image_sizes"], return_dict=True)
    for a, b in zip(small, whole.pooler_output, strict=True):
        torch.testing.assert_close(a, b[:144], rtol=1e-4, atol=1e-4)
    assert "get_image_features" not in model.model.__dict__
    tokens = coarse("downsample", model, processor, 0.1).inputs(asked)["input_ids"] == model.config.image_token_id
    tenth = int((full["input_ids"] == model.config.image_token_id).sum()) / 30
    assert tokens.sum(1).tolist() == [min((g * g for g in range(1, 13)), key=lambda n: abs(n - tenth))] * 3


def test_where_tokens_follow_the_size_the_picture_is_resized():
    model, sizes = zoo.get_model("qwen2_5_vl"), []

    def processor(images, text, **options):
        sizes.append([image.size for image in images])
        tokens = [image.size[0] * image.size[1] // 784 for image in images]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.full((n,), model.config.image_token_id) for n in tokens], batch_first=True
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    asked = [SimpleNamespace(image=Image.new("RGB", size), prompt="") for size in ((560, 280), (280, 280))]
    coarse("downsample", model, processor, 0.25).inputs(asked)
    coarse("downsample", model, processor, 50).inputs(asked)
    assert sizes[1] == [(280, 140), (140, 140)]
    assert sizes[3] == [(280, 140), (198, 198)]
    with pytest.raises(ValueError, match="'pool' is not defined for model_type 'qwen2_5_vl'"):
        coarse("pool", model, processor, 0.25)


# ---------------------------------------------------------------------------------------------------------------- sweep


def test_rows_of_a_sweep(swept):
    cells, rows, path = swept
    assert [cell.method for cell in cells] == ["none", "downsample", "pool", "grid", "divprune"]
    assert [(row["method"], row["batch"]) for row in rows] == [(c.method, b) for c in cells for b in "12"]
    assert rows == list(csv.DictReader(path.open()))
    by_name = {row["method"]: row for row in rows}
    assert [by_name[n]["kept_tokens"] for n in ("none", "downsample", "grid")] == ["144", "36", "36"]
    assert float(by_name["none"]["accuracy"]) >= 0.9
    assert by_name["none"]["loss"] == "0"
    marks = by_name["divprune"]["marks"].strip("[]").split(",")
    assert len(marks) == 12
    assert by_name["divprune"]["ideal"] == by_name["grid"]["ideal"]
    assert float(by_name["divprune"]["ideal"]) > float(by_name["pool"]["ideal"])  # a block that nobody reads
    assert float(by_name["downsample"]["ideal"]) > float(by_name["pool"]["ideal"])  # a smaller tower, too


def test_an_interrupted_sweep_goes_on(exam, swept, tmp_path, monkeypatch):
    cells, rows, path = swept
    taken, told = [], []
    real = work.Exam.take
    monkeypatch.setattr(work.Exam, "take", lambda self, *a, **k: taken.append(a) or real(self, *a, **k))
    copy = tmp_path / "sweep.csv"
    shutil.copy(path, copy)
    assert work.sweep(exam, cells, [1, 2], copy, name="tinyvlm", repeats=1) == rows
    assert taken == []
    text = path.read_text()
    copy.write_text(text[:-200])  # cut in the middle of the last row
    again = work.sweep(exam, cells, [1, 2], copy, name="tinyvlm", repeats=1, tell=told.append)
    assert again[:-1] == rows[:-1]
    assert (again[-1]["method"], again[-1]["marks"]) == ("divprune", rows[-1]["marks"])
    assert taken == []  # the scores are those of the same cell at the other batch size
    assert "cut off" in told[0]
    copy.write_text("mine,not,yours\n1,2,3\n")
    work.sweep(exam, cells[:1], [1], copy, name="tinyvlm", repeats=1, tell=told.append)
    assert (tmp_path / "sweep.aside1.csv").read_text() == "mine,not,yours\n1,2,3\n"
    assert len(taken) == 1


def test_rows_are_those_of_the_same_questions(exam, swept, tmp_path):
    cells, _, path = swept
    copy = tmp_path / "sweep.csv"
    shutil.copy(path, copy)
    first = exam.asked[0]
    for changed in ({"prompt": first.prompt + " exactly"}, {"answer": "odd"}, {"type": "count"}):
        other = dataclasses.replace(exam, asked=[dataclasses.replace(first, **changed), *exam.asked[1:]])
        assert other.digest != exam.digest
    work.sweep(other, cells[:1], [1], copy, name="tinyvlm", repeats=1)
    assert [row["asked"] for row in csv.DictReader(copy.open())][-2:] == [exam.digest, other.digest]


def test_what_cannot_be_swept_is_refused_before_anything_runs(exam, monkeypatch):
    monkeypatch.setattr(work.Exam, "take", None)
    for methods, keeps, told in (
        (["divprun"], [0.5], "did you mean 'divprune'"),
        (["divprune"], [0.5, 7.5], "keep=7.5"),
        (["globalcom2"], [0.5], "globalcom2"),
    ):
        with pytest.raises(ValueError, match=told):
            work.plan(exam, methods, keeps)


def test_methods_are_calibrated_and_baselines_are_not(exam):
    cells = work.plan(exam, ["grid", "merge"], [0.5], calibration="size")
    assert [None if c.config is None else c.config.calibration for c in cells] == [None, None, "size"]
    assert [work._about(cell)["calibration"] for cell in cells] == ["", "", "size"]
    with pytest.raises(ValueError, match="calibration='size'"):
        work.plan(exam, ["divprune"], [0.5], calibration="size")  # it merges nothing


def test_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register_task("captions", lambda: Task("captions", lambda n: [], None))
    assert tasks.list_tasks() == ["captions", "photovlm", "tinyvlm", "tinyvlm-next"]
    with pytest.raises(ValueError, match="exists already"):
        tasks.register_task("captions", lambda: None)
    for command in ("sweep", "tune"):
        for name, told in (("captions", "has no accuracy"), ("tinyvl", "did you mean 'tinyvlm'")):
            result = invoke(command, "--task", name)
            assert result.exit_code == 2
            assert told in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--keep", "0"), "keep=0"),
        (("--methods", "divprune,nothing"), "unknown method 'nothing'"),
        (("--batch", "0"), "below 1"),
        (("nowhere/model",), "--task is needed"),
        (("--positions", "odd"), "positions='odd'"),
        (("--calibration", "odd"), "calibration='odd'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, told, tmp_path):
    result = invoke("sweep", *arguments, "--questions", 6, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_writes_rows_and_a_page(tmp_path):
    arguments = ("sweep", "--methods", "todre", "--keep", "0.25", "--batch", "2", "-n", 6, "--repeats", 1)
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    methods = [row["method"] for row in csv.DictReader((tmp_path / "sweep.csv").open())]
    assert methods == ["none", "random", "grid", "downsample", "pool", "todre"]
    assert "<svg" in (tmp_path / "sweep.html").read_text()
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["unpruned", "144", "100.0", "%"] in lines  # beside itself nothing is lost or faster
    (row,) = [line for line in lines if line[:2] == ["todre", "0.25"]]
    assert row[2] == "36"
    assert re.fullmatch(r"\d+\.\d\dx", row[-1])
    assert "…" not in result.stdout  # 80 columns are enough


# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def page(swept, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "sweep.html"
    rows = [*swept[1], {**swept[1][-1], "correct": "False", "faults": "<b>broken</b>", "speedup": ""}]
    write_report(rows, path)
    return path


def test_the_report_needs_nothing_from_outside(page):
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert not re.findall(r"url\((?!#)|@import|<script|<link", text)
    assert "&lt;b&gt;broken&lt;/b&gt;" in text
    assert "<b>broken" not in text
    with pytest.raises(ValueError, match="no rows"):
        write_report([], page)


def browse(page, *arguments):
    switches = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
    profile = f"--user-data-dir={page.parent / 'browser'}"
    command = [BROWSER, *switches, profile, "--window-size=1300,1000", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def colors_of(page, tmp_path):
    shot = tmp_path / "shot.png"
    browse(page, f"--screenshot={shot}")
    pixels = Image.open(shot).convert("RGB")
    return {color for count, color in pixels.getcolors(pixels.width * pixels.height) if count >= 8}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here (Debian: apt-get install chromium)")
def test_a_browser_shows_the_plot(page, tmp_path):
    blue = (31, 119, 180)  # the first method's line
    shown = colors_of(page, tmp_path)
    assert blue in shown
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<figure.*?</figure>", "", page.read_text(), flags=re.DOTALL))
    assert blue not in colors_of(bare, tmp_path)
    document = browse(page, "--dump-dom")
    figure = document[document.index('<figure id="pareto">') : document.index("</figure>")]
    for text in ("divprune", "downsample", "pool", "grid", "unpruned", "Pareto front", "accuracy, %"):
        assert text in figure


def test_rows_with_wrong_results_are_not_drawn(swept, tmp_path):
    rows = [dict(row) for row in swept[1]]
    for row in rows:
        if row["method"] == "divprune":
            row |= {"correct": "False", "faults": "odd", "speedup": "", "realised": ""}
    write_report(rows, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert "grid" in drawing
    assert "divprune" not in drawing
    assert "wrong result: odd" in text


def test_an_exam_counts_what_the_task_counts(exam):
    task = dataclasses.replace(exam.task, apart=frozenset({"count", "rel"}))
    short = dataclasses.replace(exam, task=task)
    assert len(short.counted) == 8
    taken = short.take(vtc.CompressionConfig("transprune", {"keep": 0.25}))
    assert len(taken.scores) == len(taken.said) == 12
    assert 36 < taken.tokens < 144


def test_loyalty_and_hard_questions_by_hand(exam):
    """Six questions of which the last is kept apart; the whole picture answers 1-4, the smaller one 1, 5 and 6."""
    asked = [dataclasses.replace(exam.asked[0], type=kind) for kind in [*["color"] * 5, "count"]]
    six = dataclasses.replace(exam, asked=asked)
    whole = Answers([1, 1, 1, 1, 0, 1], list("abcdef"), 144.0)
    small = Answers([1, 0, 0, 0, 1, 0], list("axxxyx"), 36.0)
    cell = Answers([1, 1, 1, 0, 1, 0], list("abcxyx"), 36.0)
    beside = beside_unpruned(six, cell, whole)
    assert beside["loyalty"] == 3 / 5  # the wrong fifth answer was another one
    assert beside["loss"] == 0.0
    hard = beside_downsampled(six, cell, whole, small)
    assert (hard["hard_questions"], hard["hard"]) == (3, 2 / 3)
    assert (hard["hard_low"], hard["hard_high"]) == wilson(2, 3)
    assert beside_downsampled(six, small, whole, small)["hard"] == 0.0
    assert beside_downsampled(six, whole, whole, small)["hard"] == 1.0
    assert set(beside_downsampled(six, cell, whole, None).values()) == {None}
    assert beside_downsampled(six, cell, whole, whole) == dict.fromkeys(hard) | {"hard_questions": 0}


def test_a_sweep_says_how_loyal_a_method_is(exam, swept):
    _, rows, _ = swept
    by_name = {row["method"]: row for row in rows}
    assert by_name["none"]["loyalty"] == "1"
    assert by_name["none"]["hard"] == ""  # the budget of all tokens has no smaller picture
    small, cell, whole = (json.loads(by_name[name]["marks"]) for name in ("downsample", "divprune", "none"))
    hard = [i for i in exam.counted if whole[i] > small[i]]
    assert int(by_name["divprune"]["hard_questions"]) == len(hard) > 0
    assert float(by_name["divprune"]["hard"]) == pytest.approx(sum(cell[i] for i in hard) / len(hard), abs=1e-5)
    assert float(by_name["downsample"]["hard"]) == 0.0
    said = {name: row["said"].split() for name, row in by_name.items()}
    texts = answers(exam.model, exam.processor, exam.inputs(exam.asked), 3)
    assert said["none"] == [fingerprint(text) for text in texts]
    same = [said["divprune"][i] == said["none"][i] for i in exam.counted]
    assert float(by_name["divprune"]["loyalty"]) == pytest.approx(sum(same) / len(same), abs=1e-5)
