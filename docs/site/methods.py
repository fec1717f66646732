"""MkDocs hook: the reference of methods has every file of `vtc/methods` that registers one; nobody keeps a list."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PAGE = "docs/api/methods.md"
MARK = "<!-- every method -->"
REGISTERED = re.compile(r"^@register_method\n(?:@.*\n)*class (\w+)", flags=re.M)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the directives where the mark is."""
    if page.file.src_uri != PAGE:
        return markdown
    directives = []
    for file in sorted((Path(config.config_file_path).parent / "vtc" / "methods").glob("*.py")):
        if found := REGISTERED.search(file.read_text()):
            directives += [f"::: vtc.methods.{file.stem}", f"    options: {{show_source: true, members: [{found[1]}]}}"]
    return markdown.replace(MARK, "\n".join(directives))
