"""The command line, run in this process on a checkpoint made on the spot."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vtc
import vtc_photovlm
import vtc_tinyvlm
from vtc import demo_photo
from vtc.checkpoint import Answer, Checkpoint, PrunedImage
from vtc.cli import app, parse_keep
from vtc.demo import run_demo
from vtc.demo_photo import ask_photograph
from vtc.demo_report import print_report
from vtc.models import families
from vtc.tokens import Layout, Segment
from vtc.viz.pixels import open_image
from vtc_tinyvlm.model import build_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """An untrained model of the shipped model's shape: a LLaVA without a chat template."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    save(build_model(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (120, 96, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def invoke(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


def refused(*arguments: str) -> str:
    """The one line of an error that is the user's to mend."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("vtc: ")
    return line


# ------------------------------------------------------------------------------------------------------------- listings


def test_methods_are_listed():
    output = invoke("methods").stdout
    for name in vtc.list_methods():
        assert re.search(rf"\b{name}\b", output)


def test_a_methods_page_is_its_docstring_and_options():
    output = invoke("methods", "divprune").stdout
    assert "DivPrune" in output
    assert "keep = 0.25" in output


def test_models_are_listed():
    output = invoke("models").stdout
    for family in families():
        assert family.model_type in output
        assert not family.signals or "cls_logits" in output


def test_version():
    assert invoke("--version").stdout == f"vtc {vtc.__version__}\n"


@pytest.mark.parametrize(("text", "keep"), [("64", 64), ("0.25", 0.25), ("1", 1), ("1.0", 1.0)])
def test_keep_is_a_count_or_a_fraction(text, keep):
    assert parse_keep(text) == keep
    assert type(parse_keep(text)) is type(keep)


# ------------------------------------------------------------------------------------------------------------------ run


def test_run_answers_and_draws(checkpoint, picture, tmp_path):
    overlay = tmp_path / "kept.png"
    result = invoke("run", checkpoint, picture, "what color is the circle ?", "--keep", "36", "--overlay", overlay)
    assert result.exit_code == 0, result.output
    assert "36 of 144 visual tokens kept, 25.0%" in result.stderr
    assert Image.open(overlay).size[0] > 0


def test_run_compares_with_the_unpruned_model(checkpoint, picture):
    common = ("run", checkpoint, picture, "what color is the circle ?", "--compare", "--keep")
    unpruned, pruned = invoke(*common, "1.0").stdout.splitlines()
    assert unpruned.removeprefix("unpruned: ") == pruned.removeprefix("divprune: ")


def test_run_passes_options_to_the_method(checkpoint, picture):
    result = invoke("run", checkpoint, picture, "what ?", "--method", "random", "-o", "seed=3", "--keep", "0.5")
    assert result.exit_code == 0, result.output


def test_run_speaks_the_chat_template_where_there_is_one(checkpoint, picture, tmp_path):
    template = (
        "{% for part in messages[0]['content'] %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    )
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(template)
    plain, chat = (Checkpoint.load(str(path)) for path in (checkpoint, folder))
    assert chat.processor.chat_template == template
    question = (open_image(Path(picture)), "what color is the circle ?")
    torch.testing.assert_close(dict(chat.encode(*question)), dict(plain.encode(*question)), rtol=0, atol=0)


def test_the_drawn_picture_is_what_the_processor_cut(checkpoint, picture):
    loaded = Checkpoint.load(checkpoint)
    answer = loaded.ask(open_image(Path(picture)), "what ?", vtc.CompressionConfig("grid", {"keep": 0.5}))
    (image,) = answer.images
    drawn = np.asarray(image.pictures[0], dtype=int)
    centre = np.asarray(open_image(Path(picture)), dtype=int)[12:108]  # 96 wide, 120 high: no resizing, centre crop
    assert abs(drawn - centre).max() <= 1
    assert answer.kept == 72
    assert answer.total == 144


def test_tiles_are_drawn_side_by_side():
    tile = Image.new("RGB", (40, 40))
    images = tuple(PrunedImage(torch.tensor(keep), Layout.plain(4, (2, 2)), (tile,)) for keep in ([0, 3], [1]))
    assert Answer("yes", 8, images).kept == 3
    drawn = Answer("yes", 8, images).draw(Image.new("RGB", (99, 33)))
    single = Answer("yes", 4, images[:1]).draw(Image.new("RGB", (99, 33)))
    assert drawn.size[0] > 2 * single.size[0] > 0
    assert drawn.crop((0, 0, *single.size)).tobytes() == single.tobytes()
    segments = (Segment("crops", 0, 4, (2, 2)), Segment("thumbnail", 4, 4, (2, 2)), Segment("newline", 8, 1))
    # tiles of one image: the same drawing
    one = PrunedImage(torch.tensor([0, 3, 5, 8]), Layout(9, segments), (tile, tile))
    assert Answer("yes", 9, (one,)).draw(Image.new("RGB", (99, 33))).tobytes() == drawn.tobytes()
    with pytest.raises(ValueError, match="nothing was pruned"):
        Answer("yes", 8).draw(tile)


# --------------------------------------------------------------------------------------------------------------- errors


def test_unknown_method(checkpoint, picture):
    assert "did you mean 'divprune'" in refused("run", checkpoint, picture, "what ?", "--method", "divprun")
    assert "divprune" in refused("methods", "divprun")
    assert "divprune" in refused("demo", "--method", "divprun")


@pytest.mark.parametrize("keep", ["0", "0.0", "-0.5", "1.5", "nan", "many"])
def test_bad_keep(checkpoint, picture, keep):
    assert "keep" in refused("run", checkpoint, picture, "what ?", f"--keep={keep}")


def test_missing_image(checkpoint):
    assert "there is no image file 'nowhere.png'" in refused("run", checkpoint, "nowhere.png", "what ?")


def test_file_that_is_no_image(checkpoint, tmp_path):
    (tmp_path / "text.png").write_text("not pixels")
    assert "not an image" in refused("run", checkpoint, tmp_path / "text.png", "what ?")


def test_missing_checkpoint(picture, tmp_path):
    assert str(tmp_path) in refused("run", tmp_path / "nothing", picture, "what ?")


def test_bad_positions(checkpoint, picture):
    assert "positions" in refused("run", checkpoint, picture, "what ?", "--positions", "shuffled")


def test_calibration(checkpoint, picture):
    """Greedy answers may agree: what is refused tells that it arrived."""
    asked = ("run", checkpoint, picture, "what ?", "--calibration")
    assert invoke(*asked, "size+distance", "--max-new-tokens", "2").exit_code == 0
    assert "calibration='size' " in refused(*asked, "size")  # divprune merges nothing
    assert "calibration='odd'" in refused(*asked, "odd")


def test_bad_device_and_dtype(checkpoint, picture):
    assert "--device 'toaster'" in refused("run", checkpoint, picture, "what ?", "--device", "toaster")
    assert "--device 'cuda:99'" in refused("run", checkpoint, picture, "what ?", "--device", "cuda:99")
    assert "float12" in refused("run", checkpoint, picture, "what ?", "--dtype", "float12")


def test_unknown_and_malformed_options(checkpoint, picture):
    assert "no option 'temperature'" in refused("run", checkpoint, picture, "what ?", "-o", "temperature=1")
    assert "name=value" in refused("run", checkpoint, picture, "what ?", "-o", "temperature")


def test_a_missing_package_comes_with_the_remedy(checkpoint, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'visual-token-compression[demo]'" in refused("run", checkpoint, picture, "what ?")


def test_traceback_on_request(checkpoint):
    result = invoke("--traceback", "run", checkpoint, "nowhere.png", "what ?")
    assert isinstance(result.exception, ValueError)


def test_a_missing_typer_is_said_in_one_line():
    code = "import sys; sys.modules['typer'] = None; import vtc.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "vtc: the command line needs typer: pip install 'visual-token-compression[cli]'"
    ]


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_on_few_questions(tmp_path):
    out = tmp_path / "demo.png"
    result = invoke("demo", "--questions", "12", "--batch", "6", "--repeats", "1", "--out", out)
    assert result.exit_code == 0, result.output
    for text in (
        "10 questions",
        "visual tokens per image",
        "144",
        "36",
        "KV cache",
        "prefill",
        "count",
        "rel",
    ):
        assert text in result.stdout
    assert out.exists()


def test_demo_keeping_everything_changes_nothing():
    report = run_demo(vtc.CompressionConfig("divprune", {"keep": 1.0}), questions=7, batch=4, repeats=2)
    assert report.full.answers == report.pruned.answers
    assert report.full.accuracy == report.pruned.accuracy
    assert report.full.cache_bytes == report.pruned.cache_bytes
    assert report.full.tokens == report.pruned.tokens == 144
    assert report.speedup_total.low <= report.speedup_total.median <= report.speedup_total.high
    assert 0 < report.full.decoder.median < report.full.total.median


def test_demo_measures_the_smaller_cache():
    report = run_demo(vtc.CompressionConfig("grid", {"keep": 36}), questions=2, batch=2, repeats=1)
    token = 2 * 5 * 3 * 64 * 4  # key and value, layers, heads, width, bytes of a float
    assert report.full.cache_bytes - report.pruned.cache_bytes == (144 - 36) * token


def test_demo_refuses_no_questions():
    assert "questions=0" in refused("demo", "--questions", "0")


def test_the_demo_shows_a_photograph_where_there_is_the_model(monkeypatch, tmp_path):
    """tinyvlm stands in for photovlm, which needs an encoder that is fetched."""
    config = vtc.CompressionConfig("divprune", {"keep": 16})
    monkeypatch.setattr(vtc_photovlm, "ready", lambda: False)
    assert ask_photograph(config) is None
    asked = vtc_tinyvlm.evaluation_questions(6)
    monkeypatch.setattr(vtc_photovlm, "ready", lambda: True)
    monkeypatch.setattr(vtc_photovlm, "load", vtc_tinyvlm.load)
    monkeypatch.setattr(vtc_photovlm, "evaluation_questions", lambda n: asked)
    monkeypatch.setattr(demo_photo, "TYPE", "rel")
    shown = ask_photograph(config, tmp_path / "photo.png")
    question = next(q for q in asked if q.type == "rel")
    assert (shown.question, shown.answer) == (question.prompt.removeprefix("<image>").strip(), question.answer)
    assert shown.unpruned.split()[0] == question.answer
    assert (shown.tokens, shown.kept) == (144, 16)
    assert shown.overlay.stat().st_size > 1000
    report = run_demo(config, questions=2, batch=2, repeats=1, overlay=tmp_path / "demo.png")
    assert report.photograph.overlay == tmp_path / "demo-photo.png"
    with (console := Console(width=120)).capture() as told:
        print_report(console, report)
    assert f"{question.answer}\n  unpruned: {shown.unpruned} (144 visual tokens)" in told.get()
