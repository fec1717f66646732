"""What CI runs: `nox` lints, then tests on the newest and the oldest supported transformers, and in lmms-eval."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests", "lmms_eval"]

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


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
    arguments = session.posargs or ["-q", "-n", "2", "--dist", "loadgroup"]
    if transformers != "transformers":  # the kernels know nothing of transformers: once is enough
        arguments = [*arguments, "--ignore-glob=tests/test_kernels_*"]
    session.run("python", "-m", "pytest", *arguments, env=ONE_THREAD | OFFLINE)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """The shipped model on the shipped scenes, run by lmms-eval itself in an environment of its own."""
    session.run("bash", ".ci/lmms_eval/install", f"{session.bin}/python", external=True)
    arguments = session.posargs or ["-q", "-m", "lmms_eval", "tests/test_lmms_eval_runs.py"]
    session.run("python", "-m", "pytest", *arguments, env=ONE_THREAD | OFFLINE)


@nox.session
def vllm(session: nox.Session) -> None:
    """The same answers from vLLM's CPU build as from transformers, in an environment of its own."""
    session.run("bash", ".ci/vllm/install", f"{session.bin}/python", external=True)
    session.run("python", "-m", "pytest", *(session.posargs or ["-q", "-m", "vllm", "tests/test_vllm.py"]), env=OFFLINE)
