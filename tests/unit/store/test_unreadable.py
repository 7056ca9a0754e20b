"""The keys of unreadable records are listed for as long as the records stay unreadable, and no longer."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from portward.cli import status_text
from portward.daemon import status as daemon_status
from portward.errors import StoreError
from portward.ops import check
from portward.store.backends import open_store
from portward.store.codec import key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.unreadable import KNOWN, unreadable
from portward.store.values import NoStoreError, Put
from portward.table.follower import Follower
from portward.table.writer import Writer
from unit.store.samples import ALL, FABRIKAM, GRANT, MACHINE, NOON, PREFIX, put, write
from unit.table.test_table import AZURE, ENFORCE

HUGE = f'{{"subscription":"{FABRIKAM.id}","state":"requested","details":{{"volume":{2**64}}}}}'
BAD = (Put(key_of(GRANT), HUGE), Put(key_of(MACHINE), "\0"), Put(key_of(PREFIX), "{}"))


def test_the_store_names_all_that_cannot_be_read(store: SqliteStore) -> None:
    write(store, *map(put, ALL))
    assert list(unreadable(store)) == []
    write(store, *BAD)
    found = [str(error) for error in unreadable(store)]
    assert len(found) == len(BAD)
    assert any(line.startswith(f"{key_of(GRANT)}: details.volume: expected a whole number") for line in found)


def test_a_follower_knows_which_are_like_that_now(store: SqliteStore, tmp_path: Path) -> None:
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        follower = Follower(store, writer)
        write(store, *map(put, ALL))
        follower.step(NOON)
        assert follower.unreadable.now == {}
        write(store, *BAD)
        follower.step(NOON)
        assert follower.unreadable.now.keys() == {one.key for one in BAD}
        write(store, put(GRANT))
        follower.step(NOON)
        assert follower.unreadable.now.keys() == {key_of(MACHINE), key_of(PREFIX)}, "one was put right"
        write(store, Put(key_of(MACHINE), None))
        follower.step(NOON)
        assert follower.unreadable.now.keys() == {key_of(PREFIX)}, "one was taken out"
        assert follower.refused == len(BAD), "what was counted stays"


def test_a_fresh_reading_of_everything_finds_them_again(store: SqliteStore, tmp_path: Path) -> None:
    write(store, *map(put, ALL))
    write(store, *BAD)
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        follower = Follower(store, writer, unreadable={"attachments/vni1/10.0.0.1": "gone since"})
        follower.step(NOON)
        assert follower.unreadable.now.keys() == {one.key for one in BAD}
        # Without an earlier record, the sources of unreadable records are denied. Other records are not affected.
        assert writer.reader().counts() == (0, 2)


def test_check_lists_them_and_says_what_to_do(store: SqliteStore, path: Path) -> None:
    write(store, *map(put, ALL))
    url = f"sqlite:{path}"
    assert list(check._store(url)) == [f"store {url}: revision 1"]
    write(store, *BAD)
    lines = check._store(url)
    printed = [next(lines) for _ in range(1 + len(BAD))]
    assert printed[0] == f"store {url}: revision 2"
    assert all(line.startswith("  ") for line in printed[1:])
    with pytest.raises(StoreError, match=r"^3 records of the store cannot be read: .* `portward apply`"):
        next(lines)


def test_more_than_are_known_are_not_said_to_be_all(store: SqliteStore, tmp_path: Path) -> None:
    write(
        store, *(Put(f"attachments/vni1/10.0.{number >> 8}.{number & 255}", "{}") for number in range(KNOWN + 1))
    )
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        follower = Follower(store, writer)
        follower.step(NOON)
        assert follower.refused == KNOWN + 1
        found = daemon_status._unreadable(list(follower.unreadable.now.values()))
    assert next(status_text.unreadable(found)).startswith(
        "records   AT LEAST 1000 RECORDS OF THE STORE CANNOT BE READ"
    )
    assert next(status_text.unreadable(daemon_status._unreadable(["one"]))).startswith("records   1 RECORD OF")


def test_status_names_a_store_that_is_gone_once_and_says_what_stays_in_force(path: Path) -> None:
    url = f"sqlite:{path}"
    with pytest.raises(NoStoreError) as gone:
        open_store(url)
    status = {"store": url, "store_error": str(gone.value)}
    assert status["store"] + status_text.store(status) == f"{gone.value}; the last known policy stays in force"
