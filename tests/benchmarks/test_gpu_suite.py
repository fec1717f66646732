"""The GPU suite: one smoke run of everything, and what it does when something is wrong."""

from __future__ import annotations

# ruff: noqa: E402
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.py"
sys.path.append(str(ROOT))  # the suite is no part of the installed package

import vtc
from benchmarks.gpu import cases, e2e, floors, kernels, models, rows, selection
from benchmarks.gpu.capability import has_kernel, no_host_sync
from benchmarks.gpu.methods import check, compare
from benchmarks.gpu.suite import Suite
from benchmarks.gpu.timing import Deadline, Sample
from vtc import ops

CPU = torch.device("cpu")


def command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """The suite as a user starts it."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=timeout, cwd="/", check=False
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The rows of a smoke run; it must not touch the committed file."""
    results = ROOT / "benchmarks" / "results" / "gpu.csv"
    before = results.read_bytes() if results.exists() else None
    out = tmp_path_factory.mktemp("gpu") / "smoke.csv"
    done = command("--smoke", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (results.read_bytes() if results.exists() else None) == before
    assert "0 wrong" in done.stdout
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def suite() -> Suite:
    """For one case, in this process."""
    return Suite(CPU, True, rows.Sheet(None, {}), Deadline(60), floors.Ceilings(1e9, 1e9, 1e-6))


# ------------------------------------------------------------------------------------------------------- one smoke run


def test_columns_and_sources(smoke: list[dict[str, str]]) -> None:
    assert tuple(smoke[0]) == rows.COLUMNS
    for row in smoke:
        assert all(row[name] for name in rows.SOURCE)
        assert row["correct"] in (rows.YES, rows.SKIPPED)
        assert row["note"] or row["correct"] == rows.YES  # nothing is left out without a reason


@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_was_measured(smoke: list[dict[str, str]], op: str) -> None:
    own = {row["backend"]: row for row in smoke if row["case"] == op and row["batch"] == "1"}
    assert set(own) == {"torch", "triton", "published"}
    for backend in ("torch", "published"):
        assert own[backend]["correct"] == rows.YES
        assert float(own[backend]["median"]) > 0
        assert float(own[backend]["floor"]) > 0
        assert float(own[backend]["ratio"]) > 0
    assert {row["batch"] for row in smoke if row["case"] == op} == {"1", "2"}
    for what in ("no host sync", "one graph (torch.compile)", "launches"):
        checks = {row["backend"]: row["correct"] for row in smoke if row["case"] == f"{op}: {what}"}
        assert checks["torch"] == rows.YES


@pytest.mark.parametrize("op", cases.OPS)
def test_every_kernel_was_checked(smoke: list[dict[str, str]], op: str) -> None:
    (row,) = [row for row in smoke if row["case"] == f"{op}: right" and row["backend"] == "triton"]
    given = cases.make(op, cases.TINY[0])
    inputs = given.inputs(1, CPU, torch.float32, torch.Generator().manual_seed(0))
    pytest.importorskip("triton")
    assert (row["correct"] == rows.YES) == has_kernel(lambda: given.call(inputs))


@pytest.mark.parametrize("name", kernels.names())
def test_every_method_pruned_under_flash_attention_alone(smoke: list[dict[str, str]], name: str) -> None:
    found = [row for row in smoke if row["case"] == f"flash only: {name}"]
    assert len(found) == len(models.SPECS)
    right = [row for row in found if row["correct"] == rows.YES]
    assert right
    assert all(float(row["median"]) > 0 for row in right)
    crops_or_cls = ("globalcom2", "prumerge", "prumerge+")
    assert len(right) == len(models.SPECS) or name in crops_or_cls


@pytest.mark.parametrize("name", ["unpruned", *e2e.METHODS])
def test_every_method_was_timed_end_to_end(smoke: list[dict[str, str]], name: str) -> None:
    for phase in ("TTFT", "vision", "decode") if name == "unpruned" else ("TTFT", "vision", "decode", "select"):
        timed = [row for row in smoke if row["case"] == f"{phase}: {name}" and row["median"]]
        assert len(timed) == (1 if name == "globalcom2" else len(models.SPECS))
        assert all(row["correct"] == rows.YES and float(row["median"]) > 0 for row in timed)


def test_the_padded_prompt_was_refused(smoke: list[dict[str, str]]) -> None:
    found = [row for row in smoke if row["case"] == "flash only: padded (must be refused)"]
    assert [row["correct"] for row in found] == [rows.YES] * len(models.SPECS)


# ------------------------------------------------------------------------------------------------ what is wrong is void


def test_a_broken_op_has_no_figures(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.farthest_first
    monkeypatch.setattr(ops, "farthest_first", lambda *args, **more: right(*args, **more).flip(-1))
    shape = cases.TINY[0]
    selection.cell(suite, cases.make("farthest_first", shape), shape, 1, torch.float32)
    found = {row.backend: row for row in suite.sheet.rows if row.case == "farthest_first"}
    assert found["torch"].correct == rows.NO
    assert "worse than the best" in found["torch"].note
    assert found["torch"].median is None
    assert found["torch"].ratio is None
    assert found["published"].correct == rows.YES  # the loop does not use the op


@pytest.mark.parametrize(
    ("name", "broken"),
    [("transition_variation", lambda score: score * 1.01), ("instruction_attention", lambda score: score * torch.nan)],
)
def test_a_score_that_is_off_is_wrong(suite: Suite, monkeypatch: pytest.MonkeyPatch, name: str, broken: object) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **more: broken(right(*args, **more)))  # type: ignore[operator]
    kernels.exact(suite, name, torch.float32)
    assert suite.sheet.rows[0].correct == rows.NO
    assert suite.sheet.rows[0].ratio is None


def test_picks_that_repeat_or_leave_the_image_are_wrong() -> None:
    op = cases.make("k_center", cases.TINY[0])
    given = op.inputs(2, CPU, torch.float32, torch.Generator().manual_seed(0))
    picks = op.call(given)
    assert op.judge(given, picks, op.tolerance) == ""
    assert "distinct" in op.judge(given, picks[:, [0, 1, 1, 2]], op.tolerance)
    assert "no index" in op.judge(given, picks + 1000, op.tolerance)
    assert "shape" in op.judge(given, picks[:, :2], op.tolerance)


def test_wrong_columns_make_wrong_logits() -> None:
    spec = models.SPECS[-1].tiny()
    model = models.build(spec, CPU, torch.float32)
    inputs, tokens = models.prompts(spec, model, 2)
    with torch.no_grad():
        with vtc.patch(model, "divprune", keep=spec.keep) as handle:
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            columns = handle.last_columns[0]  # type: ignore[index]
        assert check(spec, model, inputs, "divprune", tokens)[0] == ""
        assert compare(model, inputs, logits, columns)[0] == ""
        other = columns.clone()
        visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        other[other == visual[torch.isin(visual, columns)][0]] = visual[~torch.isin(visual, columns)][0]
        assert "by hand" in compare(model, inputs, logits, other.sort().values)[0]
    assert spec.keep < tokens


def test_a_mask_is_refused_and_calls_are_counted() -> None:
    x = torch.randn(1, 2, 4, 8)
    with kernels.flash_only() as watch:
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        assert watch.calls == 1
        with pytest.raises(RuntimeError, match="mask"):
            torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.bool))


