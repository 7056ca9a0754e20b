"""The check of the built site finds links that lead nowhere and pages that load something from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from package.links import problems

GOOD = (
    '<h2 id="here">Here</h2><a href="#here">x</a><a href="sub/b.html#there">y</a><a href="https://a.test/">z</a>'
)


def site(folder: Path, index: str, readme: str = "") -> list[str]:
    """The problems of a site with two pages, beside a README."""
    built = folder / "build/site"
    (built / "sub").mkdir(parents=True)
    (built / "index.html").write_text(index)
    (built / "sub/b.html").write_text('<h2 id="there">There</h2><a href="../index.html">x</a>')
    (folder / "docs/sub").mkdir(parents=True)
    (folder / "docs/sub/b.md").write_text("## There\n")
    (folder / "README.md").write_text(readme)
    return list(problems(built, folder))


def test_links_that_lead_somewhere_are_no_problem(tmp_path: Path) -> None:
    assert site(tmp_path, GOOD, "[a](docs/sub/b.md#there), [b](docs/sub/b.md), [c](https://a.test/)") == []


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="gone.html">x</a>', "index.html: gone.html leads nowhere"),
        ('<a href="#gone">x</a>', "index.html: #gone leads to a page without this anchor"),
        ('<a href="sub/b.html#gone">x</a>', "index.html: sub/b.html#gone leads to a page without this anchor"),
        ('<a href="../../README.md">x</a>', "index.html: ../../README.md leads nowhere"),
        ('<script src="https://a.test/x.js"></script>', "index.html: loads https://a.test/x.js from outside"),
        ('<link rel="stylesheet" href="//a.test/x">', "index.html: loads //a.test/x from outside"),
        ('<img src="http://a.test/x.png">', "index.html: loads http://a.test/x.png from outside"),
        ('<p style="background: url(//a.test/x)">', "index.html: loads //a.test/x from outside"),
    ],
)
def test_a_wrong_link_in_a_page_is_named(tmp_path: Path, html: str, problem: str) -> None:
    assert site(tmp_path, html) == [problem]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](docs/gone.md)", "README.md: docs/gone.md leads nowhere"),
        ("[a](docs/sub/b.md#gone)", "README.md: docs/sub/b.md#gone leads to a page without this anchor"),
    ],
)
def test_a_wrong_link_from_beside_the_documents_is_named(tmp_path: Path, text: str, problem: str) -> None:
    assert site(tmp_path, GOOD, text) == [problem]


def test_a_site_without_a_page_is_a_problem(tmp_path: Path) -> None:
    assert list(problems(tmp_path, tmp_path)) == [f"{tmp_path}: there is no page"]
