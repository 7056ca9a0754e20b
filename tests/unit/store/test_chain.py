"""The log's hashes: every change of a log that portward did not make is found and named."""

# ruff: noqa: S608 # the test writes every statement

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from portward.errors import InputError, StoreError
from portward.store.chain import Check, IntegrityIssue, IntegrityIssueKind, Mark, Sealing, origin_hash, parse_mark
from portward.store.codec import key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from unit.store.samples import (
    ALL,
    CONTOSO,
    FABRIKAM,
    GRANT,
    MACHINE,
    NOON,
    PREFIX,
    held,
    opened,
    put,
    texts,
    write,
)
from unit.store.test_two_writers import python

# The script that made a store of format 1.
FORMAT_1 = """
CREATE TABLE store (identity BLOB NOT NULL);
CREATE TABLE record (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE revision (number INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL);
CREATE TABLE change (
  revision INTEGER NOT NULL REFERENCES revision, key TEXT NOT NULL, before TEXT, after TEXT,
  PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TRIGGER revision_stays BEFORE UPDATE ON revision BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER revision_kept BEFORE DELETE ON revision BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER change_stays BEFORE UPDATE ON change BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
CREATE TRIGGER change_kept BEFORE DELETE ON change BEGIN SELECT RAISE(ABORT, 'the log only grows'); END;
PRAGMA user_version = 1;
"""
UNGUARDED = "".join(
    f"DROP TRIGGER IF EXISTS {table}_{what};"
    for table in ("revision", "change", "origin")
    for what in ("stays", "kept")
)


def fill(store: SqliteStore) -> None:
    """Five revisions by two people: records come, change and go."""
    write(store, put(CONTOSO), put(MACHINE))
    write(store, put(FABRIKAM), put(PREFIX), put(GRANT), actor="grace")
    write(store, Put(key_of(MACHINE), None))
    write(
        store, put(MACHINE), put(CONTOSO)._replace(body='{"name":"ünïcode \\u0007 \\"quoted\\""}'), actor="grace"
    )
    write(store, put(CONTOSO))


def format_1(path: Path, *, revisions: int = 5) -> None:
    """A store as the first version of portward wrote it, with the same five revisions, or more small ones."""
    with closing(sqlite3.connect(path)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(FORMAT_1)
        old.execute("INSERT INTO store VALUES (?)", (b"0123456789abcdef",))
        with closing(opened(path.with_name("new.db"))) as new:
            fill(new)
            for number in range(5, revisions):
                write(new, Put("subscriptions/x", str(number)))
        old.execute("ATTACH ? AS new", (str(path.with_name("new.db")),))
        old.execute("INSERT INTO record SELECT * FROM new.record")
        old.execute("INSERT INTO revision SELECT number, at, actor FROM new.revision")
        old.execute("INSERT INTO change SELECT * FROM new.change")
        old.commit()


def version(path: Path) -> int:
    """The format number in the file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def tamper(path: Path, script: str) -> None:
    """Changes the store by SQL, without portward."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{UNGUARDED} {script}")


def findings(path: Path, expect: Mark | None = None) -> list[IntegrityIssue]:
    """The issues that the check finds in a store."""
    return checked(path, expect)[0]


def checked(path: Path, expect: Mark | None = None) -> tuple[list[IntegrityIssue], Check]:
    """The issues that the check finds in a store, and the check."""
    with closing(SqliteStore(path)) as store, store.reading():
        check = Check(store, expect)
        return list(check.issues()), check


def head(path: Path) -> Mark:
    """The newest entry."""
    found = checked(path)[1].head
    assert found is not None
    return found


def short_findings(path: Path) -> list[tuple[IntegrityIssueKind, int | None, tuple[str, ...]]]:
    """The issues without their texts."""
    return [(finding.kind, finding.revision, finding.keys) for finding in findings(path)]


@pytest.fixture
def log(store: SqliteStore, path: Path) -> Path:
    """The path of a store with a log."""
    fill(store)
    store.close()
    assert findings(path) == []
    return path


