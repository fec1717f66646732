"""`benchmarks/peers.py --quick`: peers compute what vtc computes, and wrong ones are not timed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner
from zoo import get_model

import vtc
from benchmarks import peers, plain_prefills, selection
from benchmarks.gpu import published
from vtc.profiling.running import forward
from vtc.profiling.workload import Workload


@pytest.fixture
def prompts() -> tuple[Any, Any]:
    model = get_model("llava")
    model.set_attn_implementation("sdpa")
    return model, Workload(text=8).inputs(model, 3)


def run(*arguments: str) -> Any:
    app = Typer()
    app.command()(peers.main)
    return CliRunner().invoke(app, list(arguments))


def test_one_command_writes_rows_and_a_page(tmp_path: Path) -> None:
    result = run("--quick", "--batches", "1,2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    first = list(csv.DictReader((tmp_path / "peers_first_cpu.csv").open()))
    expected = [
        "unpruned",
        *(f"{way}" for name in plain_prefills.WAYS for way in (f"vtc {name}", f"{name} as published")),
    ]
    assert [row["way"] for row in first] == 2 * expected
    assert [float(row["speedup"]) for row in first if row["way"] == "unpruned"] == [1.0, 1.0]
    for row in first:
        assert float(row["cpu_p10"]) <= float(row["cpu_ms"]) <= float(row["cpu_p90"])
        assert (row["kept"] == row["visual"]) == (row["way"] == "unpruned")
        if row["ideal"]:
            assert float(row["realised"]) == pytest.approx(float(row["speedup"]) / float(row["ideal"]), rel=1e-2)
        if row["same"]:
            assert float(row["same"]) == 1.0
    selected = list(csv.DictReader((tmp_path / "peers_select_cpu.csv").open()))
    assert len(selected) == len([case for case in selection.SMOKE if case[0] == "farthest_first" and case[-1] == 1])
    assert {(row["differ"], row["differ_running"], row["inputs"]) for row in selected} == {("0", "0", "3")}
    text = (tmp_path / "peers_cpu.md").read_text()
    assert "| 1 | unpruned | 16 of 16 |" in text
    assert f"on 0 of {3 * len(selected)} inputs" in text
    assert text.strip() in result.output


@pytest.mark.parametrize("arguments", [["--only", "both"], ["--only", "first"]])
def test_what_would_overwrite_the_page_of_both_is_refused(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("name", plain_prefills.WAYS)
def test_peers_are_what_vtc_computes(name: str, prompts: tuple[Any, Any]) -> None:
    model, inputs = prompts
    attention = [c._attn_implementation for c in (model.config.text_config, model.config.vision_config)]
    positions = "compact" if name in (*peers.COMPACT, "visionzip") else "original"
    with vtc.patch(model, name, keep=0.5, positions=positions) as handle:
        expected = forward(model, inputs).logits[:, -1]
        kept = torch.stack([images[0] for images in handle.last_keep or ()])
    with torch.inference_mode():
        found = plain_prefills.WAYS[name](model, inputs, kept.shape[1])
    assert torch.equal(found.kept, kept)
    if name != "visionzip":  # its merged tokens stand behind all others, vtc's in their places
        torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert attention == [c._attn_implementation for c in (model.config.text_config, model.config.vision_config)]
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # transformers has its own
    with torch.inference_mode():
        plain_prefills.WAYS[name](model, inputs, kept.shape[1])
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_zipped_values_are_vtcs() -> None:
    """What VisionZip merges, as vtc has it on bare tensors, but for the order."""
    generator = torch.Generator().manual_seed(0)
    hidden, key = (torch.randn(36, d, generator=generator) for d in (12, 6))
    looked = torch.rand(36, generator=generator)
    values, places = plain_prefills._zipped(looked, hidden, key, 10, 3)
    signals = {"cls": looked, "keys": key}
    expected = vtc.select(vtc.VisionZip(keep=13, contextual=3), hidden, keep=13, signals=signals)
    assert torch.equal(places, expected.index)
    order = [*looked.topk(10).indices.sort().values.tolist()]
    rows = {place: at for at, place in enumerate(order + [p for p in places.tolist() if p not in order])}
    torch.testing.assert_close(values[[rows[p] for p in places.tolist()]], expected.features)


def test_a_peer_that_answers_otherwise_is_not_timed(prompts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prompts
    real = plain_prefills.divprune

    def off(*arguments: Any) -> Any:
        found = real(*arguments)
        return plain_prefills.Prefill(found.logits * 1.01, found.kept)

    monkeypatch.setitem(peers.WAYS, "divprune", off)
    with pytest.raises(RuntimeError, match=r"divprune as published: 100\.0% of vtc's tokens, logits differ"):
        peers.ways(model, inputs, 0.25)


def test_picks_that_are_not_the_definitions_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ("farthest_first", "gauss", 40, 5, 8, 1)
    monkeypatch.setitem(selection.OPS, "farthest_first", (lambda x, k: x[..., 0].topk(k).indices, published.divprune))
    assert selection.measure(case, 1, 1)["differ"] == 2  # both inputs
    calls = []

    def once_wrong(x: Any, k: int) -> Any:
        calls.append(1)
        return torch.stack([published.divprune(each, k) for each in x]) + len(calls) % 2

    monkeypatch.setitem(selection.OPS, "farthest_first", (once_wrong, published.divprune))
    with pytest.raises(RuntimeError, match="vtc does not pick what the definition says"):
        selection.measure(case, 1, 1)
