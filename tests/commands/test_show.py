"""`vtc show`, in this process, on the shipped model."""

import base64
import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
import vtc_tinyvlm_next
from vtc import viz
from vtc.cli import app
from vtc.commands import show as command
from vtc.viz.picture import draw
from vtc.viz.prompt_images import prompt_images

QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    """Wider than high, so that the processor cuts the sides off."""
    whole = Image.new("RGB", (160, 96), (255, 0, 0))
    whole.paste(vtc_tinyvlm.evaluation_questions(1)[0].image, (32, 0))
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    whole.save(path)
    return str(path)


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    """The shipped checkpoints, read once for all tests."""
    from vtc.checkpoint import Checkpoint

    def load(name, device="cpu", dtype="auto"):
        if name not in LOADED:
            LOADED[name] = original(name, device, dtype)
        return LOADED[name]

    original = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", load)


LOADED: dict[str, object] = {}


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["show", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("vtc: ")
    return line


def by_hand(picture: str, package, method, **options):
    """The same prompt through the library: the arguments of viz.show, and the pick order."""
    model, processor = package.load()
    text = f"<image>\n{QUESTION}"
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    with torch.inference_mode(), vtc.patch(model, method, **options) as handle:
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return (handle, inputs, processor), {"order": True, "caption": f"{QUESTION} {answer}"}


def test_kept_cells_are_clear_and_where_the_processor_cut(picture, tmp_path):
    out = tmp_path / "kept.png"
    result = invoke(picture, "tinyvlm", "-m", "divprune", "--keep", "36", "-q", QUESTION, "--no-order", "--out", out)
    assert result.exit_code == 0, result.output
    assert "visual tokens: 144 -> 36 from layer 0" in result.stdout
    assert str(out) in result.stderr
    drawn = np.asarray(Image.open(out).convert("RGB"), dtype=int)[34:514, 12:492]
    middle = np.asarray(Image.open(picture).convert("RGB"), dtype=int)[:, 32:128].repeat(5, 0).repeat(5, 1)
    call, _ = by_hand(picture, vtc_tinyvlm, "divprune", keep=36)
    (kept,) = call[0].last_keep[0]
    for token in range(144):
        y, x = (40 * place + 4 for place in divmod(token, 12))  # inside the outline
        change = abs(drawn[y : y + 32, x : x + 32] - middle[y : y + 32, x : x + 32]).max()
        assert (change <= 1) == (token in kept.tolist()), token


def test_crops_and_newlines_are_drawn(picture, tmp_path):
    out = tmp_path / "kept.png"
    result = invoke(picture, "tinyvlm-next", "-m", "divprune", "--keep", "0.2", "-q", QUESTION, "--out", out)
    assert result.exit_code == 0, result.output
    call, options = by_hand(picture, vtc_tinyvlm_next, "divprune", keep=0.2)
    assert [panel.name for panel, _ in prompt_images(*call)[0].views] == ["thumbnail", "crops 1x2"]
    assert Image.open(out).tobytes() == viz.show(*call, **options).tobytes()


def test_stages_inside_the_model_are_small_multiples_or_an_animation(picture, tmp_path):
    common = (picture, "tinyvlm", "-m", "transprune", "--keep", "0.25", "-q", QUESTION, "--out")
    assert invoke(*common, tmp_path / "stages.png").exit_code == 0
    assert invoke(*common, tmp_path / "stages.gif").exit_code == 0
    call, options = by_hand(picture, vtc_tinyvlm, "transprune", keep=0.25)
    sheet = Image.open(tmp_path / "stages.png").convert("RGB")
    ((panel, cut),) = prompt_images(*call)[0].views
    for number, (_, kept) in enumerate(call[0].last_stages):
        expected = draw(panel, cut, dict.fromkeys(kept[0][0].tolist()), 300)
        x = 12 + number * (expected.width + 20)
        assert sheet.crop((x, 34, x + expected.width, 34 + expected.height)).tobytes() == expected.tobytes()
    movie = Image.open(tmp_path / "stages.gif")
    assert (movie.n_frames, movie.size) == (5, viz.animate(*call, **options)[0].size)


def test_a_page_holds_drawings_and_bars_and_needs_no_other_file(picture, tmp_path):
    out = tmp_path / "page.html"
    result = invoke(picture, "tinyvlm", "-m", "chain", "--keep", "0.5", "--out", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    found = re.findall(r'src="data:image/(png|gif);base64,([^"]+)"', text)
    assert [kind for kind, _ in found] == ["png", "gif"]
    assert [Image.open(io.BytesIO(base64.b64decode(data))).format for _, data in found] == ["PNG", "GIF"]
    assert text.count("src=") == 2
    assert "http" not in text
    assert text.count("</tr>") == 1 + 4  # 72 tokens, then what is left after three stages
    assert "<title>chain, keep 0.5: scene.png</title>" in text


def test_file_names_and_questions_are_not_taken_for_html(picture, tmp_path):
    odd = tmp_path / "<b>&.png"
    Image.open(picture).save(odd)
    out = tmp_path / "page.html"
    assert invoke(odd, "tinyvlm", "-q", "<script>", "--out", out).exit_code == 0
    assert "&lt;b&gt;&amp;.png" in out.read_text()
    assert "<script>" not in out.read_text()


def test_a_model_without_grids_is_said_to_be_one(picture, tmp_path, monkeypatch):
    from vtc.models.llava import Llava
    from vtc.tokens import Layout

    monkeypatch.setattr(Llava, "layouts", lambda self, base, modality, lengths, _: [Layout.plain(n) for n in lengths])
    result = invoke(picture, "tinyvlm", "--keep", "36", "--out", tmp_path / "strip.png")
    assert result.exit_code == 0, result.output
    assert "does not tell where its tokens lie" in result.stderr
    assert Image.open(tmp_path / "strip.png").width > 32 * 12


# --------------------------------------------------------------------------------------------------------------- errors


def test_bad_input_is_refused_before_a_model_is_loaded(picture, tmp_path, monkeypatch):
    from vtc.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "text.png").write_text("not pixels")
    out = ("--out", tmp_path / "out.png")
    assert "there is no image file 'nowhere.png'" in refused("nowhere.png", "tinyvlm", *out)
    assert "not an image" in refused(tmp_path / "text.png", "tinyvlm", *out)
    assert "did you mean 'divprune'" in refused(picture, "tinyvlm", "--method", "divprun", *out)
    assert "keep" in refused(picture, "tinyvlm", "--keep", "1.5", *out)
    assert "ends in none of .png" in refused(picture, "tinyvlm", "--out", "kept.bmp")
    assert "there is no folder" in refused(picture, "tinyvlm", "--out", tmp_path / "nowhere" / "out.png")
    assert not (tmp_path / "out.png").exists()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "visual-token-compression[demo]" in refused(picture, "tinyvlm", "--out", tmp_path / "out.html")


def test_a_missing_checkpoint_is_named(picture, tmp_path):
    assert str(tmp_path) in refused(picture, tmp_path / "nothing", "--out", tmp_path / "out.png")


def test_a_method_the_model_cannot_serve_is_refused(picture, tmp_path):
    line = refused(picture, "tinyvlm", "-m", "globalcom2", "--out", tmp_path / "out.png")
    assert "globalcom2" in line.lower() or "thumbnail" in line
    assert not (tmp_path / "out.png").exists()


def test_every_ending_that_is_offered_can_be_written(picture, tmp_path):
    for suffix in command.PICTURES:
        assert invoke(picture, "tinyvlm", "--out", tmp_path / f"kept{suffix}").exit_code == 0
        assert Image.open(tmp_path / f"kept{suffix}").width > 480
