"""What is installed, from which locks, and what the README says about it."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from PIL import Image

import vtc
from vtc.methods import method_class

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])


LONG: set[str] = set()
"""Files that are still too long."""


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources so that nothing is left behind in the tree."""
    tree = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
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
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert metadata["Version"] == vtc.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
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


def test_the_version_stands_in_one_place_and_others_have_the_same():
    assert "version" in PROJECT["project"]["dynamic"]
    assert f"\nversion: {vtc.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1] == vtc.__version__


def test_security_says_that_this_version_gets_fixes():
    series = ".".join(vtc.__version__.split(".")[:2])
    assert f"| {series} | yes |" in (ROOT / "SECURITY.md").read_text()


def test_every_extra_is_explained():
    explained = (ROOT / "docs" / "first-minutes.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", explained)) >= EXTRAS


def test_all_brings_whatever_goes_beside_any_transformers():
    """Left out: what is compiled, what pins what others need newer, and what only contributors use."""

    def whole(extra: str) -> set[str]:
        direct = map(Requirement, PROJECT["project"]["optional-dependencies"][extra])
        inner = [r.extras for r in direct if r.name == PROJECT["project"]["name"]]
        return {extra}.union(*(whole(each) for extras in inner for each in extras))

    apart = {"flash-attn", "lmms-eval", "vllm", "test", "docs", "dev"}
    assert whole("all") == EXTRAS - apart


# --------------------------------------------------------------------------------------------- what the README shows


@pytest.fixture(scope="session")
def site():
    """The scripts that make parts of README.md, as modules."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    yield SimpleNamespace(tables=importlib.import_module("tables"), figure=importlib.import_module("figure"))
    sys.path.remove(str(ROOT / "docs" / "site"))


def test_the_tables_of_the_readme_are_up_to_date(site):
    assert README.count("<!-- table: ") == 3
    assert site.tables.filled(README) == README, "run python docs/site/tables.py"
    rows = site.tables.methods().splitlines(), site.tables.models().splitlines()
    ours = {name for name in vtc.list_methods() if method_class(name).__module__.startswith("vtc.")}
    assert [len(table) for table in rows] == [len(ours) + 2, len(vtc.list_models()) + 2]


def test_the_table_of_speed_ups_hides_neither_the_slowest_nor_a_row_that_failed(site, tmp_path, monkeypatch):
    columns = ("model", "method", "keep", "device", "speedup", "realised", "correct")
    rows = [
        (m, name, keep, "cpu: x", 1.5, 0.9, True) for _, m, keep in site.tables.COLUMNS for name in site.tables.ALWAYS
    ]
    rows += [(m, "slow", keep, "cpu: x", 0.8, 0.5, True) for _, m, keep in site.tables.COLUMNS]
    rows += [(m, "wrong", keep, "cpu: x", 9.0, 0.9, False) for _, m, keep in site.tables.COLUMNS]
    rows += [("tinyvlm", "unshown", 0.5, "cpu: x", 1.2, 0.9, True)]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]))
    monkeypatch.setattr(site.tables, "ROWS", file)
    table = site.tables.profile()
    assert "| `slow` | 0.80x, 50 % | 0.80x, 50 % | 0.80x, 50 % |" in table
    assert "wrong" not in table
    assert "unshown" not in table


def test_the_picture_of_the_readme_shows_the_rows_of_today(site):
    shown = json.loads(Image.open(site.figure.FIGURE).text["Description"])
    assert shown == {name: list(pair) for name, pair in site.figure.numbers().items()}, "run python docs/site/figure.py"


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


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/first-minutes.md", "benchmarks/reproduce/README.md"]
)
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
