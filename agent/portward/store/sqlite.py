"""The embedded store: an SQLite database in WAL mode, with a log of who changed what and when.

Its format is 2. A store of format 1 has the same records and the same log without hashes: it is read as it is, and
whoever writes to it, or opens it to do so, seals its log first, in one transaction (`_seal`).

What was accepted survives a power cut: `synchronous=FULL` syncs the log of each commit. NORMAL would be
quicker and could lose the last changes, and one of them may be a revocation.

Who only reads needs to write too, to the index that WAL keeps beside the database (`-shm`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from portward.base.clock import utc_now
from portward.errors import ConflictError, StoreError
from portward.store.chain import Sealing, origin_hash
from portward.store.notifier import ChangeListener, create_notifier, notify_followers
from portward.store.protocol import (
    HASH_BYTES,
    Cell,
    Change,
    Entry,
    LogRow,
    NoStoreError,
    Odd,
    Origin,
    Progress,
    Put,
)

_log = logging.getLogger("portward.store")

_FORMAT: Final = 2
# The format before, whose log has no hashes.
_UNSEALED: Final = 1
# How long a writer waits for another one, in seconds: a million records take about ten.
_PATIENCE = 20.0
# How long an agent waits for whoever holds the store locked, in seconds. It tries again each second, and the end
# of a grant must not wait behind it.
AGENT_PATIENCE: Final = 1.0
# How long a verb waits for a lock before it says so, in seconds: a change of a few records takes milliseconds.
_SILENT_S: Final = 1.0
# Records that are written between two reports of progress.
_BATCH: Final = 20_000
_IDENTITY_BYTES: Final = 16
# SQLite's integers have 63 bits and a sign; the next revision must still be one.
_LAST_REVISION: Final = 2**63 - 1
# What the WAL shrinks to after a large change, in bytes.
_WAL_LIMIT: Final = 64 * 1024 * 1024

_REVISION: Final = """(
  number INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL, previous BLOB NOT NULL, hash BLOB NOT NULL
)"""
_ORIGIN: Final = "CREATE TABLE origin (at TEXT NOT NULL, sealed INTEGER NOT NULL, hash BLOB NOT NULL)"


def _only_grows(table: str) -> str:
    """The statements after which SQLite itself refuses to change a row of the table, or to take it away."""
    refuse = "BEGIN SELECT RAISE(ABORT, 'the log only grows'); END"
    return f"""