def rehash(path: Path, number: int, *, also_after: bool = False) -> None:
    """Gives an entry the hash that fits what it holds now; with `also_after`, all later ones too."""
    with closing(SqliteStore(path)) as store:
        entries = [entry for entry in store.log(number - 1) if also_after or entry.number == number]
        previous = entries[0].previous
        for entry in entries:
            assert previous is not None
            sealing = Sealing(previous, entry.number, entry.at, entry.actor)
            sealing.add(list(store.rows(entry.number)))
            row = (previous, sealing.hash(), entry.number)
            store._database.connection.execute("UPDATE revision SET previous = ?, hash = ? WHERE number = ?", row)
            previous = sealing.hash()


# --- what is hashed ---


def plain(*lines: list[Any]) -> bytes:
    """The documented encoding, made without portward's own code."""
    texts = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return hashlib.sha256("".join(texts).encode()).digest()


def test_the_hashes_are_as_documented(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        origin, entries = store.origin(), list(store.log())
        assert origin is not None
        at = str(origin.at)
        assert origin.hash == plain(["portward log", store.identity().hex(), at, 0])
        previous = origin.hash
        for entry in entries:
            assert (entry.previous, entry.changes) == (previous, len(list(store.rows(entry.number))))
            first = [previous.hex(), entry.number, entry.at, entry.actor]
            assert entry.hash == plain(first, *map(list, store.rows(entry.number)))
            previous = entry.hash
    assert [(entry.number, entry.actor) for entry in entries] == [
        (1, "ada"), (2, "grace"), (3, "ada"), (4, "grace"), (5, "ada")
    ]  # fmt: skip


@given(st.text(), st.lists(st.tuples(st.text(), st.none() | st.text(), st.none() | st.text())))
def test_the_encoding_is_plain_json_whatever_the_texts(
    actor: str, rows: list[tuple[str, str | None, str | None]]
) -> None:
    sealing = Sealing(b"\1" * 32, 7, "2026", actor)
    for row in rows:
        sealing.add([row])
    assert sealing.hash() == plain(["01" * 32, 7, "2026", actor], *map(list, rows))


def test_a_hash_that_was_noted_down_stays_what_it_is() -> None:
    sealing = Sealing(
        origin_hash(bytes(16), "2026-06-01T12:00:00+00:00", 0), 1, "2026-06-01T12:00:00+00:00", "ada"
    )
    sealing.add([("subscriptions/x", None, '{"name":"é \\u0007"}'), ("subscriptions/y", "\n\t\x7f\0", None)])
    assert sealing.hash().hex() == "38db5525a8c721e2c863f46047bfab4b3c9fc89e72a3cbd96ea2d09c9a9e0517"


def test_entries_come_after_a_revision(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        assert [entry.number for entry in store.log(3)] == [4, 5]


def test_the_newest_revision_says_when_it_was_written(store: SqliteStore) -> None:
    assert store.written() is None
    write(store, put(CONTOSO))
    assert store.written() == NOON


def test_a_log_without_entries_is_whole(store: SqliteStore, path: Path) -> None:
    found, check = checked(path)
    assert (found, check.revisions, check.changes) == ([], 0, 0)
    assert check.head is not None
    assert check.head.number == 0
    write(store, put(CONTOSO))
    assert findings(path, check.head) == []


def test_a_check_counts_and_gives_the_head(log: Path) -> None:
    found, check = checked(log)
    assert (found, check.revisions, check.changes) == ([], 5, 9)
    with closing(SqliteStore(log)) as store:
        assert check.head == (5, list(store.log())[-1].hash)


# --- what was done to a log ---


@pytest.mark.parametrize(
    "change",
    ["actor = 'eve'", "at = '2026-06-01 12:00:00+00:00'", "actor = CAST(actor AS BLOB)", "hash = zeroblob(32)"],
)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_changed_entry_is_found_and_named(log: Path, change: str, number: int) -> None:
    keys = tuple(row[0] for row in rows_of(log, number))
    tamper(log, f"UPDATE revision SET {change} WHERE number = {number}")
    assert short_findings(log) == [(IntegrityIssueKind.CHANGED, number, keys)]
    assert str(findings(log)[0]).startswith(f"revision {number}, by ")


@pytest.mark.parametrize("column", ["before", "after"])
def test_a_changed_change_is_found_and_its_key_named(log: Path, column: str) -> None:
    tamper(log, f"UPDATE change SET {column} = 'x' WHERE revision = 3")
    assert short_findings(log)[0] == (IntegrityIssueKind.CHANGED, 3, (key_of(MACHINE),))
    assert "by ada at 2026-06-01T12:00:00+00:00, does not fit its hash" in str(findings(log)[0])


def test_a_change_that_was_taken_out_is_found(log: Path) -> None:
    tamper(log, f"DELETE FROM change WHERE revision = 2 AND key = '{key_of(GRANT)}'")
    assert short_findings(log) == [
        (IntegrityIssueKind.CHANGED, 2, (key_of(PREFIX), key_of(FABRIKAM))),
        (IntegrityIssueKind.RECORD, None, (key_of(GRANT),)),
    ]


def test_a_change_that_was_put_in_is_found(log: Path) -> None:
    tamper(log, "INSERT INTO change VALUES (1, 'exemptions/x', 'y', NULL)")
    assert [(kind, revision) for kind, revision, _ in short_findings(log)] == [(IntegrityIssueKind.CHANGED, 1)]


@pytest.mark.parametrize("also", ["", "DELETE FROM change WHERE revision = 3;"])
def test_an_entry_that_is_missing_in_the_middle_is_named(log: Path, also: str) -> None:
    tamper(log, f"DELETE FROM revision WHERE number = 3; {also}")
    found = short_findings(log)
    assert found[0] == (IntegrityIssueKind.MISSING, 3, ())
    assert found[1:] == ([] if also else [(IntegrityIssueKind.STRAY, 3, (key_of(MACHINE),))])
    assert str(findings(log)[0]) == "revision 3 is missing: 4 comes next"


def test_entries_that_are_missing_at_the_end_are_found_by_the_records(log: Path) -> None:
    tamper(log, "DELETE FROM revision WHERE number >= 3; DELETE FROM change WHERE revision >= 3")
    # The missing entries had not changed CONTOSO and MACHINE, so no record differs.
    assert short_findings(log) == []
    tamper(log, "DELETE FROM revision WHERE number >= 2; DELETE FROM change WHERE revision >= 2")
    keys = {key_of(FABRIKAM), key_of(PREFIX), key_of(GRANT)}
    assert {(kind, *of) for kind, _, of in short_findings(log)} == {
        (IntegrityIssueKind.RECORD, key) for key in keys
    }


def test_the_newest_entry_without_its_changes_is_found(log: Path) -> None:
    tamper(log, "DELETE FROM revision WHERE number = 5")
    assert (IntegrityIssueKind.STRAY, 5, (key_of(CONTOSO),)) in short_findings(log)
    assert (IntegrityIssueKind.RECORD, 4, (key_of(CONTOSO),)) in short_findings(log)


def test_a_log_that_was_cut_at_its_beginning_says_so(log: Path) -> None:
    tamper(log, "DELETE FROM revision WHERE number <= 2; DELETE FROM change WHERE revision <= 2")
    assert short_findings(log)[0] == (IntegrityIssueKind.MISSING, 1, ())
    assert str(findings(log)[0]) == "revisions 1 to 2 are missing: the log begins with 3"


def test_an_entry_whose_hash_was_made_to_fit_is_named_by_the_one_after(log: Path) -> None:
    tamper(log, "UPDATE revision SET actor = 'eve' WHERE number = 3")
    rehash(log, 3)
    assert short_findings(log) == [(IntegrityIssueKind.CHANGED, 3, (key_of(MACHINE),))]
    assert str(findings(log)[0]) == (
        "revision 3, by eve at 2026-06-01T12:00:00+00:00, was changed, and its hash with it: "
        "revision 4, by grace at 2026-06-01T12:00:00+00:00, carries another hash of it; it holds now "
        f"1 change: {key_of(MACHINE)}"
    )


def test_a_log_that_was_written_anew_is_found_by_who_expects_a_later_entry(log: Path) -> None:
    before = head(log)
    tamper(log, "UPDATE revision SET actor = 'eve' WHERE number = 3")
    rehash(log, 3, also_after=True)
    assert findings(log) == []
    found = findings(log, before)
    assert [(finding.kind, finding.revision) for finding in found] == [(IntegrityIssueKind.EXPECTED, 5)]
    assert "it was written anew" in str(found[0])


def test_a_store_that_was_taken_back_is_found_by_who_expects_a_later_entry(log: Path) -> None:
    backup = log.with_name("backup.db")
    shutil.copy(log, backup)
    older = head(log)
    with closing(opened(log)) as store:
        write(store, Put(key_of(CONTOSO), None))
    newer = head(log)
    assert findings(log, older) == findings(log, newer) == []
    assert findings(backup) == []
    assert [(finding.kind, finding.revision) for finding in findings(backup, newer)] == [
        (IntegrityIssueKind.EXPECTED, 6)
    ]


def test_a_record_that_was_changed_past_the_log_is_named(log: Path) -> None:
    tamper(log, f"UPDATE record SET body = '{{}}' WHERE key = '{key_of(GRANT)}'")
    assert short_findings(log) == [(IntegrityIssueKind.RECORD, 2, (key_of(GRANT),))]
    assert "is not as revision 2 left it" in str(findings(log)[0])


def test_a_record_that_was_taken_away_past_the_log_is_named(log: Path) -> None:
    tamper(log, f"DELETE FROM record WHERE key = '{key_of(GRANT)}'")
    assert short_findings(log) == [(IntegrityIssueKind.RECORD, 2, (key_of(GRANT),))]
    assert "is not there, and revision 2 left one" in str(findings(log)[0])


def test_a_record_that_was_added_past_the_log_is_named(log: Path) -> None:
    tamper(log, "INSERT INTO record VALUES ('exemptions/x', '{}')")
    assert short_findings(log) == [(IntegrityIssueKind.RECORD, None, ("exemptions/x",))]


def test_a_record_is_agreed_with_again_once_it_is_written_anew(log: Path) -> None:
    tamper(log, f"UPDATE record SET body = X'80' WHERE key = '{key_of(GRANT)}'")
    with closing(opened(log)) as store:
        write(store, put(GRANT))
    assert findings(log) == []


@pytest.mark.parametrize("change", ["at = '2020'", "sealed = 5", "hash = zeroblob(32)"])
def test_a_changed_origin_is_found(log: Path, change: str) -> None:
    tamper(log, f"UPDATE origin SET {change}")
    assert short_findings(log) == [(IntegrityIssueKind.ORIGIN, None, ())]


def test_an_origin_whose_hash_was_made_to_fit_is_found(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        found = origin_hash(store.identity(), "2020", 0)
    tamper(log, f"UPDATE origin SET at = '2020', hash = X'{found.hex()}'")
    assert short_findings(log) == [(IntegrityIssueKind.ORIGIN, None, ())]


def test_another_stores_identity_is_found(log: Path) -> None:
    tamper(log, "UPDATE store SET identity = X'00112233445566778899aabbccddeeff'")
    assert short_findings(log) == [(IntegrityIssueKind.ORIGIN, None, ())]


@pytest.mark.parametrize("number", [0, -1])
def test_an_entry_before_the_first_is_found(log: Path, number: int) -> None:
    tamper(log, f"INSERT INTO revision SELECT {number}, at, actor, previous, hash FROM revision WHERE number = 1")
    assert short_findings(log) == [(IntegrityIssueKind.CHANGED, number, ())]


CELLS = {
    "store": ("identity",),
    "record": ("key", "body"),
    "revision": ("number", "at", "actor", "previous", "hash"),
    "change": ("revision", "key", "before", "after"),
    "origin": ("at", "sealed", "hash"),
}
VALUES = (
    st.none() | st.integers(-2, 8) | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
    | st.binary(min_size=16, max_size=16) | st.binary(min_size=32, max_size=32)
    | st.sampled_from([*texts(*ALL), *texts(*ALL).values()])
)  # fmt: skip


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a log that no test changes."""
    path = tmp_path_factory.mktemp("sealed") / "portward.db"
    with closing(opened(path)) as store:
        fill(store)
    return path


def contents(connection: sqlite3.Connection) -> list[Any]:
    """Every cell, with its type."""
    connection.text_factory = bytes
    found = []
    for table, columns in CELLS.items():
        wanted = ", ".join(f"typeof({column}), {column}" for column in columns)
        found += connection.execute(f"SELECT {wanted} FROM {table}").fetchall()
    connection.text_factory = str
    return found


def is_found(path: Path) -> bool:
    """Whether the check finds something, or the store is not even opened."""
    try:
        return bool(findings(path))
    except StoreError:
        return True


def row_of(connection: sqlite3.Connection, table: str, number: int) -> tuple[str, tuple[Any, ...]]:
    """A condition that picks a row of a table, and its parameters."""
    keys = {"change": ("revision", "key"), "record": ("key",), "revision": ("number",)}.get(table)
    if keys is None:
        return "true", ()
    rows = connection.execute(f"SELECT {', '.join(keys)} FROM {table}").fetchall()
    return " AND ".join(f"{key} = ?" for key in keys), rows[number % len(rows)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cell=st.sampled_from([(table, column) for table, columns in CELLS.items() for column in columns]),
    number=st.integers(0, 100),
    value=VALUES,
    convert=st.sampled_from(["?", "CAST(? AS BLOB)", "CAST(CAST(? AS BLOB) AS TEXT)"]),
)
def test_any_edit_of_any_cell_is_found(
    sealed: Path, tmp_path: Path, cell: tuple[str, str], number: int, value: Any, convert: str
) -> None:
    path = tmp_path / "edited.db"
    shutil.copy(sealed, path)
    table, column = cell
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(UNGUARDED)
        before = contents(connection)
        where, parameters = row_of(connection, table, number)
        try:
            connection.execute(f"UPDATE {table} SET {column} = {convert} WHERE {where}", (value, *parameters))
        except sqlite3.Error:  # SQLite refuses it itself
            assume(False)
        assume(contents(connection) != before)
        connection.commit()
    assert is_found(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(column=st.sampled_from(["at", "actor", "key", "before", "after", "body"]), number=st.integers(0, 100))
def test_bytes_in_place_of_the_same_text_are_found(sealed: Path, tmp_path: Path, column: str, number: int) -> None:
    test_any_edit = test_any_edit_of_any_cell_is_found.hypothesis.inner_test  # type: ignore[attr-defined]
    table = "record" if column == "body" else "revision" if column in ("at", "actor") else "change"
    with closing(sqlite3.connect(sealed)) as connection:
        where, parameters = row_of(connection, table, number)
        found = connection.execute(f"SELECT {column} FROM {table} WHERE {where}", parameters).fetchone()[0]
    assume(found is not None)
    test_any_edit(sealed, tmp_path, (table, column), number, found, "CAST(? AS BLOB)")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.sampled_from(["record", "revision", "change", "origin"]), number=st.integers(0, 100))
def test_any_row_that_is_taken_away_is_found(sealed: Path, tmp_path: Path, table: str, number: int) -> None:
    path = tmp_path / "cut.db"
    shutil.copy(sealed, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(UNGUARDED)
        where, parameters = row_of(connection, table, number)
        connection.execute(f"DELETE FROM {table} WHERE {where}", parameters)
        connection.commit()
    assert is_found(path)


def test_texts_that_are_no_utf_8_have_different_hashes(log: Path) -> None:
    """Each such text has its own hash, at any place among a thousand others."""
    with closing(opened(log)) as store:
        write(store, *(Put(f"subscriptions/{number:04}", "{}") for number in range(2500)))
    tamper(log, "UPDATE change SET after = CAST(X'80' AS TEXT) WHERE revision = 6 AND key = 'subscriptions/1500'")
    rehash(log, 6)
    before = head(log)
    assert [kind for kind, _, _ in short_findings(log)] == [IntegrityIssueKind.RECORD]
    tamper(log, "UPDATE change SET after = CAST(X'81' AS TEXT) WHERE revision = 6 AND key = 'subscriptions/1500'")
    assert short_findings(log)[0][:2] == (IntegrityIssueKind.CHANGED, 6)
    rehash(log, 6)
    assert head(log).hash != before.hash


# --- writing ---


@pytest.mark.parametrize("lost", ["X'00'", "'text of thirty-two characters....'"])
def test_an_entry_that_cannot_be_hashed_is_not_written(log: Path, lost: str) -> None:
    tamper(log, f"UPDATE revision SET hash = {lost} WHERE number = 5")
    with closing(opened(log)) as store:
        before = held(store)
        with pytest.raises(StoreError, match="the log has lost the hash of revision 5, so no entry can follow it"):
            write(store, Put("subscriptions/x", "{}"))
        assert (store.revision(), held(store), list(store.changes(5))) == (5, before, [])


def test_a_failure_to_hash_leaves_nothing(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise MemoryError

    with closing(opened(log)) as store:
        monkeypatch.setattr(Sealing, "hash", broken)
        with pytest.raises(MemoryError):
            write(store, Put("subscriptions/x", "{}"))
        monkeypatch.undo()
        assert store.revision() == 5
    assert findings(log) == []


# Stops for ever in `_hashed` at a given revision. Its changes until then are in the database's WAL.
STOPPED = """
import sys, time
from portward.store.sqlite.log import Log
from unit.store.samples import *
hashed = Log._hashed
def stop(self, previous, number, at, actor):
    if number == int(sys.argv[2]):
        self._database.execute("PRAGMA cache_size = 1")
        print("stopped", flush=True)
        time.sleep(60)
    return hashed(self, previous, number, at, actor)
Log._hashed = stop
store = opened(Path(sys.argv[1]))
write(store, *(Put(f"attachments/vni1/{number}", "x" * 200) for number in range(20_000)))
"""


def test_a_writer_that_dies_while_it_hashes_leaves_the_old_state(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        before = held(store)
    kill_while_it_hashes(log, 6)
    with closing(opened(log)) as store:
        assert (store.revision(), held(store)) == (5, before)
    assert findings(log) == []


def kill_while_it_hashes(path: Path, revision: int) -> None:
    """Lets another process seal the store, or write to it, and kills it while it hashes that revision."""
    writer = python(STOPPED, path, str(revision))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "stopped\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()


# --- a store of format 1 ---


def test_a_store_of_format_1_is_read_as_it_is(path: Path) -> None:
    format_1(path)
    with closing(SqliteStore(path)) as store:
        assert (store.revision(), store.written()) == (5, NOON)
        assert held(store) == texts(*ALL)
        assert [change.revision for change in store.changes(0)] == [1, 1, 2, 2, 2, 3, 4, 4, 5]
        assert store.origin() is None
        assert [(entry.number, entry.hash) for entry in store.log()] == [(number, None) for number in range(1, 6)]
    assert short_findings(path) == [(IntegrityIssueKind.UNSEALED, None, ())]
    assert version(path) == 1


def test_what_can_be_found_without_hashes_is_found(path: Path) -> None:
    format_1(path)
    tamper(path, f"DELETE FROM revision WHERE number = 3; DELETE FROM record WHERE key = '{key_of(GRANT)}'")
    assert [kind for kind, _, _ in short_findings(path)] == [
        IntegrityIssueKind.UNSEALED,
        IntegrityIssueKind.MISSING,
        IntegrityIssueKind.STRAY,
        IntegrityIssueKind.RECORD,
    ]


def test_who_opens_it_to_make_or_write_it_seals_it(path: Path) -> None:
    format_1(path)
    opened(path).close()
    assert version(path) == 2
    found, check = checked(path)
    assert (found, check.revisions, check.changes) == ([], 5, 9)
    assert check.origin is not None
    assert check.origin.sealed == 5
    tamper(path, "UPDATE revision SET actor = 'eve' WHERE number = 4")
    assert [(kind, revision) for kind, revision, _ in short_findings(path)] == [(IntegrityIssueKind.CHANGED, 4)]


def test_who_writes_to_it_seals_it(path: Path) -> None:
    format_1(path)
    with closing(SqliteStore(path)) as store:
        assert version(path) == 1
        assert write(store, Put(key_of(GRANT), None)) == 6
    assert version(path) == 2
    found, check = checked(path)
    assert (found, check.revisions) == ([], 6)
    assert check.origin is not None
    assert check.origin.sealed == 5


def test_a_sealed_store_is_as_one_that_was_made_so(path: Path, tmp_path: Path) -> None:
    """It has the same tables, columns and triggers, so its log cannot be rewritten either."""

    def shape(of: Path) -> list[Any]:
        with closing(sqlite3.connect(of)) as connection:
            found = connection.execute("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2").fetchall()
            for table in CELLS:
                found += connection.execute(f"PRAGMA table_info({table})").fetchall()
            return found

    format_1(path)
    opened(path).close()
    opened(tmp_path / "fresh.db").close()
    assert shape(path) == shape(tmp_path / "fresh.db")
    for statement in ("UPDATE revision SET actor = 'x'", "DELETE FROM revision", "DELETE FROM change",
                      "DELETE FROM origin", "UPDATE origin SET sealed = 0"):  # fmt: skip
        with closing(sqlite3.connect(path)) as other, pytest.raises(sqlite3.IntegrityError, match="only grows"):
            other.execute(statement)


def test_sealing_changes_nothing_of_what_was_there(path: Path) -> None:
    format_1(path)
    with closing(SqliteStore(path)) as store:
        identity, records, log = store.identity(), held(store), list(store.changes(0))
    with closing(opened(path)) as store:
        assert (store.identity(), held(store), list(store.changes(0))) == (identity, records, log)


def test_a_process_that_dies_while_it_seals_leaves_the_old_state(path: Path) -> None:
    format_1(path, revisions=300)
    kill_while_it_hashes(path, 250)
    assert version(path) == 1
    with closing(SqliteStore(path)) as store:
        assert (store.revision(), store.origin()) == (300, None)
    opened(path).close()
    assert findings(path) == []


def test_a_reader_goes_on_while_others_seal_the_store(path: Path) -> None:
    format_1(path)
    with closing(SqliteStore(path)) as reader:
        revision, records = reader.read_all()
        first = next(records)
        with closing(opened(path)) as writer:
            write(writer, Put(key_of(GRANT), None))
        assert (revision, dict([first, *records])) == (5, texts(*ALL))
        assert reader.revision() == 6
        assert [change.revision for change in reader.changes(5)] == [6]
        assert reader.origin() is not None
        with reader.reading():
            assert list(Check(reader).issues()) == []
        assert write(reader, put(GRANT)) == 7


def test_an_older_portward_that_had_it_open_cannot_write(path: Path) -> None:
    format_1(path)
    with closing(sqlite3.connect(path)) as older:
        assert older.execute("SELECT max(number) FROM revision").fetchone() == (5,)
        opened(path).close()
        with pytest.raises(sqlite3.OperationalError, match="5 columns but 3 values"):
            older.execute("INSERT INTO revision VALUES (6, '', 'older')")


def test_a_newer_portward_that_came_meanwhile_is_not_written_over(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        tamper(log, "PRAGMA user_version = 3")
        with pytest.raises(StoreError, match="written by a newer portward"):
            write(store, Put(key_of(GRANT), None))


def test_a_sealed_store_that_says_it_is_of_format_1_is_not_sealed_anew(log: Path) -> None:
    tamper(log, "UPDATE revision SET actor = 'eve' WHERE number = 4; PRAGMA user_version = 1")
    assert [kind for kind, _, _ in short_findings(log)] == [IntegrityIssueKind.UNSEALED]
    with pytest.raises(StoreError, match="origin already exists"):
        opened(log)


# --- reading at one state ---


def test_a_check_is_of_one_state_while_others_write(store: SqliteStore, path: Path) -> None:
    fill(store)
    with closing(SqliteStore(path)) as reader, reader.reading():
        reader.get("x")
        write(store, Put(key_of(GRANT), None))
        check = Check(reader)
        assert list(check.issues()) == []
        assert (check.revisions, reader.revision()) == (5, 5)
        write(store, put(GRANT))
        assert reader.revision() == 5
    assert checked(path)[1].revisions == 7


def test_a_check_that_was_left_half_way_ends_its_state(log: Path) -> None:
    with closing(SqliteStore(log)) as store:
        with store.reading():
            next(store.log())
        with store.reading(), pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
        assert write(store, Put(key_of(GRANT), None)) == 6


# --- marks ---


def test_a_mark_is_read_as_it_is_printed() -> None:
    mark = Mark(120, bytes(range(32)))
    assert parse_mark(str(mark)) == parse_mark(f" {str(mark).upper()}\n") == mark


@pytest.mark.parametrize(
    "text", ["", "120", "120:", "120:ab12", f"x:{'a' * 64}", f"-1:{'a' * 64}", f"1:{'a' * 65}"]
)
def test_a_text_that_is_no_mark_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--expect: .* is not REVISION:HASH with all 64 digits"):
        parse_mark(text)


def rows_of(path: Path, number: int) -> Iterator[tuple[Any, Any, Any]]:
    """The changes of a revision."""
    with closing(SqliteStore(path)) as store:
        yield from list(store.rows(number))
