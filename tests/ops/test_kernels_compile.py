"""Every Triton kernel compiles for sm_80, sm_90 and gfx942, within the chips' limits and as the committed table says.

Compiling happens in processes of their own: other tests import the kernels for Triton's interpreter. This file is also
a module with kernels of its own, which the harness is asked to refuse.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vtc.ops.kernels.variant import Variant

triton = pytest.importorskip("triton", reason="Triton is made for Linux")
tl = importlib.import_module("triton.language")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
compile_kernels = importlib.import_module("compile_kernels")
Compiled, TARGETS = compile_kernels.Compiled, compile_kernels.TARGETS


@triton.jit
def double(x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def hoard(x, SIZE: tl.constexpr):
    """Every value waits for the sum of all of them: SIZE x SIZE / 32 at hand in each thread of one warp."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    kept = tl.load(x + at)
    tl.store(x + at, kept * tl.sum(tl.sum(kept, 0), 0))


@triton.jit
def product(x, y, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Wants 2 x ROWS x DEPTH values in shared memory."""
    rows, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, DEPTH)[None, :]
    left, right = tl.load(x + rows * DEPTH + depth), tl.load(y + rows * DEPTH + depth)
    out = rows * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(y + out, tl.dot(left, right.T).to(tl.bfloat16))


FINE = Variant("fine", double, {"x": "*fp32", "n": "i32"}, {"SIZE": 1024}, {"num_warps": 4})
VARIANTS = (
    FINE,
    Variant("spilling", hoard, {"x": "*fp32"}, {"SIZE": 32}, {"num_warps": 1, "maxnreg": 24}),
    Variant("sharing", product, {"x": "*bf16", "y": "*bf16"}, {"ROWS": 64, "DEPTH": 1024}, {"num_warps": 8}),
    Variant("crowded", double, {"x": "*fp32", "n": "i32"}, {"SIZE": 4096}, {"num_warps": 32}),
    Variant("broken", double, {"x": "*fp32", "n": "i32"}, {"SIZE": 1000}, {"num_warps": 4}),
)


def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_kernels.py"), *arguments]
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}  # which the harness has to overcome
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=600)


@pytest.mark.sampled(newest=2, older=2, by=("module", "target"))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", compile_kernels.kernel_modules())
def test_kernels_fit_the_chips_and_the_table(module, target):
    run = harness("--check", "--module", module, "--target", target)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_table_has_no_module_that_is_gone():
    assert {row.module for row in compile_kernels.read_table()} == set(compile_kernels.kernel_modules())


def test_kernels_that_do_not_fit_are_named():
    run = harness("--module", f"tests.ops.{Path(__file__).stem}", "--json")
    assert run.returncode == 1
    rows = {(row["variant"], row["target"]): Compiled(**row) for row in json.loads(run.stdout)}
    failed = [line for line in run.stderr.splitlines() if line.startswith("FAILED")]

    def complaint(variant: str, target: str, what: str) -> bool:
        return any(f"{variant} on {target} {what}" in line for line in failed)

    for target, chip in TARGETS.items():
        fine, sharing = rows["fine", target], rows["sharing", target]
        assert 0 < fine.registers < 64
        assert not any(f"fine on {target}" in line for line in failed)
        assert fine.shared == 0 < chip.shared < sharing.shared
        assert complaint("sharing", target, f"needs {sharing.shared} bytes of shared memory, {chip.shared}")
        assert complaint("broken", target, "does not compile: CompilationError")
        spilling = rows["sharing" if chip.backend == "hip" else "spilling", target]  # AMD knows no maxnreg
        assert spilling.local > 0
        assert complaint(spilling.variant, target, f"spills: {spilling.spills} ")
        assert complaint("crowded", target, "has 2048 threads (32 warps), 1024") == (chip.backend == "hip")


ROW = Compiled("greedy", "small", "sm_90", 8, 128, 0, 0, 1024, 0, 0, "3.9.0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"registers": 255}, []),
        ({"registers": 256}, ["256 registers", "255"]),
        ({"registers": 129, "warps": 16}, ["69632 registers", "65536"]),  # granules of eight: 136 x 512
        ({"registers": 128, "warps": 16}, []),
        ({"spills": 8, "local": 8}, ["spills: 8 bytes"]),
        ({"local": 16}, ["16 bytes of local memory"]),
        ({"shared": 227 * 1024}, []),
        ({"shared": 227 * 1024 + 1}, ["232449", "232448"]),
        ({"shared": 164 * 1024, "target": "sm_80"}, ["167936", "166912"]),
        ({"warps": 64}, ["2048 threads", "1024"]),
        ({"target": "gfx942", "registers": 512, "warps": 4}, []),
        ({"target": "gfx942", "registers": 512, "warps": 8}, ["262144 registers", "131072"]),
        ({"target": "gfx942", "shared": 64 * 1024 + 1}, ["65537", "65536"]),
        ({"target": "gfx942", "spills": 3, "scalar_spills": 9}, ["spills: 3 registers"]),
        ({"target": "gfx942", "scalar_spills": 9}, []),
    ],
)
def test_limits(change, words):
    row = dataclasses.replace(ROW, **change)
    problems = row.problems()
    assert len(problems) == bool(words), problems
    assert all(word in problems[0] and row.name in problems[0] for word in words)


def test_the_table_is_compared():
    def compare(fresh: list[Compiled], table: list[Compiled]) -> tuple[list[str], list[str]]:
        return compile_kernels.compare(fresh, table, ["greedy"], ["sm_90"])

    assert compare([ROW], [ROW]) == ([], [])
    others = [dataclasses.replace(ROW, module="rows"), dataclasses.replace(ROW, target="sm_80")]
    assert compare([ROW], [ROW, *others]) == ([], [])
    (missing,), drifts = compare([ROW], others)
    assert "greedy: small on sm_90 is not in the table" in missing
    assert not drifts
    (gone,), drifts = compare([], [ROW])
    assert "greedy: small on sm_90" in gone
    assert not drifts
    more = dataclasses.replace(ROW, registers=130)
    (stale,), drifts = compare([more], [ROW])
    assert "registers 128 -> 130" in stale
    assert not drifts
    failures, (drift,) = compare([dataclasses.replace(more, triton="4.0.0")], [ROW])
    assert not failures
    assert "registers 128 -> 130 (Triton 3.9.0 -> 4.0.0)" in drift


def test_the_table_is_read_as_it_was_written(tmp_path):
    pytest.importorskip("vtc_tinyvlm")
    rows = [ROW, dataclasses.replace(ROW, target="gfx942", scalar_registers=20)]
    compile_kernels.write_table(rows, tmp_path / "kernels.csv")
    assert compile_kernels.read_table(tmp_path / "kernels.csv") == rows
    assert "| greedy | small | 8 |  | 128, 1 KiB | 128, 1 KiB |" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": ["sm_70"], "check": True}, "sm_70.*gfx942"),
        ({"target": ["sm_90"]}, "--check"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(typer.BadParameter, match=words):
        compile_kernels.main(**options)


@pytest.mark.parametrize("module", ["no_such_module", "vtc.ops", "no.such.module", "variant"])
def test_bad_modules_are_named(module):
    with pytest.raises(typer.BadParameter, match=module):
        compile_kernels.variants_of(module, "sm_90")


@pytest.mark.parametrize("reader", [compile_kernels._ptxas, compile_kernels._amdgcn])
def test_a_report_that_cannot_be_read_is_no_zero(reader):
    with pytest.raises(RuntimeError):
        reader("ptxas info    : 0 bytes gmem")


def test_arguments_of_a_variant_must_be_complete():
    with pytest.raises(ValueError, match=r"fine.*'n'"):
        compile_kernels.compile_variant("here", dataclasses.replace(FINE, signature={"x": "*fp32"}), "sm_90")
