"""The distributions as a package index would get them: checked, and installed where nothing else is.

`nox -s release` runs this without the conftest of other tests, whose packages are not here.
"""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if not all(map(importlib.util.find_spec, ("build", "twine"))):
    pytest.skip("build and twine are not installed: `nox -s release` runs these", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "transformers-5.24.txt"
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "vtc" / "__init__.py").read_text(), flags=re.M)[1]
"""Read, since vtc is not installed here."""
EXAMPLE = """
import pathlib, torch, transformers, vtc
here = pathlib.Path(vtc.__file__).parents[1]
assert vtc.__version__ == {version!r} and not here.is_relative_to({root!r}), here
model = transformers.AutoModelForImageTextToText.from_pretrained(here / "vtc_tinyvlm" / "checkpoint")
ids = torch.tensor([[model.config.image_token_id] * 144 + [5, 6]])
with vtc.patch(model, "divprune", keep=0.25) as pruned:
    model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 96, 96))
print(len(pruned.last_keep[0][0]), "tokens")
"""


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The sdist, of the files that git knows, and the wheel that is built from it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "build", "--no-isolation", "--outdir", str(out), str(tree))
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def run(*arguments: str, python: str = sys.executable, cwd: Path | None = None) -> str:
    done = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_index_would_take_them(distributions):
    names = {kind: path.name for kind, path in distributions.items()}
    assert names["sdist"] == f"visual_token_compression-{VERSION}.tar.gz"
    assert names["wheel"] == f"visual_token_compression-{VERSION}-py3-none-any.whl"
    assert run("-m", "twine", "check", "--strict", *map(str, distributions.values())).count("PASSED") == 2


def test_licence_and_notice_are_in_both(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        wheel = {name.partition(".dist-info/licenses/")[2] for name in archive.namelist()} - {""}
    assert wheel == {"LICENSE", "NOTICE"}
    assert sdist >= wheel | {"README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml"}
    assert not {name for name in sdist if name.startswith(("tests/", ".ci/"))}


def test_the_sdist_works_where_nothing_else_is_installed(distributions, tmp_path):
    python = environment(tmp_path)
    install(python, str(distributions["sdist"]))
    assert example(python, tmp_path) == "36 tokens\n"


def test_so_does_the_wheel_and_all_brings_what_the_demo_needs(distributions, tmp_path):
    python = environment(tmp_path)
    install(python, str(distributions["wheel"]))
    assert example(python, tmp_path) == "36 tokens\n"
    install(python, f"{distributions['wheel']}[all]")
    command = str(Path(python).with_name("vtc"))
    assert run("--version", python=command, cwd=tmp_path) == f"vtc {VERSION}\n"
    assert "kept tokens: vtc-demo.png" in run("demo", "--questions", "6", python=command, cwd=tmp_path)
    assert (tmp_path / "vtc-demo.png").stat().st_size > 1000


def environment(folder: Path) -> str:
    """The interpreter of a new one, with nothing in it."""
    run("-m", "venv", "--without-pip", str(folder / "venv"))
    return str(folder / "venv" / "bin" / "python")


def install(python: str, requirement: str) -> None:
    """With what it requires, from the lock and no other version."""
    command = ["uv", "pip", "install", "-q", "--python", python, "-c", str(LOCK), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def example(python: str, folder: Path) -> str:
    return run("-c", EXAMPLE.format(version=VERSION, root=str(ROOT)), python=python, cwd=folder)
