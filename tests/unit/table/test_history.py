"""The hashes of a store's log identify its history. The table follows another history, whatever its revision
numbers."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from portward.errors import StoreError
from portward.model import Exemption, ExemptionState, Reason, Standing
from portward.store.confirmation import confirmation
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.follower import Follower
from portward.table.history import held_history
from portward.table.writer import Writer
from unit.store.samples import opened, put, write
from unit.store.test_chain import format_1
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, reason, subscription

CUSTOMER = subscription(1, "pay-as-you-go", payment_history=True)
MACHINE = attachment("10.0.0.1", 1, started=NOW - timedelta(hours=1))
GRANT = Exemption(
    subscription=UUID(int=1),
    state=ExemptionState.GRANTED,
    requested=NOW - timedelta(days=2),
    decided=NOW - timedelta(days=1),
)
REVOKED = msgspec.structs.replace(GRANT, state=ExemptionState.REVOKED, decided=NOW, reason="spam")


class Gateway:
    """A table that follows the store in `folder`, and can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "portward.db"
        self._table = folder / "table"
        if not self.path.exists():
            opened(self.path).close()
        self.start()
        self.writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)

    def start(self) -> None:
        """Opens store and table, as an agent that starts does."""
        self.store = SqliteStore(self.path)
        self.writer = Writer(self._table, AZURE, ENFORCE, max_flip_share=0.1)
        self.follower = Follower(self.store, self.writer)

    def stop(self) -> None:
        """Closes store and table."""
        self.store.close()
        self.writer.close()

    def follow(self) -> None:
        """Steps until nothing is left to do. Opens the store again if another file has replaced it."""
        for _ in range(20):
            try:
                if self.follower.step(NOW) is None and (self.follower.in_step or self.follower.held):
                    return
            except StoreError:
                self.store.close()
                self.store = SqliteStore(self.path)
                self.follower.reopened(self.store)
        raise AssertionError("it does not come to an end")

    def reason(self) -> Reason:
        """The reason that a worker finds for the machine."""
        return reason(self.writer, "10.0.0.1")

    def revision(self) -> int:
        """The revision that the table has loaded."""
        head = self.writer.head()
        assert head is not None
        return head.revision


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that follows a store with a customer who may not send. The backup has this state, revision 1."""
    found = Gateway(tmp_path)
    write(found.store, put(CUSTOMER), put(MACHINE))
    backup(found.path, tmp_path / "backup.db")
    found.follow()
    yield found
    found.stop()


def backup(source: Path, target: Path) -> None:
    """Copies a store like `sqlite3 SOURCE ".backup TARGET"`, or `sqlite3 TARGET ".restore SOURCE"`."""
    with closing(sqlite3.connect(source)) as have, closing(sqlite3.connect(target)) as into:
        have.backup(into)


def confirmed_here(gateway: Gateway, revision: int) -> Put:
    """The confirmation that `portward apply --confirm` writes on this gateway as this revision."""
    head = gateway.writer.head()
    assert head is not None
    return confirmation(revision, hold=held_history(head))


def in_place(gateway: Gateway, source: Path) -> None:
    """Restores by `.restore`, so that SQLite writes into the open database."""
    backup(source, gateway.path)


def another_file(gateway: Gateway, source: Path) -> None:
    """Restores by replacing the store's file."""
    for name in ("portward.db-wal", "portward.db-shm"):
        gateway.path.with_name(name).unlink(missing_ok=True)
    fresh = source.with_suffix(".copy")
    shutil.copy(source, fresh)
    fresh.replace(gateway.path)


def vacuumed(gateway: Gateway, source: Path) -> None:
    """Restores what `VACUUM INTO` wrote."""
    target = source.with_name("vacuumed.db")
    with closing(sqlite3.connect(source)) as connection:
        connection.execute("VACUUM INTO ?", (str(target),))
    another_file(gateway, target)


