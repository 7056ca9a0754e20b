"""A damaged row while a change is held: later revisions are still read, and reports stay correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_network
from pathlib import Path
from uuid import UUID

import pytest

from portward.model import Record
from portward.store.confirmation import confirmation
from portward.store.values import Put
from portward.table import layout
from portward.table.database import Rows
from portward.table.history import count_in_table, is_in_table
from unit.store.samples import write
from unit.table.test_behind import CUSTOMERS, DAY, MISTAKE, OTHERS, SPAMMER, Gateway, grant, revoked
from unit.table.test_table import NOW, attachment, subscription

SPAM_KEY = "attachments/vni1/10.0.1.1"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that holds revision 2, which also writes 10.0.0.5 again, for the same customer."""
    with closing(Gateway(tmp_path)) as found:
        found.write(*CUSTOMERS, *OTHERS)
        found.write(*MISTAKE, attachment("10.0.0.5", 5, started=NOW - DAY))
        assert found.held() == 2
        yield found


def damage_entry(gateway: Gateway, address: str) -> None:
    """Puts an unknown code into the entry of an address in vni1."""
    writer = gateway.writer
    place = layout.place(1, ip_network(address))
    with writer._environment.begin(write=True) as transaction:
        rows = Rows(transaction, writer._parts[b"entries4"])
        row = rows.find(place)
        assert row is not None
        rows.remove(row)
        rows.put(row[:-1] + b"\x1f")


def damage_account(gateway: Gateway, number: int) -> None:
    """Overwrites a customer's account with other bytes."""
    known = gateway.writer.reader().number_of(subscription(number))
    assert known is not None
    with gateway.writer._environment.begin(write=True) as transaction:
        transaction.put(layout.number(known), b"\xc1", db=gateway.writer._parts[b"accounts"])


@pytest.mark.parametrize(
    "change", [Put("attachments/vni1/10.0.0.5", None), attachment("10.0.0.5", 98)], ids=["removed", "moved"]
)
def test_a_change_of_a_damaged_entry_behind_a_held_one_is_taken_in(gateway: Gateway, change: Record | Put) -> None:
    damage_entry(gateway, "10.0.0.5")
    gateway.write(change)
    gateway.write(revoked())
    gateway.restart()
    gateway.follow()
    assert (gateway.held(), gateway.ahead()) == (2, 4)
    assert not gateway.allows("10.0.0.5")
    assert not gateway.allows("10.0.1.1")


def test_an_entry_that_is_damaged_after_its_early_denial_stays_denied(gateway: Gateway) -> None:
    """The held change alone would replace the entry by the older attachment."""
    gateway.write(attachment("10.0.0.5", 98))
    damage_entry(gateway, "10.0.0.5")
    write(gateway.store, Put("confirmed", "2"))
    while gateway.follower.step(NOW) is not None:
        assert not gateway.allows("10.0.0.5")
    assert gateway.follower.in_step
    assert not gateway.allows("10.0.0.6")


@pytest.mark.parametrize("what", ["entry", "account"])
def test_what_is_damaged_is_neither_like_a_record_nor_gone(gateway: Gateway, what: str) -> None:
    if what == "entry":
        damage_entry(gateway, "10.0.1.1")
    else:
        damage_account(gateway, SPAMMER)
    reader = gateway.writer.reader()
    with pytest.raises(layout.DamagedError):
        reader.record_like(attachment("10.0.1.1", SPAMMER))
    assert not is_in_table(reader, SPAM_KEY, None)
    if what == "account":
        assert not is_in_table(reader, f"exemptions/{UUID(int=SPAMMER)}", None)
        assert not is_in_table(reader, f"subscriptions/{UUID(int=SPAMMER)}", None)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("change", [Put(SPAM_KEY, None), attachment("10.0.1.1", 98)], ids=["removed", "moved"])
def test_an_attachment_of_a_damaged_account_can_be_taken_from_it(
    gateway: Gateway, change: Record | Put, listed: bool
) -> None:
    """Its entries still let packets pass, because they were decided before the damage."""
    damage_account(gateway, SPAMMER)
    assert gateway.allows("10.0.1.1")
    if not listed:
        with gateway.writer._environment.begin(write=True) as transaction:
            ids = Rows(transaction, gateway.writer._parts[b"ids"])
            row = ids.find(UUID(int=SPAMMER).bytes)
            assert row is not None
            ids.remove(row)
    gateway.write(change)
    assert not gateway.allows("10.0.1.1")
    assert gateway.held() == 2
    assert count_in_table(gateway.writer.reader(), gateway.store, 3) == (1, 1)


def test_a_damaged_account_is_whole_again_after_the_confirmation(gateway: Gateway) -> None:
    damage_account(gateway, SPAMMER)
    gateway.write(Put(SPAM_KEY, None))
    gateway.write(subscription(SPAMMER, "pay-as-you-go", name="written again"), grant(by="ada"))
    gateway.write(confirmation(5))
    assert gateway.follower.in_step
    assert gateway.allows("10.0.2.1")
    assert not gateway.allows("10.0.1.1")


def test_damaged_prefix_lengths_are_counted_once_for_a_revision(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting reads all entries of a segment, once for the table before and once for the table after."""
    gateway.write(*(attachment(f"10.0.2.{number}", SPAMMER, started=NOW - 3 * DAY) for number in range(1, 30)))
    with gateway.writer._environment.begin(write=True) as transaction:
        transaction.put(layout.family_key(1, 4), b"xx", db=gateway.writer._parts[b"lengths"])
    counted: list[bytes] = []
    starting = Rows.starting

    def noting(rows: Rows, start: bytes) -> Iterator[bytes]:
        counted.append(start)
        return starting(rows, start)

    monkeypatch.setattr(Rows, "starting", noting)
    gateway.write(revoked())
    assert not gateway.allows("10.0.1.1")
    assert 0 < counted.count(layout.prefix_of(1, 32)) <= 2
