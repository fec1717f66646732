"""The notebooks run, each in a kernel of its own; what is committed of their output is small."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("nbclient") is None:
    pytest.skip("nbclient is not installed: `nox -s docs` runs these", allow_module_level=True)

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.docs

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    """Its own assertions are part of it."""
    execute(nbformat.read(path, 4), tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_as_it_stands_and_said_little(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 128_000
    assert [out.text for cell in cells for out in cell.outputs if out.get("name") == "stderr"] == []


def test_a_notebook_that_fails_is_heard(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path)
