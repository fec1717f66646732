"""`python docs/site/links.py FOLDER`: does every link inside a built site lead to something? Ends with an error if not.

`mkdocs build --strict` checks the links that pages write; this checks those of docstrings and of the theme too, with
their anchors, and that no page loads anything from elsewhere. Links to other sites are not followed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Links(HTMLParser):
    """What an HTML page links to, and what in it can be linked to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember its links and anchors."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
                if name == "src" or ("rel", "stylesheet") in attrs:
                    self.loaded.add(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)


def broken(site: Path) -> Iterator[str]:
    """One line for each that is wrong; the page of errors is left out, whose links are those of a server."""
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if path != site / "404.html"}
    for page, found in sorted(pages.items()):
        for link in sorted(found.links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in found.loaded and url.scheme != "data":
                    yield f"{page.relative_to(site)}: {link} is loaded from elsewhere"
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(url.fragment)
            if not target.is_file():
                yield f"{page.relative_to(site)}: {link} is not there"
            elif anchor and target in pages and anchor not in pages[target].anchors:
                yield f"{page.relative_to(site)}: {link} has no such anchor"


if __name__ == "__main__":
    sys.exit("\n".join(broken(Path(sys.argv[1]).resolve())) or None)
