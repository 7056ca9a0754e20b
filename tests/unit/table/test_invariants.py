"""The check of a policy table finds every violation of its invariants."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from portward.ops import check
from portward.table import layout
from portward.table.account import Account
from portward.table.database import TableError
from portward.table.invariants import Walk, verify
from portward.table.writer import Writer
from unit.golden.test_table import other_table
from unit.table.test_damage import change, made, row_of, with_code
from unit.table.test_table import AZURE, ENFORCE, NOW

KEY = b"r"
FOUR = layout.number(4)
ONE = layout.number(1)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with closing(made(tmp_path / "table")) as found:
        yield found


def findings(writer: Writer) -> list[str]:
    with writer._environment.begin() as transaction:
        return list(Walk(transaction, writer._parts, NOW).findings())


def test_a_table_that_was_made_by_changes_is_whole(writer: Writer) -> None:
    assert findings(writer) == []


Change = tuple[bytes, bytes, bytes | None, bytes | None]
# Name → the change (part, key, value before, value after), and a word of the finding.
BROKEN: dict[str, tuple[Change, str]] = {
    "an expiry of an unknown subscription": (
        (b"expiries", KEY, None, layout.due(layout.microseconds(NOW + timedelta(1)), 99)),
        "subscription 99 is due for another decision at 2026-06-02 00:00:00Z, for no reason",
    ),
    "an expiry for nothing": (
        (b"expiries", KEY, None, layout.due(layout.microseconds(NOW + timedelta(1)), 1)),
        "subscription 1 is due for another decision at 2026-06-02 00:00:00Z, for no reason",
    ),
    "a grant that would not end": (
        (b"expiries", KEY, layout.due(layout.microseconds(NOW + timedelta(hours=2)), 3), None),
        "the grant of subscription 00000000-0000-0000-0000-000000000003 has an end that is not listed",
    ),
    "an id too few": (
        (b"ids", KEY, UUID(int=1).bytes + ONE, None),
        "subscription 00000000-0000-0000-0000-000000000001 is not listed with its number 1",
    ),
    "an id too many": (
        (b"ids", KEY, None, UUID(int=9).bytes + layout.number(9)),
        "5 subscriptions are listed, and there are 4 accounts",
    ),
    "an account of an unknown subscription": (
        (b"accounts", layout.number(9), None, Account(UUID(int=9)).pack()),
        "account 9 has neither a record nor an entry",
    ),
    "an account that is unreadable": (
        (b"accounts", FOUR, b"", b"\x94\x09"),
        "account 4: an account cannot be read",
    ),
    "a holding too many": (
        (b"holdings4", KEY, None, FOUR + layout.prefix_of(1, 32) + b"\x0a\0\0\7"),
        "subscriptions hold 4 entries of IPv4, and there are 3",
    ),
    "a holding too few": (
        (b"holdings4", KEY, ONE + layout.prefix_of(1, 32) + b"\x0a\0\0\1", None),
        "the entry for 10.0.0.1/32 in segment 1 is missing among those of its subscription",
    ),
    "an entry in a segment without a name": (
        (b"names", layout.number(1), b"vni1", None),
        "an entry stands in segment 1, which has no name",
    ),
    "a segment with the number of another": (
        (b"segments", b"vni9", None, layout.number(1)),
        "segment vni9 has the number of another one",
    ),
    "a link that leads elsewhere": (
        (b"links", ONE, b"", layout.Link(1, False, "vni2").pack()),
        "interface 1 leads to another segment than vni2",
    ),
    "a link that is unreadable": ((b"links", ONE, b"", b"\1"), "interface 1: a link cannot be read: 01"),
    "a count that is another": (
        (b"lengths", layout.family_key(1, 4), b"", layout.pack_lengths({32: 4})),
        "the prefix lengths of segment 1 are not its entries'",
    ),
    "a length that is missing": (
        (b"lengths", layout.family_key(1, 16), b"", None),
        "the prefix lengths of segment 1 are missing",
    ),
    "lengths that are unreadable": (
        (b"lengths", layout.family_key(1, 4), b"", b"\x20"),
        "segment 1: prefix lengths cannot be read: 20",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_hold_is_found(writer: Writer, name: str) -> None:
    (part, key, old, new), message = BROKEN[name]
    change(writer, part, key, old, new)
    assert any(message in finding for finding in findings(writer)), findings(writer)


@pytest.mark.parametrize("what", ["account", "prefix", "place"])
def test_an_entry_that_cannot_be_is_found(writer: Writer, what: str) -> None:
    row = row_of(writer, "10.0.0.1")
    if what == "account":
        new, message = (
            row[:-12] + layout.number(99) + row[-8:],
            "the entry for 10.0.0.1/32 in segment 1 refers to no",
        )
    elif what == "prefix":
        new, message = row[:3] + b"\x08" + row[4:], "an entry stands for no prefix"
    else:
        new, message = row[:-1] + bytes([row[-1] | 0x20]), "two entries stand for 10.0.0.1/32 in segment 1"
    change(writer, b"entries4", KEY, None if what == "place" else row, new)
    assert any(message in finding for finding in findings(writer))


def check_lines(folder: Path) -> list[str]:
    """The lines of `portward check` about the table."""
    return list(check._table(folder))


def test_check_prints_the_counts_of_a_whole_table(writer: Writer, tmp_path: Path) -> None:
    writer.close()
    assert check_lines(tmp_path / "table") == [
        f"table {tmp_path / 'table'}: 4 attachments of 4 subscriptions, no damaged rows"
    ]


def _until_it_fails(lines: Iterator[str], printed: list[str]) -> None:
    """Adds each line to `printed`, and raises the error that ends the lines."""
    for line in lines:
        printed.append(line)  # those before the failure are kept


def test_check_reports_damage_and_its_remedy(writer: Writer, tmp_path: Path) -> None:
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::4"):
        with_code(writer, address, 31)
    for number in range(10, 20):
        change(writer, b"expiries", KEY, None, layout.due(1, number))
    writer.close()
    printed: list[str] = []
    remedy = r"`systemctl stop portward`, remove .*data\.mdb and .*lock\.mdb, `systemctl start portward`"
    with pytest.raises(TableError, match=remedy) as error:
        _until_it_fails(check._table(tmp_path / "table"), printed)
    assert error.value.exit_code == 1
    assert printed[0].endswith("4 attachments of 4 subscriptions, 14 damaged rows")
    assert len(printed) == 12
    assert printed[-1] == "  and 4 more"


def test_check_has_nothing_against_no_table_and_one_of_another_format(tmp_path: Path) -> None:
    assert check_lines(tmp_path) == [f"table {tmp_path}: there is none yet"]
    other_table(tmp_path / "other", 2)
    (line,) = check_lines(tmp_path / "other")
    assert "is of format 2" in line
    assert line.endswith("the next start reads the store anew")


def test_a_new_table_without_a_policy_is_whole(tmp_path: Path) -> None:
    Writer(tmp_path, AZURE, ENFORCE).close()
    assert verify(tmp_path, NOW).broken == 0


def test_check_reports_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(8192))
    with pytest.raises(TableError, match="systemctl stop portward"):
        check_lines(tmp_path)


def test_check_reads_beside_a_writer(writer: Writer, tmp_path: Path) -> None:
    """A running agent goes on writing while `check` reads."""
    script = "import sys, pathlib; from portward.ops import check; print(*check._table(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path / "table")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "4 attachments of 4 subscriptions, no damaged rows" in result.stdout
    writer.decide_due(now=NOW)