CREATE TRIGGER {table}_stays BEFORE UPDATE ON {table} {refuse};
CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} {refuse};
"""


_SCHEMA: Final = f"""
CREATE TABLE store (identity BLOB NOT NULL);
CREATE TABLE record (key TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE revision {_REVISION};
CREATE TABLE change (
  revision INTEGER NOT NULL REFERENCES revision, key TEXT NOT NULL, before TEXT, after TEXT,
  PRIMARY KEY (revision, key)
) WITHOUT ROWID;
{_ORIGIN};
{_only_grows("revision")}
{_only_grows("change")}
{_only_grows("origin")}
PRAGMA user_version = {_FORMAT};
"""

# From format 1. A table can be given no column that must not be NULL, so a new one takes the old one's place; with
# that one its triggers go.
_WIDEN: Final = f"CREATE TABLE sealed_revision {_REVISION}"
_SEAL_ONE: Final = "INSERT INTO sealed_revision SELECT number, at, actor, ?2, ?3 FROM revision WHERE number = ?1"
_REPLACE: Final = f"""
DROP TABLE revision;
ALTER TABLE sealed_revision RENAME TO revision;
{_only_grows("revision")}
{_only_grows("origin")}
PRAGMA user_version = {_FORMAT};
"""

# A record that is there already as it is to be makes no line in the log.
_LOG: Final = """
INSERT INTO change SELECT ?1, ?2, body, ?3 FROM (SELECT 1) LEFT JOIN record ON key = ?2 WHERE body IS NOT ?3
"""

# Backwards, attachments come last; what is no key of ours may stand anywhere.
_RECORDS: Final = "SELECT key, body FROM record WHERE ?1 IS NULL OR key < ?1 ORDER BY key DESC"

_ENTRIES: Final = """
SELECT number, at, actor, {hashes}, (SELECT count(*) FROM change WHERE revision = number)
FROM revision WHERE ?1 IS NULL OR number > ?1 ORDER BY number
"""
_ROWS: Final = """
SELECT key, before, after FROM change WHERE revision = ?1 AND (?2 IS NULL OR key > ?2) ORDER BY key
"""
# From each revision to the next one, since a bulk change has a million rows under one.
_STRAYS: Final = """
WITH RECURSIVE found (number) AS (
  SELECT min(revision) FROM change
  UNION ALL
  SELECT (SELECT min(revision) FROM change WHERE revision > number) FROM found WHERE number IS NOT NULL
)
SELECT number FROM found WHERE number IS NOT NULL AND number NOT IN (SELECT number FROM revision)
"""
# Rows that are read at once.
_PIECE: Final = 1000


class SqliteStore:
    """A `Store` in the file at `path`."""

    def __init__(self, path: Path, *, create: bool = False, agent: bool = False) -> None:
        """Opens the database, and makes it where it is missing if `create`. An `agent` waits for a lock of another
        process for `AGENT_PATIENCE`. Raises NoStoreError where it is missing and not made, StoreError where it
        cannot be used."""
        self._path = path.absolute()
        self._name = f"sqlite:{path}"
        self._bell = self._path.with_name(path.name + ".bell")
        self._listener: ChangeListener | None = None
        self._readings = 0
        self._held = False
        self._patience = AGENT_PATIENCE if agent else _PATIENCE
        self._waits = ""
        with self._errors():
            self._find(create=create)
            # The URI keeps SQLite from making a file that has gone away meanwhile.
            self._connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode=rw", uri=True, timeout=self._patience, isolation_level=None
            )
            try:
                self._connection.text_factory = _any_text
                self._prepare(create=create, agent=agent)
                self._read_identity()
                self._file = self._file_now()
            except BaseException:
                self._connection.close()
                raise
        create_notifier(self._bell, like=self._path)
        with contextlib.suppress(OSError):
            self._listener = ChangeListener(self._bell)

    def identity(self) -> bytes:
        """See `Store`. Read each time: another store's backup may be restored into the open file."""
        with self._errors():
            return self._read_identity()

    def revision(self) -> int:
        """See `Store`. Costs some microseconds."""
        with self._errors():
            self._expect_same_file()
            return self._newest()

    def hash_of(self, revision: int) -> bytes | None:
        """See `Store`. Costs some microseconds."""
        with self._errors():
            if self._format() == _UNSEALED:
                return self._unsealed_hash(revision)
            return self._hash_of(revision)

    def get(self, key: str) -> str | None:
        """See `Store`."""
        with self._errors():
            row = self._connection.execute("SELECT body FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else _text(row[0])

    def read_all(self) -> tuple[int, Generator[tuple[str, str], None, None]]:
        """See `Store`."""
        with self._errors():
            self._expect_same_file()
            if not self._held:
                self._end_transaction()
                self._connection.execute("BEGIN")
            revision = self._newest()
        self._readings += 1
        return revision, self._records(self._readings)

    def under(self, prefix: str) -> Iterator[tuple[str, str]]:
        """See `Store`."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT key, body FROM record WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, f"{prefix}\U0010ffff"),
            )
            for key, body in rows:
                yield _text(key), _text(body)

    def history(self, key: str) -> Iterator[Change]:
        """See `Store`. Reads through the whole log."""
        return self._changes("WHERE key = ?", key)

    def changes(self, since: int) -> Generator[Change, None, None]:
        """See `Store`. One statement, so one state of the database."""
        return self._changes("WHERE revision > ?", since)

    def _changes(self, where: str, value: int | str) -> Generator[Change, None, None]:
        with self._errors():
            rows = self._connection.execute(  # `where` is one of two constants
                "SELECT revision, at, actor, key, before, after FROM change JOIN revision ON number = revision "  # noqa: S608
                f"{where} ORDER BY revision, key",
                (value,),
            )
            for revision, at, actor, key, before, after in rows:
                bodies = (None if body is None else _text(body) for body in (before, after))
                yield Change(revision, _instant(at), _text(actor), _text(key), *bodies)

    def written(self) -> datetime | None:
        """See `Store`. Costs some microseconds."""
        with self._errors():
            row = self._connection.execute("SELECT at FROM revision ORDER BY number DESC LIMIT 1").fetchone()
        return None if row is None else _instant(row[0])

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """See `Store`."""
        with self._errors():
            self._expect_same_file()
            self._end_transaction()
            self._connection.execute("BEGIN")
            # The state is that of the first look.
            self._connection.execute("SELECT 1 FROM store").fetchone()
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._end_transaction()

    def origin(self) -> Origin | None:
        """See `Store`."""
        with self._errors():
            if self._format() == _UNSEALED:
                return None
            with self._decoding(_cell_of_text):
                rows = self._connection.execute("SELECT at, sealed, hash FROM origin LIMIT 2").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][1], int):
            return Origin("", 0, None)
        at, sealed, found = rows[0]
        return Origin(_cell(at), sealed, _hash(found))

    def log(self, since: int | None = None) -> Iterator[Entry]:
        """See `Store`."""
        with self._errors():
            hashes = "NULL, NULL" if self._format() == _UNSEALED else "previous, hash"
            rows = self._connection.execute(_ENTRIES.format(hashes=hashes), (since,))
            while True:
                with self._decoding(_cell_of_text):
                    row = rows.fetchone()
                if row is None:
                    return
                number, at, actor, previous, found, changes = row
                yield Entry(number, _cell(at), _cell(actor), _hash(previous), _hash(found), changes)

    def rows(self, revision: int) -> Iterator[LogRow]:
        """See `Store`."""
        with self._errors():
            for piece in self._pieces(revision):
                yield from piece

    def strays(self) -> Iterator[int | Odd]:
        """See `Store`."""
        with self._errors(), self._decoding(_cell_of_text):
            found = self._connection.execute(_STRAYS).fetchall()
        for (number,) in found:
            yield number if isinstance(number, int) else _odd(number)

    def write(
        self,
        batch: Sequence[Put],
        *,
        expected: int,
        actor: str,
        at: datetime,
        progress: Progress | None = None,
    ) -> int:
        """See `Store`."""
        with self._errors():
            self._expect_same_file()
            self._end_transaction()
            self._seal()
            self._patiently("BEGIN IMMEDIATE")
            try:
                self._expect_format()  # under the lock: a newer portward may have been here
                self._expect(expected)
                if not self._put(batch, expected + 1, actor, max(at, self.written() or at), progress):
                    return expected
                self._connection.execute("COMMIT")
            finally:
                self._end_transaction()
        notify_followers(self._bell)
        return expected + 1

    def fileno(self) -> int | None:
        """See `Store`."""
        return None if self._listener is None else self._listener.fileno()

    def drain(self) -> None:
        """See `Store`."""
        if self._listener is not None:
            self._listener.drain()

    def waits(self) -> str:
        """See `Store`."""
        return self._waits

    def close(self) -> None:
        """See `Store`."""
        if self._listener is not None:
            self._listener.close()
        self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # ours, not the surroundings'
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self._name}: {_in_words(error, self._patience)}") from error
        except OSError as error:
            raise StoreError(f"{self._name}: {error.strerror}") from error

    def _find(self, *, create: bool) -> None:
        if "\0" in str(self._path):
            raise StoreError(f"{self._name}: no file has a NUL in its name")
        if not self._path.parent.is_dir():
            raise StoreError(f"{self._name}: there is no folder {self._path.parent}")
        if self._path.is_dir():
            raise StoreError(f"{self._name}: a folder; the store is a file")
        if self._path.exists():
            return
        if not create:
            raise NoStoreError(f"{self._name}: {_NO_FILE}")
        with contextlib.suppress(FileExistsError):  # somebody else was quicker
            self._make_file()

    def _make_file(self) -> None:
        """Makes an empty file. What root makes belongs to the owner of its folder: the agent is another user,
        and could not open it. SQLite gives the files beside it to the same owner."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
        try:
            if os.geteuid() == 0:
                folder = self._path.parent.stat()
                os.fchown(descriptor, folder.st_uid, folder.st_gid)
        finally:
            os.close(descriptor)

    def _prepare(self, *, create: bool, agent: bool) -> None:
        execute = self._connection.execute
        # The first that reads the file. In another mode than WAL it waits for a writer.
        self._patiently("PRAGMA user_version")
        self._expect_format()
        version = self._format()
        if version == 0:
            if execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{self._name}: an SQLite database, but not portward's")
            if not create:
                raise NoStoreError(f"{self._name}: {_EMPTY_FILE}")
            self._create()
        # Who only looks (`explain`, `audit`) leaves the file as it is.
        if create or agent:
            self._put_wal_back()
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
        if create:
            self._seal()

    def _patiently(self, statement: str) -> None:
        """Executes a statement that waits for a lock, and logs after a moment that it waits: a verb that stands
        still does not say why."""
        execute = self._connection.execute
        if self._patience > _SILENT_S:
            try:
                execute(f"PRAGMA busy_timeout = {_SILENT_S * 1000:.0f}")
                execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                waits = "%s: another process holds it locked: waiting for up to %g s"
                _log.warning(waits, self._name, self._patience)
            finally:
                execute(f"PRAGMA busy_timeout = {self._patience * 1000:.0f}")
        execute(statement)

    def _put_wal_back(self) -> None:
        """In WAL mode, in which a store is made, readers and a writer do not wait for each other. The mode stays
        in the file, and any tool can change it. It can be put back only while nobody else has the store open."""
        mode = self._connection.execute("PRAGMA journal_mode").fetchone()[0]
        if mode == "wal":
            return
        with contextlib.suppress(sqlite3.OperationalError):
            if self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal":
                _log.warning("%s: its journal mode was %s: WAL is put back", self._name, mode)
                return
        self._waits = (
            f"its journal mode is {mode}, and WAL cannot be put back now: readers wait for writers (close what "
            "else has it open, or check the permissions of its folder)"
        )
        _log.warning("%s: %s", self._name, self._waits)

    def _format(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _expect_format(self) -> None:
        version = self._format()
        if version > _FORMAT:
            told = f"written by a newer portward (format {version}, this one knows {_FORMAT})"
            raise StoreError(f"{self._name}: {told}")

    def _create(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA journal_mode = WAL")
        self._patiently("BEGIN IMMEDIATE")
        try:
            # Under the lock: somebody else may have made it meanwhile.
            if self._format() == 0:
                for statement in _statements(_SCHEMA):
                    execute(statement)
                identity = uuid4().bytes
                execute("INSERT INTO store VALUES (?)", (identity,))
                self._begin_log(identity, sealed=0)
            execute("COMMIT")
        finally:
            self._end_transaction()

    def _begin_log(self, identity: bytes, *, sealed: int) -> bytes:
        """Writes the origin of the log's hashes, and gives its hash."""
        at = utc_now().isoformat()
        found = origin_hash(identity, at, sealed)
        self._connection.execute("INSERT INTO origin VALUES (?, ?, ?)", (at, sealed, found))
        return found

    def _seal(self) -> None:
        """Brings a store of format 1 to format 2, all of it or nothing: each revision gets its hash. Does nothing
        to any other store."""
        if self._format() != _UNSEALED:
            return
        execute = self._connection.execute
        self._patiently("BEGIN IMMEDIATE")
        try:
            # Under the lock, as above.
            if self._format() == _UNSEALED:
                execute(_ORIGIN)
                execute(_WIDEN)
                previous = self._begin_log(self._read_identity(), sealed=self._newest())
                for entry in self.log():
                    found = self._hashed(previous, entry.number, entry.at, entry.actor)
                    execute(_SEAL_ONE, (entry.number, previous, found))
                    previous = found
                for statement in _statements(_REPLACE):
                    execute(statement)
            execute("COMMIT")
        finally:
            self._end_transaction()

    def _hashed(self, previous: bytes, number: int, at: Cell, actor: Cell) -> bytes:
        """The hash of a revision, of which all changes are there."""
        sealing = Sealing(previous, number, at, actor)
        for piece in self._pieces(number):
            sealing.add(piece)
        return sealing.hash()

    def _hash_of(self, revision: int) -> bytes | None:
        """The hash of a revision, of the origin for 0, in a log that has hashes."""
        row = self._connection.execute(
            "SELECT hash FROM revision WHERE number = ?1 UNION ALL SELECT hash FROM origin WHERE ?1 = 0",
            (revision,),
        ).fetchone()
        return None if row is None else _hash(row[0])

    def _unsealed_hash(self, revision: int) -> bytes | None:
        """What tells a revision from another one of the same number, in a log that has no hashes."""
        if revision == 0:
            return origin_hash(self._read_identity(), "", 0)
        with self._decoding(_cell_of_text):
            row = self._connection.execute(
                "SELECT at, actor FROM revision WHERE number = ?", (revision,)
            ).fetchone()
        return None if row is None else Sealing(b"", revision, _cell(row[0]), _cell(row[1])).hash()

    def _head(self, revision: int) -> bytes:
        """The hash of a revision, which is the newest; of the origin where it is 0."""
        found = self._hash_of(revision)
        if found is None:
            told = f"the log has lost the hash of revision {revision}, so no entry can follow it"
            raise StoreError(f"{self._name}: {told}; restore it from a backup")
        return found

    def _pieces(self, revision: int) -> Iterator[list[LogRow]]:
        """The changes of a revision as they are kept, in the order of their keys, so many at once that it is
        quick."""
        last: object = None
        try:
            # SQLite's own reading of text is the quickest, and ends at the first one that is no UTF-8.
            for rows in self._fetched(str, revision, None):
                last = rows[-1][0]
                yield rows if _plain(rows) else _cells(rows)
        except sqlite3.OperationalError:
            for rows in self._fetched(_cell_of_text, revision, last):
                yield _cells(rows)

    def _fetched(self, decode: Callable[[bytes], object], revision: int, after: object) -> Iterator[list[Any]]:
        cursor = self._connection.execute(_ROWS, (revision, after))
        while True:
            with self._decoding(decode):
                rows = cursor.fetchmany(_PIECE)
            if not rows:
                return
            yield rows

    @contextlib.contextmanager
    def _decoding(self, decode: Callable[[bytes], object]) -> Iterator[None]:
        """Text that is fetched meanwhile goes through `decode`; others may be reading in between."""
        before = self._connection.text_factory
        self._connection.text_factory = decode
        try:
            yield
        finally:
            self._connection.text_factory = before

    def _read_identity(self) -> bytes:
        row = self._connection.execute("SELECT identity FROM store").fetchone()
        if row is None or not isinstance(row[0], bytes) or len(row[0]) != _IDENTITY_BYTES:
            raise StoreError(f"{self._name}: the store has lost its identity; restore it from a backup")
        return row[0]

    def _file_now(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def _expect_same_file(self) -> None:
        """Whoever restores a backup puts another file in place; the one that is open is then nobody's."""
        try:
            now = self._file_now()
        except FileNotFoundError:
            raise NoStoreError(f"{self._name}: {_NO_FILE}") from None
        if now != self._file:
            raise StoreError(f"{self._name}: another file was put in its place; it has to be opened again")

    def _newest(self) -> int:
        newest = int(self._connection.execute("SELECT ifnull(max(number), 0) FROM revision").fetchone()[0])
        if not 0 <= newest < _LAST_REVISION:
            raise StoreError(f"{self._name}: {newest} is no revision that can be; restore it from a backup")
        return newest

    def _records(self, reading: int) -> Generator[tuple[str, str], None, None]:
        last: object = None
        try:
            with self._errors():
                # SQLite's own reading of text is the quickest, and ends at the first one that is no UTF-8.
                self._connection.text_factory = str
                with contextlib.suppress(sqlite3.OperationalError):
                    for row in self._connection.execute(_RECORDS, (None,)):
                        last, body = row
                        yield row if type(last) is type(body) is str else (_text(last), _text(body))
                    return
                self._connection.text_factory = _any_text
                for key, body in self._connection.execute(_RECORDS, (last,)):
                    yield _text(key), _text(body)
        finally:
            if reading == self._readings:  # else somebody reads anew, and this iterator was left half-way
                self._end_transaction()

    def _end_transaction(self) -> None:
        self._connection.text_factory = _any_text
        if self._held:
            return
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _expect(self, expected: int) -> None:
        newest = self._newest()
        if newest == expected:
            return
        row = self._connection.execute("SELECT at, actor FROM revision WHERE number = ?", (newest,)).fetchone()
        by = f", by {row[1]} at {row[0]}" if row else ""
        raise ConflictError(
            f"{self._name}: it was read at revision {expected} and is now at revision {newest}{by}; "
            "nothing was written; run it again"
        )

    def _put(
        self, batch: Sequence[Put], revision: int, actor: str, at: datetime, progress: Progress | None
    ) -> bool:
        """Writes records and log in the open transaction; False where nothing differed."""
        execute, many = self._connection.execute, self._connection.executemany
        previous, when = self._head(revision - 1), at.astimezone(UTC).isoformat()
        # In the order of the keys the trees grow at their end only.
        ordered = sorted(batch, key=lambda put: put.key)
        for start in range(0, len(ordered), _BATCH):
            part = ordered[start : start + _BATCH]
            many(_LOG, ((revision, put.key, put.body) for put in part))
            many("INSERT OR REPLACE INTO record VALUES (?, ?)", (put for put in part if put.body is not None))
            many("DELETE FROM record WHERE key = ?", ((put.key,) for put in part if put.body is None))
            if progress is not None:
                progress(start + len(part))
        if execute("SELECT 1 FROM change WHERE revision = ? LIMIT 1", (revision,)).fetchone() is None:
            return False
        found = self._hashed(previous, revision, when, actor)
        # Last, since no row of the log can be changed.
        execute("INSERT INTO revision VALUES (?, ?, ?, ?, ?)", (revision, when, actor, previous, found))
        return True


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would commit first, and so lose the lock."""
    statement = ""
    for line in script.strip().splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _any_text(data: bytes) -> str:
    """What a column of text holds, also where it is no UTF-8: one such text must not keep the others from being
    read."""
    return data.decode(errors="backslashreplace")


def _cell_of_text(data: bytes) -> str | Odd:
    """A column of text as it is kept: what is no UTF-8 stays apart from every text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Odd("text", data.hex())


def _cell(value: object) -> Cell:
    """What a column of the log holds, each value apart from every other one."""
    return value if value is None or isinstance(value, str | Odd) else _odd(value)


def _odd(value: object) -> Odd:
    if isinstance(value, Odd):
        return value
    return Odd(type(value).__name__, value.hex() if isinstance(value, bytes) else repr(value))


def _plain(rows: list[Any]) -> bool:
    """Whether rows of a change hold only text and NULL."""
    return _PLAIN.issuperset(map(type, chain.from_iterable(rows)))


_PLAIN: Final = frozenset((str, type(None)))


def _cells(rows: list[Any]) -> list[LogRow]:
    return [(_cell(key), _cell(before), _cell(after)) for key, before, after in rows]


def _hash(value: object) -> bytes | None:
    return value if isinstance(value, bytes) and len(value) == HASH_BYTES else None


def _text(value: object) -> str:
    """What a column of text holds. SQLite keeps bytes there too, if another tool writes them: they become a text
    that is no record, and is refused as that."""
    return value if isinstance(value, str) else repr(value)


def _instant(text: object) -> datetime:
    """When a revision was written; the first of all days where another tool wrote what is no time."""
    try:
        return datetime.fromisoformat(_text(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


# Nobody knows here whether there was one: an empty store in place of a lost one would begin a new history.
_NO_FILE: Final = (
    "no such file: put it back from a backup; only if there never was one, 'portward apply' makes a new one"
)
_EMPTY_FILE: Final = (
    "an empty file: put it back from a backup; only if it never held a store, 'portward apply' makes it one"
)
_CHECK_PERMISSIONS: Final = (
    "check the permissions of the file and of its folder, and that their file system is not read-only"
)
_WORDS: Final = {
    "SQLITE_NOTADB": "this file is no SQLite database",
    "SQLITE_READONLY": f"it cannot be written: {_CHECK_PERMISSIONS}",
    "SQLITE_CANTOPEN": f"it cannot be opened: {_CHECK_PERMISSIONS}",
    "SQLITE_PERM": f"it cannot be opened: {_CHECK_PERMISSIONS}",
    # On a full disk also for who only reads: the index of the log of writes, beside the file, takes some room.
    "SQLITE_IOERR": "it cannot be read or written (disk I/O error): is there room on the disk, is the disk whole?",
    "SQLITE_FULL": "the disk is full; nothing was written",
    "SQLITE_CORRUPT": "the database is damaged; restore it from a backup, or apply the inventory to a new one",
}


def _in_words(error: sqlite3.DatabaseError, patience: float) -> str:
    """SQLite's message, and what to do about the common ones; `patience` as for SqliteStore."""
    # Extended codes begin with the name of what they extend, like SQLITE_READONLY_DBMOVED.
    kind = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
    if kind == "SQLITE_BUSY":
        return f"another process has held it locked for {patience:g} s; try again"
    return _WORDS.get(kind, str(error))
