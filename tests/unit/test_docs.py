"""What a document names exists: files, folders, modules of the package and what is in them, targets of make."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "agent/portward"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What begins a path of the checkout; a path like daemon/core.py is one of the package.
FOLDERS = ("agent", "docs", "package", "rules", "systemd", "tests")
PATH = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.(?:py|nft|md))\b")
FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})(?:/[\w.-]+)*/?)(?![\w/*.-])")
# portward.toml and its like are files.
MODULE = re.compile(
    r"(?:\bportward|(?<=-m )(?:tests|package))(?:\.(?!(?:toml|db|conf|service|head|nft)\b)[A-Za-z_]\w*)+"
)


def text(document: Path) -> str:
    """The text without links to outside addresses."""
    return re.sub(r"https?://\S+", "", document.read_text())


def documents(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """Each document with each thing of a kind that it names."""
    return sorted(
        {(str(one.relative_to(ROOT)), found[0]) for one in DOCUMENTS for found in pattern.finditer(text(one))}
    )


@pytest.mark.parametrize(("document", "path"), documents(PATH))
def test_a_file_that_is_named_exists(document: str, path: str) -> None:
    places = [ROOT / path, PACKAGE / path, (ROOT / document).parent / path]
    if "/" not in path:
        assert [found for top in FOLDERS for found in (ROOT / top).rglob(path)] or (ROOT / path).exists()
    else:
        assert any(place.exists() for place in places), f"{document} names {path}, which is not there"


@pytest.mark.parametrize(("document", "folder"), documents(FOLDER))
def test_a_folder_that_is_named_exists(document: str, folder: str) -> None:
    assert (ROOT / folder).exists() or (PACKAGE / folder).exists(), f"{document} names {folder}"


def test_a_document_that_the_code_names_exists() -> None:
    sources = [path for top in ("agent", "package", "tests") for path in (ROOT / top).rglob("*.py")]
    named = {
        (str(path.relative_to(ROOT)), found)
        for path in [*sources, ROOT / "Makefile", *(ROOT / "rules").rglob("*.nft")]
        for found in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
        # These make documents of their own.
        if path.name not in ("test_links.py", "test_prose.py")
    }
    assert not [(path, found) for path, found in named if not (ROOT / found).exists()]


@pytest.mark.parametrize(("document", "name"), documents(MODULE))
def test_a_module_that_is_named_exists(document: str, name: str) -> None:
    """`portward.x.y` is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = (PACKAGE.parent if parts[0] == "portward" else ROOT).joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or path.is_dir():
            break
    else:
        pytest.fail(f"{document} names {name}")
    rest = parts[length:]
    if not rest:
        return
    found: object = importlib.import_module(".".join(parts[:length]))
    for attribute in rest:
        found = getattr(found, attribute)


@pytest.mark.parametrize(("document", "target"), documents(re.compile(r"(?<=`make )[a-z][a-z-]*")))
def test_a_target_of_make_that_is_named_exists(document: str, target: str) -> None:
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), f"{document} names make {target}"
