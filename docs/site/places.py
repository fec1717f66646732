"""MkDocs hook: every page stands where its file lies in the repository, so that one link serves both.

MkDocs knows a single folder of pages. Ours are the files of `docs/` and the pages that lie beside what they describe:
the README, the model cards, the benchmarks. Other files of the repository that a page links to, such as CSV rows, are
copied beside it. A link to a module of vtc leads to its page in the reference, which shows the source.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

BESIDE = ("*.md", "benchmarks/**/*.md", "integrations/**/*.md", "requirements/*.md")
"""Pages outside of docs/."""
LINK = re.compile(r"\]\(([^)#\s]+)")
MODULE = re.compile(r"\]\((?:\.\./)*(vtc/[\w/]+)\.py\)")


@event_priority(100)  # before plugins that take notebooks for theirs
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Move the files of docs/ to docs/, and add the others."""
    root = Path(config.config_file_path).parent
    inside = Path(config.docs_dir).relative_to(root).as_posix()
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        files.append(_file(f"{inside}/{file.src_uri}", config))
    for pattern in BESIDE:
        for path in sorted(root.glob(pattern)):
            files.append(_file(path.relative_to(root).as_posix(), config))
    for file in list(files.documentation_pages()):
        folder = Path(file.abs_src_path).parent
        for link in LINK.findall(file.content_string if file.src_uri.endswith(".md") else ""):
            target = (folder / link).resolve()
            if ":" not in link and target.is_file() and target.is_relative_to(root):
                name = target.relative_to(root).as_posix()
                if files.get_file_from_path(name) is None and not MODULE.search(f"]({name})"):
                    files.append(_file(name, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a module of vtc is one to its place in the reference; the front page has no list of pages beside it."""
    if page.file.src_uri == "README.md":
        page.meta["hide"] = ["navigation"]
    return MODULE.sub(lambda match: f"][{match[1].replace('/', '.').removesuffix('.__init__')}]", markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of notebooks to pages, which their plugin leaves as they are."""
    return (
        re.sub(r'href="([^":]+)\.md(?=["#])', r'href="\1.html', html) if page.file.src_uri.endswith(".ipynb") else html
    )


def _file(name: str, config: MkDocsConfig) -> File:
    root = str(Path(config.config_file_path).parent)
    return File(name, root, config.site_dir, config.use_directory_urls)
