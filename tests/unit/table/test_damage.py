"""A damaged row of the policy table affects only its own source, and no step fails because of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from portward.daemon.counting import Counting
from portward.dataplane.deletions import Deletions
from portward.dataplane.fake import FakeKernel
from portward.dataplane.verdict_cache import Source
from portward.model import Attachment, Exemption, ExemptionState, Reason, Record, Standing
from portward.table import layout
from portward.table.account import Account
from portward.table.database import ROW_KEY, TableError
from portward.table.invariants import Verified, verify
from portward.table.writer import Writer
from unit.table.test_table import AZURE, ENFORCE, NOW, STORE, attachment, reason, subscription

# Customer → an allowed machine. That of customer 3 may send until its grant ends.
MACHINES = {1: "10.0.0.1", 2: "10.0.0.2", 3: "10.0.0.3", 4: "2001:db8::4"}
ENDS = NOW + timedelta(hours=2)


def records() -> list[Record]:
    """Four customers."""
    found: list[Record] = [
        subscription(number, "csp" if number == 3 else "enterprise-agreement") for number in MACHINES
    ]
    found.append(
        Exemption(
            subscription=UUID(int=3), state=ExemptionState.GRANTED, decided=NOW - timedelta(days=2), until=ENDS
        )
    )
    started = NOW - timedelta(hours=1)
    return [*found, *(attachment(address, number, started=started) for number, address in MACHINES.items())]


def made(folder: Path) -> Writer:
    """A table with these customers, behind interface 1."""
    writer = Writer(folder, AZURE, ENFORCE)
    writer.replace(records(), revision=1, store=STORE, now=NOW)
    writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
    return writer


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with closing(made(tmp_path)) as found:
        assert all(reason(found, address).allows for address in MACHINES.values())
        yield found


def change(writer: Writer, part: bytes, key: bytes, old: bytes | None, new: bytes | None) -> None:
    """Replaces a value in the table's file."""
    with writer._environment.begin(write=True) as transaction:
        if old is not None:
            transaction.delete(key, old, db=writer._parts[part])
        if new is not None:
            transaction.put(key, new, db=writer._parts[part])


def rows(writer: Writer, part: bytes) -> list[tuple[bytes, bytes]]:
    """Keys and values of a part."""
    with writer._environment.begin() as transaction:
        return list(transaction.cursor(writer._parts[part]))


def row_of(writer: Writer, address: str) -> bytes:
    """The row of a machine's entry."""
    place = layout.place(1, ip_network(address))
    found = [row for _, row in rows(writer, layout.ENTRIES[layout.address_bytes(place)]) if row.startswith(place)]
    assert len(found) == 1
    return found[0]


def with_code(writer: Writer, address: str, code: int) -> None:
    row = row_of(writer, address)
    part = layout.ENTRIES[layout.address_bytes(layout.place_of(row))]
    change(writer, part, b"r", row, row[:-1] + bytes([code]))


def checked(writer: Writer, folder: Path) -> Verified:
    """The result of `portward check`, which opens the table in a process of its own."""
    writer.close()
    return verify(folder, NOW)


@pytest.mark.parametrize("code", [0, 14, 31, 0x20, 0x1F | 0x40, 0x80 | 5])
def test_a_code_without_a_meaning_denies_its_source(writer: Writer, tmp_path: Path, code: int) -> None:
    with_code(writer, MACHINES[1], code)
    found = writer.reader().lookup(1, ip_address(MACHINES[1]).packed)
    assert found is not None
    assert (found.reason, found.damaged) == (Reason.DENIED_UNKNOWN_SOURCE, True)
    assert reason(writer, MACHINES[2]).allows
    with pytest.raises(TableError, match="damaged"):
        writer.reader().holding("vni1", ip_address(MACHINES[1]))
    verified = checked(writer, tmp_path)
    assert verified.broken == 1
    assert f"the code of the entry for {MACHINES[1]}/32 in segment 1 has no meaning" in verified.listed[0]


def test_a_cached_verdict_of_a_damaged_entry_is_found_and_forgotten(writer: Writer, tmp_path: Path) -> None:
    """The self-check, which compares cached verdicts with the table, does not stop at such an entry."""
    with_code(writer, MACHINES[1], 31)
    netlink = FakeKernel().netlink()
    counting = Counting(tmp_path, netlink, writer.reader(), Deletions(), lambda: 0)
    sources = [Source(1, ip_address(MACHINES[number]).packed) for number in (1, 2)]
    counting._sample = [("allow4", (source.key, 5, 60_000)) for source in sources]
    assert counting.suspects() == [sources[0]]
    owner = counting._owner(sources[0])
    assert owner is not None
    assert owner.subscription == str(UUID(int=1))
    assert writer.damage.rows == 1


