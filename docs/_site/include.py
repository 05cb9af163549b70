"""Include Markdown files from outside docs/ in the site, so that each text has one source.

A page that holds the line `<!-- include: config/README.md -->` shows that file's text below it. The file's first
heading is dropped, because the page has its own, and its relative links are rewritten to work from the page.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
# Files that have a page of their own in the site
PAGES = {
    "config/README.md": "docs/reference/configuration.md",
    "SECURITY.md": "docs/explanation/trust.md",
    "CHANGELOG.md": "docs/reference/changelog.md",
}


def on_page_markdown(markdown: str, page: "Page", **_: object) -> str:
    """Return the page's text with every include replaced: MkDocs calls this hook for each page."""
    here = PurePosixPath("docs", page.file.src_uri)
    return INCLUDE.sub(lambda found: included(found[1], here), markdown)


def included(source: str, page: PurePosixPath) -> str:
    """Return the text of the file `source` without its first heading, with links that work from `page`.

    Args:
        source: path of the file, relative to the repository.
        page: path of the page that includes it, relative to the repository.
    """
    text = (ROOT / source).read_text(encoding="utf-8").split("\n", 1)[1]

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), link[1]))
        return os.path.relpath(PAGES.get(target, target), os.path.dirname(page))

    return LINK.sub(moved, text)
