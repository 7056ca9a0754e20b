"""A table that LMDB cannot read is replaced by an empty one, because a table is only a cache. No other table
is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from portward.base.clock import utc_now
from portward.policy import presets
from portward.table.commits import Answers
from portward.table.database import TableError
from portward.table.writer import Writer


def writer(folder: Path) -> Writer:
    return Writer(folder, presets.load("azure-2020"), Answers(observe=False, reject=False))


def made(folder: Path) -> Path:
    """Makes a table with a policy, and returns its file."""
    found = writer(folder)
    found.replace([], revision=7, store=b"a store".ljust(16), now=utc_now())
    found.close()
    return folder / "data.mdb"


@pytest.mark.parametrize("kept", [0, 2 * 4096])
def test_what_cannot_be_read_is_put_aside(tmp_path: Path, kept: int) -> None:
    file = made(tmp_path)
    damaged = file.read_bytes()[:kept] + os.urandom(file.stat().st_size - kept)
    file.write_bytes(damaged)
    again = writer(tmp_path)
    assert again.head() is None
    again.close()
    assert (tmp_path / "data.mdb.damaged").read_bytes() == damaged


def test_a_whole_table_stays(tmp_path: Path) -> None:
    made(tmp_path)
    again = writer(tmp_path)
    head = again.head()
    again.close()
    assert head is not None
    assert head.revision == 7
    assert not (tmp_path / "data.mdb.damaged").exists()


def test_a_table_that_cannot_be_opened_for_another_reason_stays(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").mkdir()
    with pytest.raises(TableError, match="Is a directory"):
        writer(tmp_path)
    assert (tmp_path / "data.mdb").is_dir()
