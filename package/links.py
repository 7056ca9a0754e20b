"""Checks the built site: every link leads somewhere, and no page loads anything from outside.

    python -m package.links build/site

`mkdocs --strict` checks links between pages, from their sources. This reads what a browser gets, so it also finds
anchors that only the theme makes. It checks the links from files beside `docs/` into it, too. Links to outside
addresses are left alone: a reader may follow them, and a build asks no other host.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

ROOT: Final = Path(__file__).resolve().parents[1]
# Markdown files beside docs/, whose links into it a reader follows on a code host or on a disk.
BESIDE: Final = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

# The attributes whose targets a browser fetches when it opens a page: element → attribute. `link` counts by its
# `rel`, see _LOADED_RELS.
_LOADS: Final = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "link": "href"}
_LOADED_RELS: Final = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest"}
_CSS_URL: Final = re.compile(r"(?:url\(|@import )\s*['\"]?((?:https?:)?//[^'\")\s]+)")
_MARKDOWN_LINK: Final = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"(?ms)^(```|~~~).*?^\1")


class Page(HTMLParser):
    """The ids of one built page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for each element."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        target = values.get(_LOADS.get(tag, ""), "")
        if target and (tag != "link" or _LOADED_RELS & set(values.get("rel", "").split())):
            self.loads.append(target)
        self.loads += _CSS_URL.findall(values.get("style", ""))


def problems(site: Path, root: Path = ROOT) -> Iterator[str]:
    """The problems of the site in the folder `site`, and of links into `docs/` from files of `root`."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: there is no page"
    for path, page in pages.items():
        # The page for unknown addresses names everything from the root of a server, which is not known here.
        if path.name != "404.html":
            yield from _links(site, pages, path, page)
        for target in page.loads:
            if urlsplit(target).netloc:
                yield f"{path.relative_to(site)}: loads {target} from outside"
    for path in sorted(site.rglob("*.css")):
        for target in _CSS_URL.findall(path.read_text()):
            yield f"{path.relative_to(site)}: loads {target} from outside"
    for name in BESIDE:
        if (root / name).exists():
            yield from _beside(site, pages, root / name)


def _links(site: Path, pages: dict[Path, Page], path: Path, page: Page) -> Iterator[str]:
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.is_relative_to(site) or not target.exists():
            yield f"{path.relative_to(site)}: {link} leads nowhere"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            yield f"{path.relative_to(site)}: {link} leads to a page without this anchor"


def _beside(site: Path, pages: dict[Path, Page], path: Path) -> Iterator[str]:
    """Links of a Markdown file outside the site: to files of the checkout, and to anchors of pages in it."""
    for link in _MARKDOWN_LINK.findall(_FENCE.sub("", path.read_text())):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        target = (path.parent / unquote(parts.path)).resolve()
        if not target.exists():
            yield f"{path.name}: {link} leads nowhere"
            continue
        docs = path.parent / "docs"
        if parts.fragment and target.is_relative_to(docs):
            page = pages.get(site / target.relative_to(docs).with_suffix(".html"))
            if page is None or parts.fragment not in page.ids:
                yield f"{path.name}: {link} leads to a page without this anchor"


def main() -> None:
    """The command line."""
    site = Path(sys.argv[1]).resolve()
    found = list(problems(site))
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        sys.exit(f"{len(found)} wrong links")
    print(f"every link of {len(list(site.rglob('*.html')))} pages leads somewhere, nothing is loaded from outside")


if __name__ == "__main__":
    main()
