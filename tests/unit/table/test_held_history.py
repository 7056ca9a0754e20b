"""A backup is restored while a change is held, and the store then has another history."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from portward.model import Reason, Standing
from portward.store.confirmation import confirmation
from portward.store.values import Put
from portward.table.database import TableError
from portward.table.follower import BulkError, Follower
from portward.table.history import held_history
from portward.table.layout import HEAD, Head
from portward.table.writer import Writer
from unit.store.samples import put, write
from unit.table.test_behind import CUSTOMERS, DAY, MISTAKE, OTHERS, SPAMMER, Gateway, revoked
from unit.table.test_history import backup
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, reason, subscription

# A prefix that may send, and one inside it that may not.
WIDE, INSIDE = attachment("10.0.9.0/24", 41), attachment("10.0.9.0/25", 98)
TAKEN_BACK = [put(subscription(number)) for number in range(1, 41)]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that has loaded revision 1."""
    with closing(Gateway(tmp_path)) as found:
        found.write(*CUSTOMERS, *OTHERS, subscription(41), WIDE, INSIDE)
        yield found


def head_of(gateway: Gateway) -> Head:
    head = gateway.writer.head()
    assert head is not None
    return head


def restore(gateway: Gateway, source: Path) -> None:
    """Restores a backup beside a running agent, like `sqlite3 .restore`."""
    backup(source, gateway.folder / "portward.db")
    gateway.follow()


def confirmed_here(gateway: Gateway) -> Put:
    """The confirmation that `portward apply --confirm` writes on this gateway."""
    return confirmation(gateway.store.revision() + 1, hold=held_history(head_of(gateway)))


def as_loaded_at_once(gateway: Gateway, source: str) -> Reason:
    """The reason for a source in a new table that is loaded from the store."""
    with closing(Writer(gateway.folder / "fresh", AZURE, ENFORCE)) as fresh:
        fresh.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        Follower(gateway.store, fresh).step(NOW)
        return reason(fresh, source)


@pytest.mark.parametrize("restarted", [False, True])
def test_denials_of_a_lost_history_stay_until_everything_is_read_anew(gateway: Gateway, restarted: bool) -> None:
    """The lost revision 3 removed both prefixes, and the table has applied that early. The restored history still
    has the denied prefix inside, but writes only the wide one again. So the table needs a full load to get the
    denied one."""
    gateway.write(*MISTAKE)
    backup(gateway.folder / "portward.db", gateway.folder / "backup.db")
    gateway.write(Put("attachments/vni1/10.0.9.0/24", None), Put("attachments/vni1/10.0.9.0/25", None), revoked())
    assert gateway.ahead() == 3
    assert not gateway.allows("10.0.1.1")
    if restarted:
        gateway.restart()
    restore(gateway, gateway.folder / "backup.db")
    assert gateway.follower.held is not None
    assert gateway.follower.held.whole
    gateway.write(*TAKEN_BACK, put(attachment("10.0.9.0/24", 41, started=NOW - DAY)))
    assert gateway.held() == 0
    assert gateway.follower.in_step
    assert not gateway.allows("10.0.9.1")
    assert gateway.allows("10.0.9.129")
    assert gateway.allows("10.0.1.1"), "the lost revocation is not in the store"
    for source in ("10.0.9.1", "10.0.9.129", "10.0.1.1"):
        assert reason(gateway.writer, source) is as_loaded_at_once(gateway, source)


def test_a_history_that_is_held_is_worked_out_and_counted_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(gateway.folder / "portward.db", gateway.folder / "backup.db")
    gateway.write(*MISTAKE, confirmation(2))
    restore(gateway, gateway.folder / "backup.db")
    assert gateway.held() == 1
    monkeypatch.setattr(gateway.writer, "replace", None)  # a call would raise
    gateway.write(subscription(97, standing=Standing.DISABLED))
    gateway.follow()
    assert (gateway.held(), gateway.follower.histories) == (1, 1)
    assert head_of(gateway).ahead == 2


def test_a_backup_without_the_newest_early_denials_is_another_history(gateway: Gateway) -> None:
    """The backup has the held change, but lacks the last early denials, which the table has already. Revisions
    that are written to it afterwards are enforced, and can be confirmed."""
    gateway.write(*MISTAKE)
    gateway.write(subscription(97, standing=Standing.DISABLED))
    backup(gateway.folder / "portward.db", gateway.folder / "backup.db")
    gateway.write(subscription(98, standing=Standing.DISABLED))
    assert gateway.ahead() == 4
    restore(gateway, gateway.folder / "backup.db")
    assert gateway.follower.held is not None
    assert gateway.follower.held.whole
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1")
    gateway.write(subscription(41, standing=Standing.DISABLED))
    assert not gateway.allows("10.0.9.129")
    assert gateway.allows("10.0.0.1")
    gateway.write(confirmed_here(gateway))
    assert (gateway.held(), gateway.follower.in_step) == (0, True)
    assert not gateway.allows("10.0.0.1")
    assert not gateway.allows("10.0.1.1")


