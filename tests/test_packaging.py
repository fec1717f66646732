"""What is installed, from which locks, and what the README says about it."""

import ast
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
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import LlavaModel
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.methods import method_class

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
EXTRAS = {"kernels", "flash-attn", "viz", "lmms-eval", "vllm", "test", "dev"}


LONG: set[str] = set()
"""Files that are still too long."""


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


def test_the_wheel_has_every_package_of_the_tree_and_no_other(wheel):
    """Each folder is named as it is imported."""
    roots = {path.parent.parent for path in ROOT.glob("*/vtc_*/__init__.py")} | {ROOT}
    paths = [path for root in roots for top in root.glob("vtc*") for path in top.rglob("*.py")]
    found = {path.relative_to(next(p for p in path.parents if p in roots)).as_posix() for path in paths}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    assert {n for n in found if "/examples/" not in n} == packed


def test_the_wheel_names_its_extras_and_few_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    assert metadata["Version"] == PROJECT["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    base = {re.match(r"[\w-]+", d).group() for d in metadata.get_all("Requires-Dist") if "extra ==" not in d}
    assert base == {"torch", "transformers", "safetensors", "numpy"}


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
    assert (Path(package).parent / "published" / "qwen2_5_vl.json").exists()


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


def test_readme_shows_the_table_of_methods():
    ours = {name for name in vtc.list_methods() if method_class(name).__module__.startswith("vtc.")}
    lines = CliRunner().invoke(app, ["methods", "--markdown"]).stdout.splitlines()
    table = [line for line in lines if (name := re.match(r"\| \[`(.+?)`]", line)) is None or name[1] in ours]
    assert len(table) == len(ours) + 2  # other tests register methods of their own
    assert "\n".join(table) in README, "paste the output of `vtc methods --markdown` into README.md"


def noxfile(name: str):
    """A constant of noxfile.py, which cannot be imported: nox is not among the test's packages."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )


def locked(path: Path) -> dict[str, list[Requirement]]:
    """The lines of a lock, by package: several where Pythons or platforms differ."""
    found: dict[str, list[Requirement]] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(requirement.name, []).append(requirement)
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_one_version_of_each_package(path):
    """That none is missing, `.ci/locked.py` asks of every environment that nox makes."""
    for name, pins in locked(path).items():
        for pin in pins:
            assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is not pinned"
            assert not pin.extras, f"{pin}: pip takes no extras in constraints"
        for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
            here = {"python_version": python, "python_full_version": f"{python}.0"}
            assert sum(pin.marker is None or pin.marker.evaluate(here) for pin in pins) <= 1, (name, python)


def test_each_tested_transformers_has_a_lock_and_pyproject_has_the_ends():
    tested = noxfile("TRANSFORMERS")
    assert list(tested) == sorted(tested, key=Version)
    for release in tested:
        pins = locked(ROOT / "requirements" / f"transformers-{release}.txt")
        assert str(pins["transformers"][-1].specifier).startswith(f"=={release}.")
    required = map(Requirement, PROJECT["project"]["dependencies"])
    supported = next(r.specifier for r in required if r.name == "transformers")
    major, minor = map(int, tested[-1].split("."))
    assert supported == SpecifierSet(f">={tested[0]},<{major}.{minor + 1}")
    for path in LOCKS:  # those of lmms-eval and vLLM, too
        for pin in locked(path).get("transformers", []):
            assert next(iter(pin.specifier)).version in supported, path


@pytest.mark.parametrize("name", ["ONLY_NEWEST", "ONLY_ENDS"])
def test_the_tests_that_a_session_leaves_out_exist(name):
    """And none of them is among the engine's."""
    for pattern in noxfile(name):
        files = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob(pattern)}
        assert files, pattern
        assert not {file.parts[0] for file in files} & {"engine", "models", "signals"}
        assert not any(file.stem == "test_methods_matrix" for file in files)


def test_locks_build_with_pyprojects_setuptools():
    for release in noxfile("TRANSFORMERS"):
        pins = locked(ROOT / "requirements" / f"transformers-{release}.txt")
        assert [str(pin) for pin in pins["setuptools"]] == PROJECT["build-system"]["requires"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/reproduce/README.md"])
def test_commands_name_locks_that_exist(page):
    named = re.findall(r" -[cr] (\S+\.txt)", (ROOT / page).read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_page_of_locks_lists_them():
    named = re.findall(r"`([\w.-]+\.txt)`", (ROOT / "requirements" / "README.md").read_text())
    assert set(named) == {path.name for path in LOCKS}


def test_the_demo_is_installed_with_the_newest_transformers():
    command = next(line for snippet in snippets("bash") for line in snippet.splitlines() if line.endswith("vtc demo"))
    assert f"-c requirements/transformers-{noxfile('TRANSFORMERS')[-1]}.txt" in command


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


# ---------------------------------------------------------------------------------------------------- how vtc is built


def imports(root: Path) -> dict[str, set[str]]:
    """What each module of vtc imports of vtc, wherever in it: on top, in functions, for type checkers alone.

    Whoever imports a module of another package imports that package too, but for ``vtc`` itself, which gathers the
    public names of all.
    """
    files = {}
    for path in (root / "vtc").rglob("*.py"):
        files[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in files.items():
        found = set()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                named = [f"{source}.{alias.name}" for alias in node.names]
                found |= {each if each in files else source for each in named}
        for module in list(found):
            parents = [module.rsplit(".", up)[0] for up in range(1, module.count("."))]
            found |= {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}
        graph[name] = (found & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that all come back to each other."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - found
            found |= new
            ahead += new
        return found

    reach = {name: reached(name) for name in graph}
    returning = [name for name in graph if name in reach[name]]
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in returning}
    return sorted(map(set, groups), key=min)


def test_no_imports_go_in_a_circle():
    assert circles(imports(ROOT)) == []


@pytest.mark.parametrize(
    "back",
    [
        "from vtc.a import b",
        "from vtc.a.b import name",
        "import vtc.a.b",
        "from .a import b",
        "def late():\n    from vtc.a import b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vtc.a.b import name",
        "from vtc.a import name",  # through the package, which imports the module
        "from vtc.a.d import name",  # likewise
    ],
)
def test_a_circle_would_be_found(tmp_path, back):
    (tmp_path / "vtc" / "a").mkdir(parents=True)
    files = {"__init__": "from vtc.a import b", "a/__init__": "from vtc.a.b import name", "a/d": "", "c": ""}
    files["a/b"] = "from vtc.c import name"
    for name, text in files.items():
        (tmp_path / "vtc" / f"{name}.py").write_text(text)
    assert circles(imports(tmp_path)) == []
    (tmp_path / "vtc" / "c.py").write_text(back)
    (found,) = circles(imports(tmp_path))
    assert {"vtc.a.b", "vtc.c"} <= found <= {"vtc.a", "vtc.a.b", "vtc.c"}


def test_files_are_short():
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in (ROOT / "vtc").rglob("*.py")}
    assert {name for name, length in lengths.items() if length > 350} == LONG
