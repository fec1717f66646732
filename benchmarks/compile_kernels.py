"""Compile every Triton kernel for three GPUs without one: `python benchmarks/compile_kernels.py [--check]`.

Each module of `vtc.ops.kernels` lists in `VARIANTS` what its wrappers launch. All of them are compiled for sm_80, sm_90
and gfx942 (`HOPPER_VARIANTS` for sm_90 alone), and what the compilers report is held against the chip: a kernel may not
spill registers to memory, need other local memory, or ask for more registers, shared memory or threads than one block
can have. The numbers go to results/kernels.csv and .md. `--check` writes nothing and compares with that table: it fails
for a variant that the table lacks, a row that no variant makes, and numbers that the same Triton no longer gives.
Another Triton may allocate registers differently: that is shown and is no failure, as long as the limits hold.

Registers and spills are those of ptxas and LLVM: of ptxas' own log of the very call in which Triton makes the binary,
and of the metadata in the AMD assembly. Pointers are taken as aligned to 16 bytes, as torch's tensors are. The
compiler's cache is a fresh directory, so that nothing old is read and parallel runs do not meet.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vtc.ops.kernels.variant import Variant

PACKAGE = "vtc.ops.kernels"
TABLE = Path(__file__).parent / "results" / "kernels.csv"
COMMAND = "python benchmarks/compile_kernels.py"


@dataclass(frozen=True)
class Target:
    """A chip: how Triton calls it, and what one block (AMD: workgroup) can have at most.

    Attributes:
        backend: Triton's name of the compiler back end.
        arch: of the chip, as that back end writes it.
        lanes: threads of a warp (AMD: wavefront).
        registers: of one thread; on CDNA 3 vector and accumulation registers together.
        register_file: registers that all threads of a block share (AMD: four SIMDs of 512 x 64).
        shared: bytes of shared memory (AMD: LDS).
    """

    backend: str
    arch: int | str
    lanes: int
    registers: int
    register_file: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, registers=255, register_file=64 * 1024, shared=163 * 1024),
    "sm_90": Target("cuda", 90, 32, registers=255, register_file=64 * 1024, shared=227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, registers=512, register_file=128 * 1024, shared=64 * 1024),
}
THREADS = 1024  # of a block, on all of them
GRANULE = 8  # registers are handed to a warp in multiples of this per thread, on all of them


@dataclass(frozen=True)
class Compiled:
    """What the compilers say about one variant on one target: a row of the table.

    Attributes:
        spills: bytes stored and loaded again because registers ran out (AMD: registers that were spilled).
        local: bytes of memory of its own per thread, spills included.
        scalar_registers: AMD only. Scalar spills go to lanes of a vector register, so they are not counted above.
        triton: the version that compiled.
    """

    module: str
    variant: str
    target: str
    warps: int
    registers: int
    spills: int
    local: int
    shared: int
    scalar_registers: int
    scalar_spills: int
    triton: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What names a row."""
        return self.module, self.variant, self.target

    @property
    def name(self) -> str:
        """`greedy: gram-bf16 on sm_90`."""
        return f"{self.module}: {self.variant} on {self.target}"

    def problems(self) -> list[str]:
        """Where it spills or exceeds the chip; empty if all is well."""
        chip, threads = TARGETS[self.target], self.warps * TARGETS[self.target].lanes
        file = -(-self.registers // GRANULE) * GRANULE * threads
        found = []
        if self.spills:
            found.append(f"spills: {self.spills} {'bytes' if chip.backend == 'cuda' else 'registers'}")
        elif self.local:
            found.append(f"needs {self.local} bytes of local memory per thread")
        if self.registers > chip.registers:
            found.append(f"needs {self.registers} registers per thread, {chip.registers} is the limit")
        if threads > THREADS:
            found.append(f"has {threads} threads ({self.warps} warps), {THREADS} is the limit")
        elif file > chip.register_file:
            found.append(
                f"needs {file} registers ({self.registers} in each of {threads} threads), "
                f"{chip.register_file} is the limit"
            )
        if self.shared > chip.shared:
            found.append(f"needs {self.shared} bytes of shared memory, {chip.shared} is the limit")
        return [f"{self.name} {what}" for what in found]


def kernel_modules() -> list[str]:
    """Names of the modules of `vtc.ops.kernels` that list variants; their source is read, they are not imported."""
    package = importlib.import_module(PACKAGE)
    found = {m.name: Path(package.__path__[0], f"{m.name}.py") for m in pkgutil.iter_modules(package.__path__)}
    return sorted(name for name, path in found.items() if re.search(r"^VARIANTS\b", path.read_text(), re.MULTILINE))


def variants_of(module: str, target: str) -> Sequence[Variant]:
    """The variants of a module: one of `vtc.ops.kernels` by its short name, or any other by a name with a dot.

    Those in `HOPPER_VARIANTS`, if the module has them, are launched on sm_90 only.
    """
    try:
        listed = importlib.import_module(module if "." in module else f"{PACKAGE}.{module}")
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"no module {module!r}: {error}") from error
    variants = getattr(listed, "VARIANTS", None)
    if variants is None:
        raise typer.BadParameter(f"{module} has no VARIANTS")
    if target == "sm_90":
        variants = (*variants, *getattr(listed, "HOPPER_VARIANTS", ()))
    names = [v.name for v in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"VARIANTS of {module} must not be empty and their names must differ: {names}")
    return variants


