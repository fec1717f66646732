"""What CI runs: `nox` lints, then tests on both ends of the supported transformers, in lmms-eval and in vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|venv"  # with uv, environments are there in seconds
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests", "lmms_eval", "vllm"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
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

ANY_TRANSFORMERS = ("budget", "gpu_suite", "kernels_*", "ops*", "packaging", "tokens")
"""Tests that no release of transformers can change: once is enough."""


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as a linter and as a formatter."""
    session.install("ruff==0.17.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
@nox.parametrize("transformers", ["transformers==5.17.*", "transformers"], ids=["oldest", "newest"])
def tests(session: nox.Session, transformers: str) -> None:
    """The whole test suite; arguments after `--` go to pytest."""
    session.install("--upgrade", "-c", "constraints.txt", "-e", ".[test]", transformers)
    # a file's tests share models and references, so one process runs them all; files in order, the short ones last
    arguments = session.posargs or ["-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    if transformers != "transformers":
        arguments = [*arguments, *(f"--ignore-glob=tests/test_{name}.py" for name in ANY_TRANSFORMERS)]
    session.run("python", "-m", "pytest", *arguments, env=ONE_THREAD | OFFLINE)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """The shipped model on the shipped scenes, run by lmms-eval itself in an environment of its own."""
    _apart(session, "lmms_eval", "tests/test_lmms_eval_runs.py", "tests/test_lmms_eval_sweep.py", **ONE_THREAD)


@nox.session
def vllm(session: nox.Session) -> None:
    """The same answers from vLLM's CPU build as from transformers, in an environment of its own."""
    _apart(session, "vllm", "tests/test_vllm.py", "tests/test_vllm_processes.py")


def _apart(session: nox.Session, name: str, *files: str, **env: str) -> None:
    """The tests marked with a name, in what .ci/NAME/install makes of the session's environment; side by side."""
    session.run_install("bash", f".ci/{name}/install", f"{session.bin}/python", external=True, env={"PATH": PATH})
    arguments = session.posargs or ["-q", "-m", name, "-n", "2", "--dist", "loadfile", *files]
    session.run("python", "-m", "pytest", *arguments, env=env | OFFLINE)
