"""The counters file holds the counts that were saved last, even if the process died while it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from portward.daemon.counting import Counting
from portward.daemon.countsfile import CountsFile
from portward.dataplane.deletions import Deletions
from portward.dataplane.fake import FakeKernel


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert CountsFile(tmp_path).load() is None


def test_what_was_saved_last_is_loaded(tmp_path: Path) -> None:
    first = CountsFile(tmp_path)
    for content in (b"long " * 100, b"one", b"two"):
        first.save(content)
        assert CountsFile(tmp_path).load() == content
    second = CountsFile(tmp_path)
    second.load()
    second.save(b"three")
    assert CountsFile(tmp_path).load() == b"three"


@pytest.mark.parametrize("cut", [0, 5, 30])
def test_a_process_that_died_while_it_wrote_leaves_what_was_there_before(tmp_path: Path, cut: int) -> None:
    written = CountsFile(tmp_path)
    written.save(b"before")
    written.save(b"and after it")
    newest = max(tmp_path.iterdir(), key=lambda path: path.read_bytes().count(b"after"))
    newest.write_bytes(newest.read_bytes()[:cut])
    assert CountsFile(tmp_path).load() == b"before"


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    CountsFile(tmp_path).save(b"x")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_what_could_not_be_saved_is_saved_later_though_nothing_more_was_counted(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    counting = Counting(folder, FakeKernel().netlink(), cast("Any", None), Deletions(), lambda: 0)
    counting.counts.changed = True
    counting.end()
    assert CountsFile(folder).load() is None
    folder.mkdir()
    counting.end()
    assert CountsFile(folder).load() is not None
