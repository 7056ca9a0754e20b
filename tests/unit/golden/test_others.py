"""Stores, counters and statuses of older versions are read correctly, and those of unknown formats are refused."""

from __future__ import annotations

import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from portward.base.codes import REASON_NUMBER
from portward.cli.status_text import lines as status_lines
from portward.daemon.runtime import age_of, read_status
from portward.errors import PortwardError, StoreError
from portward.ipc.counters import CountersError, WorkerCounters, WorkerEvent
from portward.ipc.mark import PacketOutcome
from portward.model import Reason
from portward.store.codec import decode, key_of
from portward.store.sqlite.store import SqliteStore
from unit.golden import FOLDER, golden, store
from unit.store.samples import CONTOSO, FABRIKAM, GRANT, MACHINE, PREFIX

COUNTERS = golden("counters-1.json")


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_is_read_as_it_was_meant(tmp_path: Path, version: int) -> None:
    store(version, tmp_path / "portward.db")
    with closing(SqliteStore(tmp_path / "portward.db")) as found:
        revision, records = found.read_all()
        assert revision == 5
        expected = {key_of(record): record for record in (CONTOSO, FABRIKAM, MACHINE, PREFIX, GRANT)}
        assert {key: decode(key, body) for key, body in records} == expected
        assert [entry.actor for entry in found.log()] == ["ada", "grace", "ada", "grace", "ada"]
        assert len(list(found.history(key_of(MACHINE)))) == 3


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    store(2, tmp_path / "portward.db")
    with closing(sqlite3.connect(tmp_path / "portward.db")) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreError, match="written by a newer portward"):
        SqliteStore(tmp_path / "portward.db")


def test_the_block_of_counters_has_each_number_where_it_was() -> None:
    block = WorkerCounters.create()
    counters = WorkerCounters(block)
    for reason in map(Reason, COUNTERS["packets"]):
        for outcome in PacketOutcome:
            counters.add(REASON_NUMBER[reason], outcome, packets=REASON_NUMBER[reason] * 100 + outcome, attempts=7)
    for event in WorkerEvent:
        for _ in range(event + 1):
            counters.event(event)
    data = os.pread(block, 1 << 20, 0)
    os.close(block)
    assert data[:16].hex() == COUNTERS["header"]
    assert len(data) == COUNTERS["bytes"]
    for name, places in COUNTERS["packets"].items():
        for outcome_name, place in places.items():
            number = REASON_NUMBER[Reason(name)] * 100 + PacketOutcome[outcome_name]
            assert struct.unpack_from("<Q", data, place) == (number,)
            assert struct.unpack_from("<Q", data, COUNTERS["attempts"][name][outcome_name]) == (7,)
    for name, place in COUNTERS["events"].items():
        assert struct.unpack_from("<Q", data, place) == (WorkerEvent[name] + 1,)


@pytest.mark.parametrize("change", ["an older version's", "a newer version", "another size"])
def test_a_block_of_another_version_is_refused(change: str) -> None:
    """A worker would count the wrong reason in it."""
    block = WorkerCounters.create()
    if change == "an older version's":  # they began with the numbers
        os.pwrite(block, bytes(16), 0)
    elif change == "a newer version":
        os.pwrite(block, b"\x02", 8)
    else:
        os.ftruncate(block, 1 << 16)
    with pytest.raises(CountersError, match="restart the agent"):
        WorkerCounters(block)
    os.close(block)


def test_the_status_of_an_older_agent_can_be_printed(tmp_path: Path) -> None:
    """It has no format number, and no newer keys."""
    (tmp_path / "status.json").write_bytes((FOLDER / "status-1.json").read_bytes())
    found = read_status(tmp_path)
    assert found is not None
    lines = status_lines(found, age_of(found))
    for line in (
        "HELD      revision 8 would flip the verdict of 21 of 40 subscriptions: `portward apply --confirm` lets "
        "it through",
        "portward 0.9.0, process 4711, up 2 h 30 min, mode enforce, preset azure-2020",
        "policy    revision 7, 1000 attachments of 40 subscriptions",
        "store     sqlite:/var/lib/portward/portward.db, in step",
        "queue     nft queue; worker 0 runs (2 restarts)",
        "kernel    caches 30 allow, 9 deny",
        "segment   vni1001: 12 packets to the policy ports",
        "ruleset   put back once: another program had changed it, or the kernel had refused a change",
    ):
        assert line in lines


def test_the_status_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"format": 2, "version": 9}')
    with pytest.raises(
        PortwardError, match=r"is of format 2, and this portward reads format 1: the agent that runs"
    ):
        read_status(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", "{", ""])
def test_what_is_no_status_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
