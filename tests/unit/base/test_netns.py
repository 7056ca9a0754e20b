"""Named network namespaces, on files of the test in place of /run/netns. `tests/program/test_instances.py` enters
real ones."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from portward.base import netns


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of names."""
    monkeypatch.setattr(netns, "FOLDER", tmp_path)
    return tmp_path


def test_without_the_folder_no_namespace_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "FOLDER", folder / "missing")
    assert netns.names() == []
    assert not netns.is_own("blue")
    assert netns.name_of(os.getpid()) == ""


def test_the_namespace_of_a_name_is_the_one_with_the_same_inode(folder: Path) -> None:
    (folder / "own").symlink_to("/proc/self/ns/net")  # in place of a mount of this file
    (folder / "other").touch()
    assert netns.names() == ["other", "own"]
    assert netns.is_own("own")
    assert not netns.is_own("other")
    assert netns.name_of(os.getpid()) == "own"


def test_a_process_that_has_ended_is_in_no_namespace(folder: Path) -> None:
    (folder / "own").symlink_to("/proc/self/ns/net")
    assert netns.name_of(0) == ""


def test_a_file_that_is_no_namespace_cannot_be_entered(folder: Path) -> None:
    (folder / "left").touch()
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EINVAL))):
        netns.enter("left")
    with pytest.raises(FileNotFoundError):
        netns.enter("missing")
