"""Pictures come in upright; files go out whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
from vtc.checkpoint import Checkpoint
from vtc.cli import app
from vtc.commands.profile import _write as write_profile
from vtc.files import replacing, write_text
from vtc.profiling.measure import profile
from vtc.profiling.page import write_report
from vtc.profiling.workload import Workload
from vtc.viz.pixels import open_image

ORIENTATION = 0x0112
QUESTION = "What colour is the circle?"


def turned(folder: Path, orientation: int) -> Path:
    """A photo of 40 x 24, stored as a camera that was turned stores it."""
    pixels = np.zeros((24, 40, 3), dtype=np.uint8)
    pixels[:8, :10] = (255, 0, 0)
    pixels[16:, 30:] = (0, 0, 255)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = folder / f"photo{orientation}.png"
    Image.fromarray(pixels).save(path, exif=exif)
    return path


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_upright(tmp_path: Path, orientation: int) -> None:
    path = turned(tmp_path, orientation)
    opened, expected = open_image(path), load_image(str(path))
    assert opened.mode == "RGB"
    assert opened.size == expected.size == ((40, 24) if orientation < 5 else (24, 40))
    assert opened.tobytes() == expected.tobytes()


def test_the_model_sees_it_upright(tmp_path: Path) -> None:
    """`vtc run` and `vtc show` against the library with transformers' own opening."""
    path = tmp_path / "photo.png"
    question = vtc_tinyvlm.evaluation_questions(1)[0]
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned right by a quarter
    question.image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    drawn = tmp_path / "drawn.png"
    arguments = ["run", str(vtc_tinyvlm.CHECKPOINT), str(path), QUESTION, "--keep", "0.25", "--overlay", str(drawn)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    checkpoint = Checkpoint(*vtc_tinyvlm.load())
    config = vtc.CompressionConfig("divprune", {"keep": 0.25})
    expected = checkpoint.ask(load_image(str(path)), QUESTION, config)
    assert load_image(str(path)).tobytes() == question.image.tobytes()
    assert result.stdout.strip() == expected.text
    assert Image.open(drawn).convert("RGB").tobytes() == expected.draw(question.image).convert("RGB").tobytes()
    shown = tmp_path / "shown.png"
    result = CliRunner().invoke(app, ["show", str(path), "tinyvlm", "-q", QUESTION, "--out", str(shown)])
    assert result.exit_code == 0, result.output
    question.image.save(tmp_path / "upright.png")
    again = tmp_path / "again.png"
    CliRunner().invoke(app, ["show", str(tmp_path / "upright.png"), "tinyvlm", "-q", QUESTION, "--out", str(again)])
    assert Image.open(shown).tobytes() == Image.open(again).tobytes()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts get as far as their first half."""
    whole = Path.write_text

    def half(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        whole(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", half)


def test_a_config_is_written_whole_or_not_at_all(tmp_path: Path, full_disk: None) -> None:
    old = '{"version": 1, "method": "grid"}'
    (tmp_path / "vtc_config.json").write_bytes(old.encode())
    with pytest.raises(OSError, match="No space left"):
        vtc.CompressionConfig("divprune", {"keep": 64}).save_pretrained(tmp_path)
    assert (tmp_path / "vtc_config.json").read_text() == old
    assert os.listdir(tmp_path) == ["vtc_config.json"]
    with pytest.raises(OSError, match="No space left"):
        vtc.CompressionConfig("divprune").save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, full_disk: None) -> None:
    picture, page = tmp_path / "photo.png", tmp_path / "page.html"
    vtc_tinyvlm.evaluation_questions(1)[0].image.save(picture)
    page.write_bytes(b"old")
    result = CliRunner().invoke(app, ["show", str(picture), "tinyvlm", "--out", str(page)])
    assert (result.exit_code, "No space left" in result.stderr) == (2, True), result.output
    assert page.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "photo.png"]


def test_the_document_of_a_profile_too(tmp_path: Path, full_disk: None) -> None:
    model = vtc_tinyvlm.load()[0]
    with torch.inference_mode():
        measured = profile(model, Workload(text=4), "grid", 0.5, [1], repeats=1, warmup=0)
    (tmp_path / "profile.json").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_profile(measured, {"device": "", "dtype": "", "model": "", "workload": ""}, tmp_path, None)
    assert (tmp_path / "profile.json").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["profile.csv", "profile.json"]


def test_a_report_without_rows_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "sweep.html").write_bytes(b"old")
    with pytest.raises(ValueError, match="no rows"):
        write_report([], tmp_path / "sweep.html")
    assert (tmp_path / "sweep.html").read_bytes() == b"old"


def test_links_modes_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "a.txt", tmp_path / "a.txt"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    fresh = tmp_path / "b.txt"
    write_text(fresh, "x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o666 & ~umask
    with replacing(os.devnull) as written:
        assert str(written) == os.devnull
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert os.listdir(tmp_path / "real") == ["a.txt"]
