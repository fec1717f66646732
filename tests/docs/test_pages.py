"""What the pages say, tried out: blocks of Python run, and `vtc` commands are such that the command line takes them."""

import contextlib
import importlib.util
import re
import shlex
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
import typer

import vtc
import vtc_tinyvlm
from vtc.cli import app

if importlib.util.find_spec("sybil") is None:
    pytest.skip("sybil is not installed: `nox -s docs` runs these", allow_module_level=True)

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "integrations/**/*.md", "requirements/*.md")
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for pattern in PATTERNS for path in ROOT.glob(pattern)}
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.S | re.M)


def pages_with(language: str) -> list[str]:
    return sorted(name for name, text in TEXTS.items() if language in dict(BLOCKS.findall(text)))


READ_OTHERWISE = {
    "a line of text as a heading": r"^#+[^# \n]",
    "a list as text": r"^(?![-*+#|<>\s]|\d+\. ).+\n(?:[-*+]|\d+\.) ",
    "a table inside a list as text": r"^ {1,3}\|",
}
"""What MkDocs takes for something else than GitHub does."""


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_a_page_reads_the_same_on_the_site(page):
    prose = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.S | re.M)
    assert {what for what, wrong in READ_OTHERWISE.items() if re.search(wrong, prose, flags=re.M)} == set()


def run(page: Path) -> None:
    """All blocks of a page, one after the other, with what a reader has at hand: a model, a processor and inputs.

    But for a block behind `<!--- skip: next "reason" --->`, which needs a server, or what is not installed here.
    """
    model, processor = vtc_tinyvlm.load()
    question = vtc_tinyvlm.evaluation_questions(1)[0]
    inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
    document = Sybil([PythonCodeBlockParser(), SkipParser()], encoding="utf-8").parse(page)
    document.namespace.update(vtc=vtc, model=model, processor=processor, question=question, inputs=inputs)
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


@pytest.mark.parametrize("page", pages_with("python"))
def test_blocks_of_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / page)


def test_a_block_that_fails_is_heard(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nkept = vtc.select('grid', inputs['pixel_values'].flatten(2)[0].T, keep=3)\n```\n")
    run(page)
    page.write_text(page.read_text() + "\ntext\n\n```python\nassert len(kept.index) == 4\n```\n")
    with pytest.raises(AssertionError):
        run(page)


def test_one_that_is_left_out_is_left_out_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('<!--- skip: next "it needs a server" --->\n\n```python\nassert False\n```\n')
    run(page)
    page.write_text(page.read_text() + "\n```python\nassert False\n```\n")
    with pytest.raises(AssertionError):
        run(page)


def test_what_is_left_out_has_a_reason():
    directives = [each for text in TEXTS.values() for each in re.findall(r"^<!--+ *skip:.*", text, flags=re.M)]
    assert [each for each in directives if not re.fullmatch(r'<!--- skip: next ".{10,}" --->', each)] == []


def commands(text: str) -> list[list[str]]:
    """The words behind `vtc` of every such command in blocks of bash, also behind `&&`."""
    lines = [line for language, block in BLOCKS.findall(text) if language == "bash" for line in joined(block)]
    parts = [part.split() for line in lines for part in shlex.join(shlex.split(line, comments=True)).split("'&&'")]
    return [shlex.split(" ".join(words))[1:] for words in parts if words and Path(words[0]).name == "vtc"]


def joined(block: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", block).splitlines()


def parse(words: list[str]) -> None:
    """As the command line would, without running anything.

    Raises:
        KeyError: there is no such command.
        SystemExit: it does not take these arguments.
    """
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    try:
        command.make_context(command.name, words)
    except Exception as error:  # typer may bring a click of its own, whose classes nobody else has
        sys.exit(f"{command.name} {words}: {getattr(error, 'format_message', error.__repr__)()}")


@pytest.mark.parametrize("page", sorted(name for name, text in TEXTS.items() if commands(text)))
def test_commands_of_vtc_are_what_the_command_line_takes(page):
    for words in commands(TEXTS[page]):
        parse(words)


@pytest.mark.parametrize("words", ["estimate tinyvlm --kep 0.5", "estimat tinyvlm", "profile --batch"])
def test_another_command_would_be_refused(words):
    with pytest.raises((KeyError, SystemExit)):
        parse(words.split())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="there.html#part">', ""),
        ('<a href="https://elsewhere.org">', ""),
        ('<a href="folder/">', ""),
        ('<a href="gone.html">', "page.html: gone.html is not there"),
        ('<a href="there.html#gone">', "page.html: there.html#gone has no such anchor"),
        ('<a href="#gone">', "page.html: #gone has no such anchor"),
        ('<img src="gone.png">', "page.html: gone.png is not there"),
        ('<script src="https://cdn.org/a.js"></script>', "page.html: https://cdn.org/a.js is loaded from elsewhere"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(tmp_path, body, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").touch()
    (tmp_path / "there.html").write_text('<h2 id="part">')
    (tmp_path / "page.html").write_text(body)
    command = [sys.executable, str(ROOT / "docs" / "site" / "links.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (int(bool(said)), said)
