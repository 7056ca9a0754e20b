"""A load fills the table as changes with the same records would, and replaces a table of another version."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from portward.model import Attachment, Exemption, RateLimit, Reason, Record
from portward.store.packed import packed
from portward.table import layout
from portward.table.account import Account
from portward.table.database import MAP_SIZE, TableError
from portward.table.follower import Follower
from portward.table.reader import Reader
from portward.table.writer import GrownError, Writer
from unit.store.samples import opened, put, write
from unit.table.test_table import (
    AZURE,
    ENFORCE,
    NOW,
    STORE,
    attachment,
    attachments,
    exemptions,
    identity,
    load,
    reason,
    subscription,
    subscriptions,
)


def contents(writer: Writer) -> dict[str, list[tuple[object, ...]]]:
    """All that a table holds of records, without its internal numbers, which depend on the order of the
    records."""
    with writer._environment.begin() as transaction:
        raw = {name: list(transaction.cursor(part)) for name, part in writer._parts.items()}
    segments = {value: key for key, value in raw[b"segments"]}
    assert dict(raw[b"names"]) == segments
    accounts = {key: Account.unpack(value) for key, value in raw[b"accounts"]}
    assert {row[16:]: row[:16] for _, row in raw[b"ids"]} == {key: one.id.bytes for key, one in accounts.items()}

    def placed(place: bytes) -> tuple[object, ...]:
        return segments[b"\0" + place[:3]], place[3:]

    entries = [row for name in layout.ENTRIES.values() for _, row in raw[name]]
    holdings = [row for name in layout.HOLDINGS.values() for _, row in raw[name]]
    return {
        "accounts": [(one.id, one) for one in accounts.values()],
        "entries": [
            (
                *placed(layout.place_of(row)),
                accounts[layout.number(entry.subscription)].id,
                entry._replace(subscription=0),
            )
            for row, entry in ((row, layout.Entry.of(row)) for row in entries)
        ],
        "holdings": [(accounts[row[:4]].id, *placed(row[4:])) for row in holdings],
        "lengths": [(segments[b"\0" + key[:3]], key[3:], value) for key, value in raw[b"lengths"]],
        "expiries": [(row[:8], accounts[row[8:]].id) for _, row in raw[b"expiries"]],
    }


ends = st.builds(
    lambda exemption, days, limit: Exemption(
        subscription=exemption.subscription,
        state=exemption.state,
        decided=exemption.decided,
        until=None if days is None else NOW + timedelta(days=days),
        limit=limit,
    ),
    exemptions,
    st.sampled_from([None, -1, 1]),
    st.sampled_from([None, RateLimit(per_minute=60)]),
)
# Machines that started before a grant, after it, or, by a fast clock, in the future.
machines = st.builds(
    lambda attachment, hours: replace(attachment, started=NOW + timedelta(hours=hours)),
    attachments,
    st.sampled_from([-48, -1, 0, 1, 48]),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(subscriptions | ends, max_size=8, unique_by=identity),
    st.lists(attachments | machines, max_size=12, unique_by=identity),
    st.booleans(),
)
def test_a_load_is_what_an_edit_would_be(others: list[Record], places: list[Attachment], quick: bool) -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        loaded, edited = Writer(Path(one), AZURE, ENFORCE), Writer(Path(other), AZURE, ENFORCE)
        loaded.replace(chain(others, map(packed, places) if quick else places), revision=1, store=STORE, now=NOW)
        edited.apply([*others, *places], [], revision=1, now=NOW)
        found, expected = contents(loaded), contents(edited)
        loaded.close()
        edited.close()
    for part, rows in expected.items():
        assert sorted(found[part], key=repr) == sorted(rows, key=repr)


def test_a_load_replaces_everything(tmp_path: Path) -> None:
    with closing(Writer(tmp_path, AZURE, ENFORCE)) as writer:
        load(writer, [subscription(1), attachment("10.0.0.4", 1), attachment("2001:db8::/64", 1)])
        writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        assert load(writer, [subscription(2), attachment("10.0.0.5", 2)]).everything
        assert writer.reader().counts() == (1, 1)
        assert reason(writer, "10.0.0.4") is Reason.DENIED_UNKNOWN_SOURCE
        assert reason(writer, "2001:db8::4") is Reason.DENIED_UNKNOWN_SOURCE
        assert reason(writer, "10.0.0.5") is Reason.ALLOWED_OFFER


def test_attachments_come_last(tmp_path: Path) -> None:
    """The other records decide their verdicts, and a table with wrong decisions must not be committed."""
    with closing(Writer(tmp_path, AZURE, ENFORCE)) as writer:
        with pytest.raises(ValueError, match="after an attachment"):
            load(writer, [attachment("10.0.0.4", 1), subscription(1)])
        assert writer.head() is None


def test_no_prefix_has_two_entries(tmp_path: Path) -> None:
    with closing(Writer(tmp_path, AZURE, ENFORCE)) as writer:
        with pytest.raises(TableError, match="stand twice"):
            load(writer, [attachment("10.0.0.4", 1), attachment("10.0.0.4", 1)])
        assert writer.head() is None


def test_a_load_that_the_table_is_too_small_for_is_asked_for_again(tmp_path: Path) -> None:
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE, map_size=1 << 18)) as writer:
        many: list[Record] = [attachment(f"10.0.{number // 250}.{number % 250}", 1) for number in range(10_000)]
        with pytest.raises(GrownError):
            load(writer, many)
        assert writer.head() is None


def test_a_follower_reads_the_store_again_where_the_table_was_too_small(tmp_path: Path) -> None:
    many: list[Record] = [attachment(f"10.0.{number // 250}.{number % 250}", 1) for number in range(10_000)]
    with (
        closing(opened(tmp_path / "portward.db")) as store,
        closing(Writer(tmp_path / "table", AZURE, ENFORCE, map_size=1 << 18)) as writer,
    ):
        write(store, *map(put, [subscription(1), *many]))
        assert Follower(store, writer).step(NOW) is not None
        assert writer.reader().counts() == (10_000, 1)


def older_table(folder: Path) -> dict[bytes, bytes]:
    """Makes a table of format 1, in which 10.0.0.4 of vni1 is allowed. Returns the contents of its parts."""
    parts: dict[bytes, tuple[bytes, bytes]] = {
        b"links": (b"\0\0\0\1", b"\1\0\0\0\0vni1"),
        b"segments": (b"vni1", b"\0\0\0\1"),
        b"lengths": (b"\0\0\0014", b"\x20\1\0\0\0"),
        b"entries": (b"\0\0\1\x20\x0a\0\0\4", b"\0\0\1\0\0\0" + bytes(8)),
        b"subscriptions": (b"\0\0\0\1", b'{"id":"00000000-0000-0000-0000-000000000001"}'),
        b"ids": (b"\0" * 15 + b"\1", b"\0\0\0\1"),
        b"holdings": (b"\0\0\0\1", b"\0\0\1\x20\x0a\0\0\4"),
        b"expiries": (bytes(8), b"\0\0\0\1"),
    }
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 20, max_dbs=8) as environment:
        for name, (key, value) in parts.items():
            part = environment.open_db(name, dupsort=name in (b"holdings", b"expiries"))
            with environment.begin(write=True, db=part) as transaction:
                transaction.put(key, value)
        with environment.begin(write=True) as transaction:
            transaction.put(b"head", b"\1\0\7\0\0\0\0\0\0\0" + bytes(13) + bytes(32) + STORE)
    return names(folder)


def names(folder: Path) -> dict[bytes, bytes]:
    """The names of all that lies in a table's file."""
    with lmdb.open(str(folder), readonly=True, max_dbs=32) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


