"""vtc doctor: what it prints and exits with, where all is well and where something is broken on purpose."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import zoo
from typer.testing import CliRunner
from zoo import get_model, make_batch

import vtc
from vtc.checking import doctor, kernels
from vtc.cli import app
from vtc.dialect import masks
from vtc.dialect.arguments import CACHE
from vtc.engine.entry import EntryStage
from vtc.engine.lengths import SlotMap
from vtc.ops.proof import Outcome


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tour of two families."""
    everything = doctor.tour

    def short(device: str) -> list[doctor.Patient]:
        return [patient for patient in everything(device) if patient.name in ("llava", "qwen3_vl")]

    monkeypatch.setattr(doctor, "tour", short)


def test_every_family_is_on_the_tour() -> None:
    names = [patient.name for patient in doctor.tour()]
    assert names[0] == "tinyvlm (shipped)"
    assert {*names[1:]} == set(vtc.list_models()) & zoo.FAMILIES.keys()
    assert len(names) >= 20


def test_the_shipped_model_is_right() -> None:
    result = invoke("tinyvlm", "--keep", "0.25", "--method", "grid")
    assert result.exit_code == 0, result.output
    for line in ("python", "torch", "transformers", "triton", "vtc", "device", "backend", "Triton kernels in use"):
        assert re.search(rf"^ *{line}  +\S", result.output, re.M), line
    assert "padded batch, no cache" in result.output
    assert "Pruning is right on this machine: 1 of 1 models are right" in result.output
    assert "paste" not in result.output


def test_a_tour_in_json(two: None) -> None:
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["issue"] == ""
    assert found["environment"]["torch"] == torch.__version__
    assert [(f["name"], f["verdict"], f["attention"]) for f in found["findings"]] == [
        ("llava", "ok", "sdpa"),
        ("qwen3_vl", "ok", "sdpa"),
    ]
    assert all(check["verdict"] == "ok" for f in found["findings"] for check in f["verification"]["checks"])


def test_a_fault_ends_in_a_text_to_report(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotMap, "physical_mask", lambda self, mask, length: None if mask is None else mask[:, :length])
    result = invoke()
    assert result.exit_code == 1
    assert result.output.count("FAILED") == 4  # two rows, the summary, and the text's first line
    assert "2 FAILED; 0 of 2 models are right" in result.output
    text = result.output.split("paste this into an issue of vtc:")[1]
    assert "2 of 2 models FAILED" in text
    assert f"torch: {torch.__version__}" in text
    assert re.search(r"^llava: model type llava, attention sdpa, largest difference \d\.\de[+-]\d\d$", text, re.M)
    assert "  padded batch, cache: logits differ from pruning by hand by up to" in text
    assert invoke("--json").exit_code == 1


def test_without_a_gpu_there_is_nothing_to_prove(two: None) -> None:
    result = invoke()
    assert re.search(r"^ *kernels  nothing to prove: torch computes on this device$", result.output, re.M)
    assert json.loads(invoke("--json").stdout)["kernels"] == []


def test_kernels_are_listed_and_a_wrong_one_is_reported(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Outcome("gathers: tensor 0 [float32] 1 x 8", "", 1.25)
    wrong = Outcome("greedy picks: dtype bfloat16, width <= 4096", "4 of 80 bytes differ from torch's", 0.5)
    monkeypatch.setattr(kernels, "prove", lambda device: iter([right]))
    result = invoke()
    assert result.exit_code == 0, result.output
    assert re.search(r"^ *kernels  1 of 1 compute what torch computes$", result.output, re.M)
    assert re.search(r"^ok +1\.2 s  gathers: tensor 0 \[float32\] 1 x 8$", result.output, re.M)
    monkeypatch.setattr(kernels, "prove", lambda device: iter([right, wrong]))
    result = invoke()
    assert result.exit_code == 1
    assert re.search(r"^ *kernels  1 of 2 FAILED$", result.output, re.M)
    assert "Not all is right; 2 of 2 models are right" in result.output
    told = "greedy picks: dtype bfloat16, width <= 4096: 4 of 80 bytes differ from torch's"
    assert re.search(rf"^FAILED +0\.5 s  {re.escape(told)}$", result.output, re.M)
    text = result.output.split("paste this into an issue of vtc:")[1]
    assert "1 of 2 kernels FAILED" in text
    assert f"  {told}\n" in text
    assert f"torch: {torch.__version__}" in text
    found = json.loads(invoke("--json").stdout)
    assert found["ok"] is False
    assert found["kernels"][1] == {"name": wrong.name, "reason": wrong.reason, "seconds": 0.5}


def test_a_name_that_moved_is_found(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a release renames the argument for the cache and vtc does not know it yet."""
    names = CACHE.names
    object.__setattr__(CACHE, "names", ("kv_store",))
    masks._builder.cache_clear()
    try:
        result = invoke()
    finally:
        object.__setattr__(CACHE, "names", names)
        masks._builder.cache_clear()
    assert result.exit_code == 1
    assert "2 FAILED; 0 of 2 models are right" in result.output
    for words in ("no argument for the key-value cache under a name that vtc knows (kv_store)", "To report it, paste"):
        assert words in " ".join(result.output.split())


def test_an_exception_is_one_line_with_its_type(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> Any:
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(EntryStage, "before_decoder", broken)
    result = invoke()
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "  alone, cache: AttributeError: no such thing\n" in result.output
    assert "largest difference none measured" in result.output


def test_a_model_that_cannot_be_made_is_a_finding() -> None:
    def missing() -> Any:
        raise ImportError("no such class")

    here = doctor.Patient("llava", "llava", lambda: (get_model("llava"), make_batch("llava", (1,))))
    found = list(doctor.examine([doctor.Patient("broken", "llava", missing), here]))
    assert [(f.name, f.verdict, f.faults) for f in found] == [
        ("broken", "FAILED", ["ImportError: no such class"]),
        ("llava", "ok", []),
    ]
    assert "ImportError: no such class" in doctor.issue({}, found)


def test_a_family_of_another_release_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Any:
        raise AssertionError("this transformers has no class for it")

    monkeypatch.setattr(doctor, "tour", lambda device: [doctor.Patient("qwen9_vl", "qwen9_vl", never)])
    result = invoke()
    assert "not in this transformers" in result.output
    assert "0 of 0 models are right; 1 family is not in this transformers" in result.output
    assert result.exit_code == 1, "nothing was verified"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/folder",), "/no/such/folder"),
        (("--method", "divprun"), "did you mean 'divprune'"),
        (("--keep", "0"), "keep"),
        (("tinyvlm", "--dtype", "float8"), "dtype='float8'"),
    ],
)
def test_what_cannot_begin_ends_with_two(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("vtc: ")
    assert "Traceback" not in result.output


def test_a_backend_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTC_BACKEND", "cuda")
    result = invoke("tinyvlm")
    assert result.exit_code == 2
    assert "VTC_BACKEND='cuda' is neither" in result.stderr


def test_a_method_that_is_refused_is_no_fault() -> None:
    result = invoke("tinyvlm", "--method", "transprune")
    assert result.exit_code == 1, "nothing was verified"
    assert "drops tokens between the layers of the language model" in result.output
    assert "0 of 0 models are right; 1 that this method is not for" in result.output
    assert "paste" not in result.output
    found = list(doctor.examine([p for p in doctor.tour() if p.name in ("llava", "qwen3_vl")], vtc.ToDRE(keep=0.5)))
    assert [finding.verdict for finding in found] == ["ok", "refused"]
    assert "'cls'" in found[1].error
    assert doctor.is_right(found)