def test_damage_is_counted_and_logged_once(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    with_code(writer, MACHINES[1], 31)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert writer.reader().owner(1, ip_address(MACHINES[1]).packed) is not None
    assert writer.damage.rows == 1
    assert len(caplog.records) == 1
    assert "portward check" in caplog.text


def test_an_entry_is_whole_again_when_it_is_decided(writer: Writer) -> None:
    with_code(writer, MACHINES[1], 31)
    committed = writer.apply([subscription(1, name="renamed")], [], revision=2, now=NOW)
    assert [str(place.network) for place in committed.changed] == [f"{MACHINES[1]}/32"]
    assert reason(writer, MACHINES[1]).allows
    assert writer.reader().counts() == (4, 4)


def test_an_account_that_cannot_be_read_closes_its_sources_only(writer: Writer) -> None:
    """They are denied when they are decided the next time. Until then the old decisions hold."""
    key, data = rows(writer, b"accounts")[2]
    assert Account.unpack(data).id == UUID(int=3)
    change(writer, b"accounts", key, data, data[:-1])
    assert writer.next_expiry() == ENDS
    writer.decide_due(now=ENDS)
    assert reason(writer, MACHINES[3]) is Reason.DENIED_UNKNOWN_SOURCE
    assert reason(writer, MACHINES[1]).allows
    assert writer.reader().account(3) is None
    writer.preset = msgspec.structs.replace(AZURE, paas_blocked=not AZURE.paas_blocked)
    writer.decide_due(now=ENDS)
    assert reason(writer, MACHINES[2]).allows
    writer.apply(records(), [], revision=2, now=NOW)
    assert reason(writer, MACHINES[3]).allows, "its records have come again"


def test_a_row_of_an_unknown_subscription_in_expiries_is_skipped(writer: Writer) -> None:
    """A grant whose end comes after that row still ends."""
    change(writer, b"expiries", b"r", None, layout.due(layout.microseconds(NOW), 99))
    writer.decide_due(now=ENDS)
    assert reason(writer, MACHINES[3]) is Reason.DENIED_NOT_EXEMPT
    assert writer.next_expiry() is None
    assert writer.damage.rows == 1


@pytest.mark.parametrize("at", [0, 2**64 - 1])
def test_no_time_in_expiries_stops_the_clock(writer: Writer, at: int) -> None:
    change(writer, b"expiries", b"r", layout.due(layout.microseconds(ENDS), 3), None)
    change(writer, b"expiries", b"r", None, layout.due(at, 3))
    assert writer.next_expiry() is not None
    writer.decide_due(now=NOW)
    assert writer.next_expiry() is None if at == 0 else writer.next_expiry() is not None


def test_an_id_with_the_number_of_another_writes_nothing_into_that_account(writer: Writer) -> None:
    """Changes for customer 1 must not let customer 2's machines send."""
    change(writer, b"ids", b"r", UUID(int=1).bytes + layout.number(1), UUID(int=1).bytes + layout.number(2))
    revoked = subscription(2, standing=Standing.DISABLED)
    writer.apply([revoked], [], revision=2, now=NOW)
    writer.apply([subscription(1)], [], revision=3, now=NOW)
    assert reason(writer, MACHINES[2]) is Reason.DENIED_DISABLED
    writer.apply([attachment(MACHINES[1], 1)], [], revision=4, now=NOW)
    assert reason(writer, MACHINES[1]).allows


def test_an_entry_of_another_than_who_holds_it_is_denied(writer: Writer) -> None:
    """It is unknown which of the two is right."""
    row = row_of(writer, MACHINES[1])
    change(writer, b"entries4", b"r", row, row[:-12] + layout.number(99) + row[-8:])
    writer.apply([subscription(1, name="renamed")], [], revision=2, now=NOW)
    assert reason(writer, MACHINES[1]) is Reason.DENIED_UNKNOWN_SOURCE
    writer.apply([attachment(MACHINES[1], 1)], [], revision=3, now=NOW)
    assert reason(writer, MACHINES[1]).allows


@pytest.mark.parametrize("data", [b"", b"\1", b"\1\0\0\0\0\xff\xfe", b"\2\0\0\0\0vni1"])
def test_a_link_that_is_damaged_or_leads_elsewhere_passes_nothing(writer: Writer, data: bytes) -> None:
    key, value = rows(writer, b"links")[0]
    change(writer, b"links", key, value, data)
    assert writer.reader().lookup(1, ip_address(MACHINES[1]).packed) is None
    assert writer.reader().links().keys() >= {2}
    writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
    assert reason(writer, MACHINES[1]).allows


def test_prefix_lengths_that_cannot_be_read_hide_no_entry(writer: Writer) -> None:
    """Otherwise the lookup for a denied machine would find an allowed wide prefix."""
    wide: list[Record] = [attachment("10.0.0.0/24", 1), subscription(2, standing=Standing.DISABLED)]
    writer.apply(wide, [], revision=2, now=NOW)
    key, value = next((key, value) for key, value in rows(writer, b"lengths") if key == layout.family_key(1, 4))
    change(writer, b"lengths", key, value, value[:-1])
    assert reason(writer, MACHINES[2]) is Reason.DENIED_DISABLED
    assert reason(writer, "10.0.0.9").allows
    writer.apply([attachment("10.0.0.8/30", 2)], [], revision=3, now=NOW)
    assert reason(writer, "10.0.0.9") is Reason.DENIED_DISABLED
    assert dict(rows(writer, b"lengths"))[key] == layout.pack_lengths({32: 3, 30: 1, 24: 1})


def test_a_segment_with_the_number_of_another_gets_a_new_one(writer: Writer) -> None:
    writer.apply([attachment("10.0.0.1", 2, "vni2")], [], revision=2, now=NOW)
    change(writer, b"segments", b"vni1", None, layout.number(2))
    writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
    assert reason(writer, MACHINES[1], 1) is Reason.DENIED_UNKNOWN_SOURCE
    assert reason(writer, MACHINES[1], 2).allows


def _rows(part: bytes) -> st.SearchStrategy[tuple[bytes, int, int]]:
    return st.tuples(st.just(part), st.integers(0, 20), st.integers(0, 10_000))


def _flip(writer: Writer, part: bytes, place: int, bit: int) -> None:
    """Flips one bit of one value of a part."""
    found = rows(writer, part)
    key, value = found[place % len(found)]
    other = int.from_bytes(value, "big") ^ 1 << bit % (len(value) * 8)
    change(writer, part, key, value, other.to_bytes(len(value), "big"))


def _live(writer: Writer) -> None:
    """Does all that an agent does with a table, from its start until a grant has ended."""
    writer.decide_due(now=NOW)
    writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
    writer.apply([subscription(2, name="renamed")], [attachment(MACHINES[4], 4)], revision=2, now=NOW)
    writer.next_expiry()
    writer.decide_due(now=ENDS)
    writer.preset = msgspec.structs.replace(AZURE, paas_blocked=not AZURE.paas_blocked)
    writer.decide_due(now=ENDS)
    reader = writer.reader()
    reader.accounts_named("renamed")
    for address in MACHINES.values():
        reader.owner(1, ip_address(address).packed)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(layout.PARTS).flatmap(_rows), min_size=1, max_size=3))