def test_a_table_of_an_older_format_is_no_policy(tmp_path: Path) -> None:
    older_table(tmp_path / "table")
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        assert writer.head() is None
        assert writer.reader().lookup(1, b"\x0a\0\0\x04") is None


def test_a_table_of_an_older_format_stays_until_another_is_whole(tmp_path: Path) -> None:
    """If the store cannot be read, an operator can go back to the older version, which still finds its table."""
    older = older_table(tmp_path / "table")
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:

        def broken() -> object:
            yield subscription(1)
            raise OSError("no more of it")

        with pytest.raises(OSError, match="no more"):
            writer.replace(broken(), revision=8, store=STORE, now=NOW)  # type: ignore[arg-type] # it never ends well
    assert older.items() <= names(tmp_path / "table").items()


def test_a_table_of_an_older_format_is_replaced(tmp_path: Path) -> None:
    older = older_table(tmp_path / "table")
    with closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        load(writer, [subscription(1), attachment("10.0.0.4", 1)])
        writer.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
        assert reason(writer, "10.0.0.4") is Reason.ALLOWED_OFFER
        with closing(Writer(tmp_path / "none", AZURE, ENFORCE)) as fresh:
            load(fresh, [])
    left = names(tmp_path / "table")
    assert left.keys() == names(tmp_path / "none").keys()
    assert (older.keys() - {b"head"}).isdisjoint(left)


def test_a_reader_of_an_older_table_says_so(tmp_path: Path) -> None:
    older_table(tmp_path / "table")
    with pytest.raises(TableError, match="of format 1, and this portward reads format 3 only"):
        Reader.open(tmp_path / "table")


def test_a_hundred_thousand_attachments_take_few_bytes(tmp_path: Path) -> None:
    many = (
        attachment(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", number // 10)
        for number in range(100_000)
    )
    with closing(Writer(tmp_path, AZURE, ENFORCE, map_size=MAP_SIZE)) as writer:
        writer.replace(chain(map(subscription, range(10_000)), many), revision=1, store=STORE, now=NOW)
    assert (tmp_path / "data.mdb").stat().st_size <= 48 * 100_000