def test_a_hold_that_could_not_be_noted_is_noted_by_the_next_step(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise TableError("No space left on device")

    with monkeypatch.context() as once:
        once.setattr(gateway.writer, "hold", full)
        with pytest.raises(TableError):
            gateway.write(*MISTAKE)
        assert gateway.held() == 0
    gateway.follow()
    assert (gateway.held(), head_of(gateway).held) == (2, 2)
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1")


def test_a_store_that_ends_before_the_table_is_another_history(tmp_path: Path) -> None:
    """This holds even if the log lacked the right hash of the revision that the table has loaded."""
    with closing(Gateway(tmp_path, 1.0)) as gateway:
        gateway.write(*CUSTOMERS)
        gateway.write(subscription(1, standing=Standing.DISABLED))
        backup(tmp_path / "portward.db", tmp_path / "backup.db")
        gateway.write(subscription(1))
        with closing(sqlite3.connect(tmp_path / "portward.db")) as connection, connection:
            connection.execute("DROP TRIGGER revision_stays")
            connection.execute("UPDATE revision SET hash = x'00' WHERE number = 3")
        gateway.follow()
        assert gateway.allows("10.0.0.1")
        restore(gateway, tmp_path / "backup.db")
        assert not gateway.allows("10.0.0.1")
        assert (head_of(gateway).revision, gateway.follower.in_step) == (2, True)


@pytest.mark.parametrize("ahead", [0, 1, 10_000])
def test_a_confirmation_inside_another_backup_confirms_nothing(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, ahead: int
) -> None:
    """Two backups are restored one after the other. The newer one has a revision 3 that confirmed an earlier
    change. By its number it comes after the held revision. By its date, too, it may come after the hold, because
    its writer's clock was `ahead` by some hours."""
    store, folder = gateway.store, gateway.folder

    def write_at(hour: int, *changes: Put) -> None:
        at = datetime(2026, 6, 1, hour, tzinfo=UTC)
        store.write(changes, expected=store.revision(), actor="ada", at=at + timedelta(hours=ahead))
        while gateway.follower.step(at) is not None:
            pass

    def restore_at(hour: int, source: Path) -> None:
        backup(source, folder / "portward.db")
        while gateway.follower.step(datetime(2026, 6, 1, hour, tzinfo=UTC)) is not None:
            pass

    backup(folder / "portward.db", folder / "old.db")
    write_at(13, *MISTAKE, confirmation(2))
    write_at(14, *TAKEN_BACK, confirmation(3))
    backup(folder / "portward.db", folder / "newer.db")
    write_at(15, *MISTAKE, confirmation(4))
    assert not gateway.allows("10.0.0.5")
    restore_at(16, folder / "old.db")
    assert gateway.held() == 1
    restore_at(17, folder / "newer.db")
    assert gateway.held() == 1
    assert not gateway.allows("10.0.0.5")
    assert "revision 3 confirms nothing here" in caplog.text
    gateway.restart()
    restore_at(17, folder / "newer.db")
    assert not gateway.allows("10.0.0.5")
    write_at(18, confirmation(4))
    assert gateway.held() == 1, "it names nothing, as one that a backup holds"
    write_at(19, confirmed_here(gateway))
    assert (gateway.held(), gateway.follower.in_step) == (0, True)
    assert gateway.allows("10.0.0.5")


def test_a_confirmation_of_an_earlier_hold_confirms_no_later_one(gateway: Gateway) -> None:
    """The backup contains a confirmation of an earlier hold of this gateway."""
    store, folder = gateway.folder / "portward.db", gateway.folder
    backup(store, folder / "old.db")
    gateway.write(*MISTAKE, confirmation(2))
    restore(gateway, folder / "old.db")
    gateway.write(confirmed_here(gateway))
    assert (gateway.held(), gateway.allows("10.0.0.5")) == (0, True)
    backup(store, folder / "confirmed.db")
    gateway.write(*MISTAKE, confirmation(3))
    assert not gateway.allows("10.0.0.5")
    for source in ("confirmed.db", "old.db", "confirmed.db"):
        restore(gateway, folder / source)
        assert not gateway.allows("10.0.0.5")
    gateway.restart()
    gateway.follow()
    assert not gateway.allows("10.0.0.5")
    gateway.write(confirmed_here(gateway))
    assert gateway.allows("10.0.0.5")


@pytest.mark.parametrize("restarted", [False, True])
def test_more_subscriptions_let_more_of_them_flip(tmp_path: Path, restarted: bool) -> None:
    """Twelve of 43 subscriptions would flip, then twelve of 143. A running agent and a restarted one decide
    alike."""
    with closing(Gateway(tmp_path)) as gateway:
        gateway.write(*CUSTOMERS, *OTHERS)
        gateway.write(*MISTAKE[:12])
        assert gateway.held() == 2
        if restarted:
            gateway.restart()
        gateway.write(*(subscription(number) for number in range(1000, 1050)))
        assert gateway.held() == 2, "ten of 93 may"
        gateway.write(*(subscription(number) for number in range(1050, 1100)))
        assert gateway.held() == 0
        assert not gateway.allows("10.0.0.1")


def damage_head(gateway: Gateway, data: bytes | None) -> None:
    """Replaces the table's head by these bytes; None cuts off its end."""
    with gateway.writer._environment.begin(write=True) as transaction:
        transaction.put(HEAD, head_of(gateway).pack()[:-1] if data is None else data)


HEADS = pytest.mark.parametrize(
    "data", [None, bytes(200), b"\x63" * 148], ids=["cut off", "another length", "another format"]
)


@HEADS
@pytest.mark.parametrize("restarted", [False, True])
def test_a_mistake_in_the_store_is_held_also_if_the_tables_head_is_damaged(
    gateway: Gateway, data: bytes | None, restarted: bool
) -> None:
    """The readable records of the table stay in force, and the store is compared with them."""
    generation = head_of(gateway).generation
    write(gateway.store, *MISTAKE)
    damage_head(gateway, data)
    if restarted:
        gateway.restart()
    first = gateway.follower.step(NOW)
    assert first is not None
    assert first.everything, "what a kernel has cached is of another generation"
    assert first.generation != generation
    gateway.follow()
    assert gateway.held() == 2
    assert gateway.allows("10.0.0.1")
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1"), "denials go ahead of it"
    gateway.restart()
    gateway.follow()
    assert (gateway.held(), gateway.allows("10.0.0.1")) == (2, True)
    assert gateway.follower.histories == 0
    gateway.write(confirmed_here(gateway))
    assert (gateway.held(), gateway.follower.in_step) == (0, True)
    assert not gateway.allows("10.0.0.1")


@HEADS
def test_a_table_with_a_damaged_head_follows_a_store_that_flips_few(
    gateway: Gateway, data: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    write(gateway.store, *MISTAKE[:9])
    damage_head(gateway, data)
    gateway.follow()
    assert (gateway.held(), gateway.follower.in_step, head_of(gateway).revision) == (0, True, 2)
    assert not gateway.allows("10.0.0.1")
    assert gateway.allows("10.0.0.10")
    assert "the policy table is damaged: its head cannot be read" in caplog.text
    for source in ("10.0.0.1", "10.0.0.10", "10.0.1.1", "10.0.9.1"):
        assert reason(gateway.writer, source) is as_loaded_at_once(gateway, source)


def test_records_under_a_damaged_head_are_decided_by_the_preset_in_force(gateway: Gateway) -> None:
    """It is unknown which preset they were decided by before."""
    write(gateway.store, *MISTAKE)
    damage_head(gateway, None)
    gateway.writer.preset = msgspec.structs.replace(AZURE, offers=())
    gateway.follow()
    assert not gateway.allows("10.0.0.1")
    assert not gateway.writer.is_decided_otherwise()
    assert gateway.held() == 0, "under this preset the mistake flips nobody"


def test_a_damaged_head_of_a_large_table_is_left_to_a_child(gateway: Gateway) -> None:
    damage_head(gateway, None)
    with pytest.raises(BulkError):
        Follower(gateway.store, gateway.writer, 10).step(NOW)
    assert gateway.writer.head() is None


def test_a_table_of_which_nothing_is_left_is_a_first_load(gateway: Gateway) -> None:
    """The table has nothing that the store could be compared with."""
    write(gateway.store, *MISTAKE)
    gateway.writer.close()
    (gateway.folder / "table" / "data.mdb").write_bytes(b"damaged" * 10_000)
    gateway.start()
    gateway.writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    gateway.follow()
    assert (gateway.held(), gateway.follower.in_step) == (0, True)
    assert not gateway.allows("10.0.0.1")


def test_another_history_is_counted_by_the_follower_that_reads_it(gateway: Gateway) -> None:
    """A follower with a limit leaves the reading to one without a limit, and takes its count over."""
    backup(gateway.folder / "portward.db", gateway.folder / "backup.db")
    gateway.write(subscription(SPAMMER, standing=Standing.DISABLED))
    backup(gateway.folder / "backup.db", gateway.folder / "portward.db")
    limited = Follower(gateway.store, gateway.writer, 10)
    with pytest.raises(BulkError):
        limited.step(NOW)
    child = Follower(gateway.store, gateway.writer)
    child.step(NOW)
    limited.take_over(
        child.waiting,
        refused=child.refused,
        unreadable=child.unreadable.now,
        histories=child.histories,
        in_step=child.in_step,
    )
    assert (limited.step(NOW), limited.histories) == (None, 1)
