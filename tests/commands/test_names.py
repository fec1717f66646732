"""What a model's name means on the command line: shipped, here, on the hub; and a hub that does not answer."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from vtc import hub, names
from vtc.checkpoint import Checkpoint
from vtc.cli import app
from vtc.names import SHIPPED, at_hand, folder_of


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------------- short names


def commands(model, picture):
    """Every command that takes a model, at its least."""
    method = ("--method", "mqt") if model == "tinyvlm-mqt" else ("--method", "grid")
    return {
        "run": ("run", model, picture, "what ?", *method, "--max-new-tokens", "1"),
        "show": ("show", picture, model, *method, "--out", picture.with_suffix(".jpg")),
        "estimate": ("estimate", model, *method, "--json"),
        "profile": ("profile", model, *method, "--text", "4", "--repeats", "1", "--new-tokens", "0"),
        "doctor": ("doctor", model, *method, "--json"),
        "tune": ("tune", model, *method, "-n", "12", "--max-drop", "90%", "--out", picture.parent),
        "sweep": ("sweep", model, *method, "--keep", "0.5", "--no-baselines", "-n", "6", "--batch", "1",
                  "--repeats", "1", "--out", picture.parent / "sweep"),
    }  # fmt: skip


def test_a_short_name_works_in_every_command(picture):
    """That of tinyvlm-mqt, which most of them did not know; the tests of each command take the others'."""
    for name, command in commands("tinyvlm-mqt", picture).items():
        result = invoke(*command)
        assert result.exit_code == 0, f"{name}: {result.output}"


@pytest.mark.parametrize("model", ["tinyvlm", "tinyvlm-next"])
def test_run_takes_short_names(model, picture):
    result = invoke(*commands(model, picture)["run"])
    assert result.exit_code == 0, result.output
    assert "visual tokens kept" in result.stderr


def test_photovlm_is_asked_for_by_its_package(picture, monkeypatch):
    """It is not trained yet: every command says so, in the words of its package, instead of asking a hub."""
    photovlm = pytest.importorskip("vtc_photovlm")

    def missing(*args):
        raise photovlm.Unavailable("no trained model")

    monkeypatch.setattr(photovlm, "whole", missing)
    monkeypatch.setattr(photovlm, "load", missing)
    monkeypatch.setattr(hub, "trouble", lambda: pytest.fail("a hub was asked"))
    for name, command in commands("photovlm", picture).items():
        assert "no trained model" in refused(*command), name


def test_serving_says_which_shipped_models_it_cannot_run():
    for name in ("tinyvlm-mqt", "photovlm"):
        line = refused("serve", name, "--dry-run")
        assert "is not served" in line
        assert "What would work: tinyvlm, tinyvlm-next" in line


def test_the_python_interface_knows_them_too():
    assert Checkpoint.load("tinyvlm").model.config.model_type == "llava"
    assert folder_of("another/model") == "another/model"
    assert {name for name, shipped in SHIPPED.items() if shipped.task != name} == {"tinyvlm-mqt"}


# ----------------------------------------------------------------------------------------------- what cannot be reached


@pytest.fixture
def black_hole():
    """An endpoint that takes connections and never answers."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(8)
        yield f"http://127.0.0.1:{hole.getsockname()[1]}"


def test_a_hub_that_does_not_answer_costs_seconds_and_one_line(black_hole, picture, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": black_hole, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_COLOR": "1"}
    code = (
        "import time, vtc.checkpoint, vtc.cli; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from vtc.cli import app; start = time.perf_counter()\n"
        "try: app(prog_name='vtc')\n"
        "finally: print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, "run", "some/model", str(picture), "what ?"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 2, done.stderr
    assert float(done.stdout) < 4 * hub.PATIENCE  # with a busy machine; the retries took 48 seconds
    (line,) = done.stderr.splitlines()
    for words in ("'some/model' is no folder here", black_hole, f"no answer within {hub.PATIENCE:g} s", "HF_ENDPOINT"):
        assert words in line
    assert all(name in line for name in SHIPPED)


def test_one_request_is_enough_and_is_short(black_hole, monkeypatch):
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", black_hole)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    start = time.perf_counter()
    assert hub.trouble() == "no answer within 0.3 s"
    assert time.perf_counter() - start < 1.5
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert re.match(r"Connect\w*Error", hub.trouble())


@pytest.mark.parametrize(("status", "said"), [(200, ""), (404, ""), (503, "it answers 503")])
def test_a_hub_in_trouble_is_not_asked_again(monkeypatch, status, said):
    """huggingface_hub would ask such a one six times for each file."""
    import huggingface_hub.utils

    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
    assert hub.trouble() == said


def test_looking_up_an_address_may_not_take_longer(monkeypatch):
    """No timeout of a request covers it."""
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "_ask", lambda: time.sleep(30))
    start = time.perf_counter()
    assert hub.trouble() == "no answer within 0.1 s"
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("reason", ["", "ConnectError: unknown host"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_was_fetched_before_is_taken_where_the_hub_is_silent(monkeypatch, reason, cached):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(names.hub, "trouble", lambda: reason)
    monkeypatch.setattr(names.hub, "is_cached", lambda name: cached)
    if reason and not cached:
        with pytest.raises(ConnectionError, match="unknown host"), at_hand("some/model"):
            pytest.fail("asked")
    else:
        with at_hand("some/model"):
            assert constants.HF_HUB_OFFLINE is bool(reason)  # then nothing is asked again, file by file
    assert constants.HF_HUB_OFFLINE is False


def test_a_real_cache_is_recognised(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.is_cached("some/model")
    assert not hub.is_cached("some/other")
    assert not hub.is_cached("no name at all")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tinyvlmm", "did you mean 'tinyvlm'?"),
        ("nothing", "no name on the hub, which is OWNER/NAME"),
        ("./nothing", "there is no './nothing'"),
        ("/nowhere/at/all", "there is no '/nowhere/at/all'"),
        ("some/model", "HF_HUB_OFFLINE forbids to ask"),
    ],
)
def test_a_name_that_is_nothing_is_refused_in_every_command(name, words, picture, monkeypatch):
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    for command, arguments in commands(name, picture).items():
        task = ("--task", "tinyvlm") if command in ("tune", "sweep") else ()
        line = refused(*arguments, *task)
        assert words in line, command
        assert "What would work: a folder with a checkpoint; one of tinyvlm" in line


def test_an_estimate_names_what_it_knows_without_a_hub(monkeypatch):
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    assert "such as Qwen/Qwen2.5-VL-7B-Instruct" in refused("estimate", "Qwen/Qwen2.5-VL-8B-Instruct")
    assert json.loads(invoke("estimate", "qwen2.5-vl-7b-instruct", "--json").stdout)["model"] == "qwen2_5_vl"
