"""The copy of the tree in the root folder of another release, and the versions of the packages."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from package import debian, release
from packaging.version import Version

from portward import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout."""
    found = tmp_path / "checkout"
    (found / "agent").mkdir(parents=True)
    for name, text in (("Makefile", "all:\n"), ("agent/a.py", "a\n"), (".gitignore", "*.mo\n/.venv\n")):
        (found / name).write_text(text)
    subprocess.run(["git", "init", "-q", found], check=True)
    subprocess.run(["git", "-C", found, "add", "--all"], check=True)
    monkeypatch.setattr(release, "ROOT", found)
    return found


def names(tree: Path) -> set[str]:
    """All files of a folder."""
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


def test_the_copy_has_what_git_would_commit_and_keeps_what_the_targets_made(
    checkout: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "src"
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "ready").touch()
    release.copy(tree)
    assert names(tree) == {"Makefile", "agent/a.py", ".gitignore"}
    for made in (".venv/ready", "build/vm/a.deb", "agent/a.mo", "agent/stale.py"):
        (tree / made).parent.mkdir(parents=True, exist_ok=True)
        (tree / made).touch()
    (checkout / "agent" / "a.py").unlink()
    (checkout / "agent" / "new.py").write_text("new\n")
    release.copy(tree)
    assert names(tree) == {
        "Makefile", "agent/new.py", ".gitignore", ".venv/ready", "build/vm/a.deb", "agent/a.mo",
    }  # fmt: skip


def test_only_what_has_changed_is_new_for_make(checkout: Path, tmp_path: Path) -> None:
    tree = tmp_path / "src"
    release.copy(tree)
    before = (tree / "Makefile").stat()
    (checkout / "agent" / "a.py").write_text("b\n")
    release.copy(tree)
    after = (tree / "Makefile").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert after.st_mtime_ns == (checkout / "Makefile").stat().st_mtime_ns
    assert (tree / "agent" / "a.py").read_text() == "b\n"


def version(of: str, name: str) -> str:
    """A variable of the Makefile for a release."""
    words = ["make", "--no-print-directory", "-C", str(ROOT), "-f", "-", f"RELEASE={of}", "shown"]
    text = f"include Makefile\nshown:\n\t@echo $({name})\n"
    shown = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def newer(one: str, other: str) -> bool:
    """Whether dpkg takes one version as later than another."""
    return subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False).returncode == 0


def test_a_later_release_of_debian_has_a_later_package_of_the_same_program() -> None:
    versions = [version(name, "DEB_VERSION") for name in debian.RELEASES]
    assert versions[0] == __version__
    for before, after in pairwise(versions):
        assert newer(after, before)
        assert re.match(rf"{re.escape(__version__)}\+", after)
    for name, own in zip(debian.RELEASES, versions, strict=True):
        later = version(name, "NEXT")
        assert newer(later, own)
        # The program of each package has the package's version.
        assert str(Version(own)) == own
        assert str(Version(later)) == later