WAYS = [in_place, another_file, vacuumed]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("later", [0, 1, 2, 5])
def test_a_restored_backup_is_followed_whatever_was_written_to_it(
    gateway: Gateway,
    tmp_path: Path,
    way: Callable[[Gateway, Path], None],
    running: bool,
    later: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The table has loaded revision 3, with a grant. The restored store is at revision 1 to 6, without one."""
    write(gateway.store, put(msgspec.structs.replace(CUSTOMER, name="before")))
    write(gateway.store, put(GRANT))
    gateway.follow()
    assert gateway.reason() is Reason.ALLOWED_EXEMPT
    if not running:
        gateway.stop()
    way(gateway, tmp_path / "backup.db")
    with closing(SqliteStore(gateway.path)) as store:
        for number in range(later):
            write(store, put(msgspec.structs.replace(CUSTOMER, name=f"after {number}")))
    if not running:
        gateway.start()
    with caplog.at_level(logging.WARNING):
        gateway.follow()
    assert gateway.reason() is Reason.DENIED_NOT_EXEMPT
    assert gateway.revision() == 1 + later
    assert gateway.follower.in_step
    assert gateway.follower.histories == 1
    assert "the store has another history than the policy table, which was read at revision 3" in caplog.text
    write(gateway.store, put(GRANT))
    gateway.follow()
    assert gateway.reason() is Reason.ALLOWED_EXEMPT
    assert gateway.follower.histories == 1


def test_a_revocation_with_the_number_of_a_lost_revision_is_enforced(gateway: Gateway, tmp_path: Path) -> None:
    write(gateway.store, put(GRANT))
    backup(gateway.path, tmp_path / "backup.db")
    write(gateway.store, put(msgspec.structs.replace(CUSTOMER, name="lost")))
    gateway.follow()
    in_place(gateway, tmp_path / "backup.db")
    with closing(SqliteStore(gateway.path)) as store:
        write(store, put(REVOKED))
        assert store.revision() == gateway.revision() == 3
    gateway.follow()
    assert gateway.reason() is Reason.DENIED_REVOKED


def test_a_cloned_store_that_went_its_own_way_is_followed(gateway: Gateway, tmp_path: Path) -> None:
    clone = tmp_path / "clone.db"
    backup(gateway.path, clone)
    write(gateway.store, put(GRANT))
    gateway.follow()
    assert gateway.reason().allows
    with closing(SqliteStore(clone)) as store:
        write(store, put(msgspec.structs.replace(CUSTOMER, name="clone")))
        gateway.follower.reopened(store)
        gateway.follower.step(NOW)
        assert not gateway.reason().allows
        gateway.follower.reopened(gateway.store)
        gateway.follower.step(NOW)
        assert gateway.reason().allows
    assert gateway.follower.histories == 2


def test_what_stays_in_step_reads_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.store, "read_all", None)
    monkeypatch.setattr(gateway.store, "changes", None)
    assert gateway.follower.step(NOW) is None
    assert gateway.follower.in_step


def test_a_restored_backup_that_flips_too_many_is_held_and_says_so(
    gateway: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(gateway.store, *(put(subscription(number)) for number in range(2, 40)))
    backup(gateway.path, tmp_path / "backup.db")
    write(gateway.store, *(put(attachment(f"10.0.1.{number}", number)) for number in range(2, 40)))
    gateway.follow()
    in_place(gateway, tmp_path / "backup.db")
    with closing(SqliteStore(gateway.path)) as store:
        write(store, put(msgspec.structs.replace(CUSTOMER, name="restored")))
    gateway.follow()
    held = gateway.follower.held
    assert held is not None
    assert (held.revision, held.whole, held.flips.flipped) == (3, True, 38)
    assert "all that the store holds up to revision 3 would flip the verdict of 38" in caplog.text
    assert not gateway.follower.in_step
    write(gateway.store, confirmed_here(gateway, 4))
    gateway.follow()
    assert gateway.follower.held is None
    assert reason(gateway.writer, "10.0.1.7") is Reason.DENIED_UNKNOWN_SOURCE


def test_a_confirmation_in_the_backup_does_not_confirm_the_restored_history(
    gateway: Gateway, tmp_path: Path
) -> None:
    write(gateway.store, *(put(subscription(number)) for number in range(2, 40)), confirmation(2))
    backup(gateway.path, tmp_path / "backup.db")
    write(gateway.store, *(put(attachment(f"10.0.1.{number}", number)) for number in range(2, 40)))
    gateway.follow()
    in_place(gateway, tmp_path / "backup.db")
    gateway.follow()
    assert gateway.follower.held is not None
    assert reason(gateway.writer, "10.0.1.7").allows
    write(gateway.store, confirmation(3))
    gateway.follow()
    assert gateway.follower.held is not None, "it does not name what is held"
    write(gateway.store, confirmed_here(gateway, 4))
    write(gateway.store, put(msgspec.structs.replace(CUSTOMER, name="written right after it")))
    gateway.follow()
    assert gateway.follower.held is None
    assert gateway.revision() == 5


def test_denials_of_a_lost_history_are_taken_back(gateway: Gateway, tmp_path: Path) -> None:
    """A held change and a revocation behind it were both written after the backup."""
    write(gateway.store, put(GRANT))
    write(
        gateway.store, *(put(one) for n in range(2, 40) for one in (subscription(n), attachment(f"10.0.1.{n}", n)))
    )
    gateway.follow()
    backup(gateway.path, tmp_path / "backup.db")
    lost = [msgspec.structs.replace(subscription(n), standing=Standing.DISABLED) for n in range(2, 40)]
    write(gateway.store, *map(put, lost))
    write(gateway.store, put(REVOKED))
    gateway.follow()
    assert gateway.reason() is Reason.DENIED_REVOKED
    in_place(gateway, tmp_path / "backup.db")
    gateway.follow()
    assert gateway.follower.held is None
    assert gateway.reason() is Reason.ALLOWED_EXEMPT
    assert gateway.follower.in_step


def test_a_log_without_hashes_is_told_by_when_and_by_whom_it_was_written(tmp_path: Path) -> None:
    """Two copies of a store of format 1 differ but have the same revision number. The store is also sealed
    later."""
    path, backup_ = tmp_path / "portward.db", tmp_path / "backup.db"
    format_1(path)
    shutil.copy(path, backup_)
    for one, actor in ((path, "ada"), (backup_, "grace")):
        with closing(sqlite3.connect(one)) as connection, connection:
            connection.execute("INSERT INTO revision VALUES (6, '2026-06-01T12:00:00+00:00', ?)", (actor,))
    gateway = Gateway(tmp_path)
    gateway.follow()
    assert gateway.revision() == 6
    assert gateway.store.hash_of(7) is None
    another_file(gateway, backup_)
    gateway.follow()
    assert (gateway.revision(), gateway.follower.histories) == (6, 1)
    opened(path).close()
    gateway.follow()
    assert (gateway.revision(), gateway.follower.histories) == (6, 2)
    gateway.stop()


def test_another_version_of_the_table_is_known_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(tmp_path)
    write(gateway.store, put(CUSTOMER))
    gateway.follow()
    assert not gateway.writer.of_other_format
    monkeypatch.setattr("portward.table.layout.FORMAT", 99)
    assert gateway.writer.of_other_format
    gateway.stop()