def test_reading_on_the_host_is_noticed() -> None:
    x = torch.randn(4)
    with no_host_sync(CPU):
        x.argmax()
    with pytest.raises(RuntimeError, match="host waits"), no_host_sync(CPU):
        x.argmax().item()


def test_a_crash_is_a_row_and_not_the_end(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(selection, "cell", crash)
    monkeypatch.setattr(selection, "capabilities", lambda *_: None)
    selection.run(suite)
    assert {row.correct for row in suite.sheet.rows} == {rows.NO}
    assert all("boom" in row.note for row in suite.sheet.rows)


def test_what_was_not_reached_is_named(suite: Suite) -> None:
    suite.deadline = Deadline(0)
    for part in (selection, kernels, e2e):
        part.run(suite)
    assert {row.correct for row in suite.sheet.rows} == {rows.SKIPPED}
    reached = [row for row in suite.sheet.rows if row.note == "not reached in the time given"]
    assert {row.case for row in reached} >= {*cases.OPS, "flash only: unpruned", "end to end"}


# --------------------------------------------------------------------------------------------------------- small things


def test_ratio_is_the_share_of_the_floor() -> None:
    assert rows.Row("", "", "", 1, "", median=2.0, floor=1.0).ratio == 0.5
    assert rows.Row("", "", "", 1, "", median=2.0, floor=1.0, correct=rows.NO).ratio is None
    with pytest.raises(ValueError, match="'maybe'"):
        rows.Row("", "", "", 1, "", correct="maybe")


def test_noise_is_the_distance_of_two_series() -> None:
    assert Sample.of([1.0, 1.0], [1.2, 1.2]).noise == pytest.approx(0.2 / 1.1)
    assert Sample.of([3.0], []) == Sample(3.0, None, None, None, 1)


# gpu.md: visual tokens, TF of the language model's prefill with 64 other tokens; vision with all layers that run
@pytest.mark.parametrize(
    ("at", "tokens", "language", "vision"), [(0, 2880, 40.4, 2.03), (1, 1369, 19.1, 7.70), (2, 576, 8.40, 0.406)]
)
def test_costs_of_the_full_models(at: int, tokens: int, language: float, vision: float) -> None:
    spec = models.SPECS[at]
    with torch.device("meta"):
        model = e2e.models.tf.AutoModelForImageTextToText.from_config(spec.config(spec.size), dtype=torch.bfloat16)
    costs = floors.Costs(model, (spec.picture(spec.size),) * 2, spec.size.text)
    assert costs.vision / 1e12 == pytest.approx(vision, rel=0.01)
    whole = costs.prefill([tokens] * spec.size.layers)
    assert (whole - costs.vision) / 1e12 == pytest.approx(language, rel=0.005)


def test_floor_of_the_headline_shape() -> None:
    ceilings = floors.Ceilings(bandwidth=4.3e12, flops=790e12, step=1e-6)
    # 2880 tokens of 4096 numbers in bf16 are 23.6 MB: 5.5 µs; half of all pairs 34 GFLOPs: 43 µs; then 320 steps
    floor = floors.greedy(ceilings, 1, 2880, 320, 4096, 2, all_pairs=True)
    assert floor == pytest.approx(0.043 + 0.320, rel=0.01)


def test_a_smoke_run_refuses_the_committed_file() -> None:
    done = command("--smoke", "--out", str(ROOT / "benchmarks" / "results" / "gpu.csv"))
    assert done.returncode == 2
    assert "another" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_works() -> None:
    done = command()
    assert done.returncode == 2
    assert "--smoke" in done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_thing(tmp_path: Path) -> None:
    out = Path(os.environ.get("OUT", tmp_path)) / "gpu.csv"
    done = command("--out", str(out), timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
