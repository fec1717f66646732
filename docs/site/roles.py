"""MkDocs hook: the roles of docstrings (`:func:` and its kin), which Markdown does not know, become links."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj):<code>~?([\w.]+)</code>")


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """To their place in the reference, where they have one."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
