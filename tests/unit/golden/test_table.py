"""Rows and accounts of the policy table are read correctly, and a table of another format is not read."""

from __future__ import annotations

import logging
from contextlib import closing
from datetime import datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import UUID

import lmdb
import msgspec
import pytest

from portward.model import Exemption, Reason, Subscription
from portward.store.codec import encode
from portward.table import account, layout
from portward.table.account import Account
from portward.table.database import TableError
from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.golden import golden
from unit.store.samples import CONTOSO, MACHINE
from unit.table.test_table import AZURE, ENFORCE, NOW, STORE

TABLE = golden("table-3.json")


def test_the_format_of_these_files_is_the_one_that_is_written() -> None:
    assert TABLE["format"] == layout.FORMAT, "a new format needs golden files of its own"
    assert [layout.stored_name(part).decode() for part in layout.PARTS] == TABLE["parts"]


@pytest.mark.parametrize("sample", TABLE["entries"], ids=lambda sample: f"{sample['reason']} {sample['prefix']}")
def test_an_entry_is_read_as_it_was_meant(sample: dict[str, Any]) -> None:
    row = bytes.fromhex(sample["row"])
    reason = Reason(sample["reason"])
    entry = layout.Entry(
        reason, sample["observed"], sample["paas"], sample["subscription"], sample["started"], sample["limited"]
    )
    place = layout.place(sample["segment"], ip_network(sample["prefix"]))
    assert layout.Entry.of(row) == entry
    assert layout.place_of(row) == place
    assert layout.network_of(place) == (sample["segment"], ip_network(sample["prefix"]))
    assert layout.meaning_of(row) == (reason, sample["observed"], sample["limited"], False)
    assert entry.row(place) == row


def test_the_other_parts_are_read_as_they_were_meant() -> None:
    link, lengths, holding, due = (TABLE[name] for name in ("link", "lengths", "holding", "due"))
    found = layout.Link.unpack(bytes.fromhex(link["value"]))
    assert tuple(found) == (link["segment"], link["observed"], link["name"])
    assert found.pack().hex() == link["value"]
    counts = dict(lengths["counts"])
    assert layout.unpack_lengths(bytes.fromhex(lengths["value"]), 4) == counts
    assert layout.pack_lengths(counts).hex() == lengths["value"]
    assert layout.family_key(link["segment"], 4).hex() == lengths["key"]
    rows = [bytes.fromhex(holding["of"])]
    layout.make_holdings(rows)
    assert rows[0].hex() == holding["row"]
    at = datetime.fromisoformat(due["at"])
    assert layout.due(layout.microseconds(at), due["subscription"]).hex() == due["row"]
    assert layout.moment(int.from_bytes(bytes.fromhex(due["row"])[:8], "big")) == at


def test_the_head_is_read_as_it_was_meant() -> None:
    sample = dict(TABLE["head"])
    value = bytes.fromhex(sample.pop("value"))
    expected = {
        name: bytes.fromhex(field) if name in ("preset", "store", "hash", "ahead_hash") else field
        for name, field in sample.items()
    }
    head = layout.Head.unpack(value)
    assert head is not None
    assert head._asdict() == expected
    assert head.pack() == value


@pytest.mark.parametrize("sample", golden("account-1.json"), ids=lambda sample: sample["id"])
def test_an_account_is_read_as_it_was_meant(sample: dict[str, Any]) -> None:
    found = Account.unpack(bytes.fromhex(sample["packed"]))
    assert str(found.id) == sample["id"]
    for record, expected in ((found.subscription, sample["subscription"]), (found.exemption, sample["exemption"])):
        assert (None if record is None else msgspec.json.decode(encode(record))) == expected
    assert found.pack().hex() == sample["packed"]


@pytest.mark.parametrize(
    ("type_", "names"),
    [(Subscription, account.SUBSCRIPTION_FIELDS), (Exemption, account.EXEMPTION_FIELDS)],
)
def test_each_field_of_a_record_has_a_position(
    type_: type[Subscription | Exemption], names: tuple[str, ...]
) -> None:
    fields = {field.name for field in msgspec.structs.fields(type_)} - {"id", "subscription"}
    assert sorted(names) == sorted(fields), "a new field takes the last position, and raises account.VERSION"


@pytest.mark.parametrize("version", [0, 2, 127])
def test_an_account_of_another_version_is_damaged(version: int) -> None:
    packed = bytearray(Account(UUID(int=1), CONTOSO).pack())
    packed[1] = version
    with pytest.raises(layout.DamagedError):
        Account.unpack(bytes(packed))


def test_an_account_with_a_field_that_is_not_known_is_damaged() -> None:
    """The unknown field might limit a grant."""
    values = msgspec.msgpack.decode(Account(CONTOSO.id, CONTOSO).pack())
    values[2].append("a field of a newer version")
    with pytest.raises(layout.DamagedError):
        Account.unpack(msgspec.msgpack.encode(values))


def other_table(folder: Path, form: int) -> None:
    """The table of format 2, in which a machine is allowed, or the same as of another format."""
    sample = golden("table-2.json")
    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 20, max_dbs=16) as environment:
        for name, rows in sample["parts"].items():
            stored = name.removesuffix("2").encode() + b"%d" % form
            dup = name.split(".")[0].encode() in layout.ROWS
            part = environment.open_db(stored, dupsort=dup, dupfixed=dup)
            with environment.begin(write=True, db=part) as transaction:
                for key, value in rows:
                    transaction.put(bytes.fromhex(key), bytes.fromhex(value))
        with environment.begin(write=True) as transaction:
            head = bytes.fromhex(sample["head"])
            transaction.put(b"head", form.to_bytes(2, "little") + head[2:])


@pytest.mark.parametrize(("form", "age"), [(2, "an older"), (layout.FORMAT + 1, "a newer")])
def test_a_table_of_another_format_is_never_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: int, age: str
) -> None:
    """This holds for an older table after an upgrade, and for a newer one after the upgrade was undone."""
    other_table(tmp_path / "table", form)
    with pytest.raises(
        TableError, match=f"is of format {form}, and this portward reads format {layout.FORMAT} only"
    ):
        Reader.open(tmp_path / "table")
    with caplog.at_level(logging.WARNING), closing(Writer(tmp_path / "table", AZURE, ENFORCE)) as writer:
        assert f"format {form}, which {age} portward wrote" in caplog.text
        assert writer.head() is None
        assert writer.reader().lookup(1, b"\x0a\0\0\x04") is None
        writer.replace([MACHINE], revision=1, store=STORE, now=NOW)
        writer.put_links({1: ("vni1001", False)}, touched=frozenset(), now=NOW)
        found = writer.reader().lookup(1, b"\x0a\0\0\x04")
        assert found is not None
        assert found.reason is Reason.DENIED_UNKNOWN_SOURCE, "its subscription stands in the other table only"
    with (
        lmdb.open(str(tmp_path / "table"), readonly=True, max_dbs=32) as environment,
        environment.begin() as found_,
    ):
        assert not [key for key in dict(found_.cursor()) if key.endswith(b".%d" % form)]