def test_whatever_bit_is_another_one_no_step_fails(flips: list[tuple[bytes, int, int]]) -> None:
    """No step fails, at a start or later, and only lookups that use the damaged row may give another result."""
    parts = {part for part, _, _ in flips}
    with TemporaryDirectory() as folder:
        with closing(made(Path(folder))) as writer:
            change(writer, b"early", ROW_KEY, None, layout.number(1))
            for flip in flips:
                _flip(writer, *flip)
        with closing(Writer(Path(folder), AZURE, ENFORCE)) as again:
            _live(again)
            found = [again.reader().lookup(1, ip_address(address).packed) for address in MACHINES.values()]
            passes = [one is not None and one.reason.allows for one in found]
            if parts.isdisjoint({b"links", b"segments", b"names", b"lengths"}):  # these affect a whole segment
                wrong = sum(one != right for one, right in zip(passes, [True, True, False, False], strict=True))
                assert wrong <= 2 * len(flips)
            again.replace(records(), revision=3, store=STORE, now=NOW)
            again.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
            assert all(reason(again, address).allows for address in MACHINES.values())


def test_a_new_attachment_of_a_damaged_account_is_denied(writer: Writer) -> None:
    key, data = rows(writer, b"accounts")[0]
    change(writer, b"accounts", key, data, b"\xc1")
    new = Attachment(segment="vni1", address=ip_network("10.0.0.7"), subscription=UUID(int=1))
    writer.apply([new], [], revision=2, now=NOW)
    assert reason(writer, "10.0.0.7") is Reason.DENIED_UNKNOWN_SOURCE
    assert reason(writer, MACHINES[1]) is Reason.DENIED_UNKNOWN_SOURCE
    assert reason(writer, MACHINES[2]).allows


@pytest.mark.parametrize("at", [datetime(9999, 12, 31, 23, tzinfo=UTC), datetime(1969, 12, 31, tzinfo=UTC)])
def test_an_account_with_a_time_that_no_boundary_takes_is_damaged(at: datetime) -> None:
    grant = Exemption(subscription=UUID(int=1), state=ExemptionState.GRANTED, decided=NOW, until=at)
    with pytest.raises(layout.DamagedError, match="is out of range"):
        Account.unpack(Account(UUID(int=1), None, grant).pack())


# The last one is a valid time, but a clock that starts from it would soon pass the year 9999.
@pytest.mark.parametrize("at", [float("nan"), float("inf"), 1e300, -1.0, 253402300799.0])
def test_a_head_that_was_decided_at_no_time_is_no_policy(writer: Writer, at: float) -> None:
    """At a start, the clock begins with this time, and the start must not fail."""
    head = writer.head()
    assert head is not None
    with writer._environment.begin(write=True) as transaction:
        transaction.put(layout.HEAD, head._replace(decided_at=at).pack())
    assert writer.head() is None
    assert writer.reader().lookup(1, ip_address(MACHINES[1]).packed) is None
    writer.replace(records(), revision=2, store=STORE, now=NOW)
    assert reason(writer, MACHINES[1]).allows