def compile_variant(module: str, variant: Variant, target: str) -> Compiled:
    """Compile one variant for one target and read what the compilers report.

    Raises:
        ValueError: the signature and the constants do not cover the kernel's arguments.
        Exception: whatever Triton or a compiler behind it raises for a kernel that it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, chip = variant.kernel.arg_names, TARGETS[target]
    if sorted(arguments) != sorted([*variant.signature, *variant.constants]):
        raise ValueError(
            f"{module}: {variant.name} must give each of {arguments} once, in the signature or in the constants"
        )
    types = {a: variant.signature.get(a, "constexpr") for a in arguments}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if types[a].startswith("*")}
    source = ASTSource(variant.kernel, types, dict(variant.constants), aligned)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, _environment(cache), contextlib.redirect_stdout(log):
        made = triton.compile(source, GPUTarget(chip.backend, chip.arch, chip.lanes), dict(variant.options))
    report = _ptxas(log.getvalue()) if chip.backend == "cuda" else _amdgcn(made.asm["amdgcn"])
    shared = max(made.metadata.shared, report.pop("shared"))
    return Compiled(
        module, variant.name, target, made.metadata.num_warps, shared=shared, triton=triton.__version__, **report
    )


@contextlib.contextmanager
def _environment(cache: str) -> Iterable[None]:
    """A cache of its own, and ptxas' log printed where the caller can catch it."""
    ours = {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ptxas(log: str) -> dict[str, int]:
    """Numbers in the log of `ptxas -v`, summed or maximised over the functions of one binary."""

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, log)]

    registers = numbers(r"Used (\d+) registers")
    if not registers:
        raise RuntimeError(f"ptxas -v reported no registers: {log!r}")
    return {
        "registers": max(registers),
        "spills": sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        "local": max(numbers(r"(\d+) bytes stack frame"), default=0),
        "shared": max(numbers(r"(\d+) bytes smem"), default=0),
        "scalar_registers": 0,
        "scalar_spills": 0,
    }


def _amdgcn(assembly: str) -> dict[str, int]:
    """Numbers in the metadata block of AMD assembly."""

    def number(field: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{field}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{field}")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "local": number("private_segment_fixed_size"),
        "shared": number("group_segment_fixed_size"),
        "scalar_registers": number("sgpr_count"),
        "scalar_spills": number("sgpr_spill_count"),
    }


