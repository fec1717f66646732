"""What is installed, and what the README says about it."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from transformers import LlavaModel
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.methods import method_class

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"kernels", "flash-attn", "viz", "lmms-eval", "vllm", "test", "dev"}


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources so that nothing is left behind in the tree."""
    tree = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("vtc", "benchmarks", "integrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
    return next((tree / "dist").glob("*.whl"))


def test_every_package_in_the_tree_is_listed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vtc").rglob("__init__.py")}
    named = {
        "vtc_tinyvlm": "benchmarks/tinyvlm",
        "vtc_tinyvlm_next": "benchmarks/tinyvlm_next",
    } | {
        f"vtc_{path.parent.name}": f"integrations/{path.parent.name}"
        for path in ROOT.glob("integrations/*/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | set(named)
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"vtc": "vtc"} | named


def test_the_wheel_names_its_extras_and_few_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    assert metadata["Version"] == PROJECT["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    base = {re.match(r"[\w-]+", d).group() for d in metadata.get_all("Requires-Dist") if "extra ==" not in d}
    assert base == {"torch", "transformers", "safetensors"}


def test_the_wheel_brings_the_shipped_model(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import json, vtc, vtc_tinyvlm as tiny; print(json.dumps([vtc.__file__, str(tiny.CHECKPOINT)]))"
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path += {sys.path!r}; {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    package, checkpoint = json.loads(done.stdout)
    assert Path(package).is_relative_to(tmp_path)
    assert Path(checkpoint).is_relative_to(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path(checkpoint).iterdir()}
    assert (Path(package).parent / "py.typed").exists()


def test_one_version():
    assert vtc.__version__ == PROJECT["project"]["version"]


def test_readme_snippets_run(tmp_path):
    """One after another. The first is the pitch and stands on a model the reader has."""
    parameters = inspect.signature(LlavaModel.forward).parameters
    can = [s for s in snippets("python")[1:] if "custom_generate" not in s or "mm_encoder_outputs" in parameters]
    script = "\n".join(can)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-model" / "vtc_config.json").exists()


def test_readme_shows_the_table_of_models():
    table = CliRunner().invoke(app, ["models", "--markdown"]).stdout
    assert table.count("\n") == len(vtc.list_models()) + 2
    assert table in README, "paste the output of `vtc models --markdown` into README.md"


def test_readme_lists_exactly_the_methods():
    rows = re.findall(r"^- `(\w+)`", README.split("## Methods")[1].split("\n## ")[0], flags=re.M)
    ours = [name for name in vtc.list_methods() if method_class(name).__module__.startswith("vtc.")]
    assert sorted(rows) == ours  # other tests register methods of their own


def test_ci_runs_the_readmes_test_command():
    command = next(line for snippet in snippets("bash") for line in snippet.splitlines() if line.endswith("nox"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_import_needs_no_extra():
    """`import vtc` works with the base dependencies alone."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'matplotlib', 'typer', 'rich', 'datasets', 'triton'):\n"
        "    sys.modules.setdefault(name, None)\n"
        "import vtc; print(len(vtc.list_methods()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