def compare(
    rows: Iterable[Compiled], table: Iterable[Compiled], modules: Iterable[str], targets: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Hold fresh rows against the committed ones of the same modules and targets.

    Returns:
        Failures, and differences that another version of Triton explains.
    """
    modules, targets = set(modules), set(targets)
    fresh, known = {r.key: r for r in rows}, {r.key: r for r in table if r.module in modules and r.target in targets}
    failures = [f"{r.name} is not in the table; run {COMMAND}" for key, r in fresh.items() if key not in known]
    failures += [f"{r.name} is in the table, but no variant makes it" for key, r in known.items() if key not in fresh]
    drifts = []
    for key in fresh.keys() & known.keys():
        now, then = asdict(fresh[key]), asdict(known[key])
        changed = [f"{f} {then[f]} -> {now[f]}" for f in now if f != "triton" and now[f] != then[f]]
        if not changed:
            continue
        text = f"{fresh[key].name}: {', '.join(changed)}"
        if now["triton"] == then["triton"]:
            failures.append(f"{text}; the table is out of date, run {COMMAND}")
        else:
            drifts.append(f"{text} (Triton {then['triton']} -> {now['triton']})")
    return sorted(failures), sorted(drifts)


def read_table(path: Path = TABLE) -> list[Compiled]:
    """The committed rows, without their provenance; none if there is no table yet."""
    if not path.exists():
        return []
    kinds = {f.name: int if f.type == "int" else str for f in fields(Compiled)}
    with path.open(newline="") as handle:
        return [Compiled(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in csv.DictReader(handle)]


def markdown(rows: Sequence[Compiled], source: Mapping[str, str]) -> str:
    """One line for each variant, the targets side by side."""
    limits = "; ".join(f"{n}: {t.registers} registers, {t.shared // 1024} KiB" for n, t in TARGETS.items())
    lines = [
        "# Compiled kernels",
        "",
        f"Made by `{COMMAND}` on {source['date']}, commit {source['commit']}, Triton {rows[0].triton}, without a GPU. "
        "Registers per thread and shared memory per block; spills would be named. "
        f"Limits: {limits}; registers x threads: 64k on NVIDIA, 128k on AMD.",
        "",
        f"| module | variant | warps | {' | '.join(TARGETS)} |",
        "| --- | --- | ---: |" + " ---: |" * len(TARGETS),
    ]
    by_variant: dict[tuple[str, str], dict[str, Compiled]] = {}
    for row in rows:
        by_variant.setdefault((row.module, row.variant), {})[row.target] = row
    for (module, variant), on in by_variant.items():
        cells = []
        for target in TARGETS:
            row = on.get(target)
            spilled = f", {row.spills} spilled, {row.local} B local" if row and (row.spills or row.local) else ""
            shared = f"{row.shared / 1024:.4g} KiB" if row and row.shared >= 1024 else f"{row.shared if row else 0} B"
            cells.append(f"{row.registers}, {shared}{spilled}" if row else "")
        lines.append(f"| {module} | {variant} | {next(iter(on.values())).warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(rows: Sequence[Compiled], path: Path = TABLE) -> None:
    """Write the CSV and the Markdown beside it."""
    from vtc.profiling.provenance import provenance
    from vtc_tinyvlm.evaluate import write_csv

    source = {key: value for key, value in provenance().items() if key in ("date", "commit")}
    write_csv([asdict(row) | source for row in rows], path)
    path.with_suffix(".md").write_text(markdown(rows, source))


def main(
    module: Annotated[
        list[str] | None,
        typer.Option(help="Module of vtc.ops.kernels, or `package.module`; default: all of the former."),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TARGETS)}; default: all.")] = None,
    check: Annotated[bool, typer.Option(help="Compare with the table instead of writing it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON; nothing is written.")] = False,
    table: Annotated[Path, typer.Option(help="The CSV to write or to compare with.")] = TABLE,
) -> None:
    """Compile, judge, and write or compare the table; exit 1 names every kernel that fails."""
    from tqdm import tqdm

    modules, targets = module or kernel_modules(), target or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        raise typer.BadParameter(f"unknown target {', '.join(sorted(unknown))}; one of {', '.join(TARGETS)}")
    if (module or target) and not (check or as_json) and table == TABLE:
        raise typer.BadParameter("a part would overwrite the whole table: add --check, --json or --table")
    if not modules:
        raise typer.BadParameter(f"no module of {PACKAGE} has VARIANTS")
    os.environ.pop("TRITON_INTERPRET", None)  # a kernel imported under the interpreter cannot be compiled
    rows: list[Compiled] = []
    failures: list[str] = []
    jobs = [(m, v, t) for m in modules for t in targets for v in variants_of(m, t)]
    for name, variant, chip in tqdm(jobs, desc="kernels", disable=None):
        try:
            rows.append(compile_variant(name, variant, chip))
        except Exception as error:  # the compilers' errors share no class; each is reported, and fails the run
            failures.append(f"{name}: {variant.name} on {chip} does not compile: {type(error).__name__}: {error}")
        else:
            failures += rows[-1].problems()
    if check:
        stale, drifts = compare(rows, read_table(table), modules, targets)
        gone = sorted({r.module for r in read_table(table)} - set(modules)) if not module else []
        failures += stale + [f"{m} is in the table, but {PACKAGE} has no such module with VARIANTS" for m in gone]
        for line in drifts:
            typer.echo(f"differs: {line}")
    for line in failures:
        typer.echo(f"FAILED {line}", err=True)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
    elif rows and not check:
        write_table(rows, table)
        typer.echo(table.with_suffix(".md").read_text())
    typer.echo(f"{len(jobs)} compiled, {len(failures)} failures", err=True)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
