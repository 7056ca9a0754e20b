"""The embedded store: an SQLite database in WAL mode, with a log of who changed what and when.

What was accepted survives a power cut: `synchronous=FULL` syncs the log of each commit. NORMAL would be
quicker and could lose the last changes, and one of them may be a revocation.

Who only reads needs to write too, to the index that WAL keeps beside the database (`-shm`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from portward.errors import ConflictError, StoreError
from portward.store.bell import Listener, hang, ring
from portward.store.protocol import Change, NoStoreError, Progress, Put

_FORMAT: Final = 1
# How long a writer waits for another one, in seconds: a million records take about ten.
_PATIENCE = 20.0
# Records that are written between two reports of progress.
_BATCH: Final = 20_000
_IDENTITY_BYTES: Final = 16
# SQLite's integers have 63 bits and a sign; the next revision must still be one.
_LAST_REVISION: Final = 2**63 - 1
# What the WAL shrinks to after a large change, in bytes.
_WAL_LIMIT: Final = 64 * 1024 * 1024

_SCHEMA: Final = f"""
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
PRAGMA user_version = {_FORMAT};
"""

# A record that is there already as it is to be makes no line in the log.
_LOG: Final = """
INSERT INTO change SELECT ?1, ?2, before, ?3
FROM (SELECT (SELECT body FROM record WHERE key = ?2) AS before) WHERE before IS NOT ?3
"""

# Backwards, attachments come last; what is no key of ours may stand anywhere.
_RECORDS: Final = "SELECT key, body FROM record WHERE ?1 IS NULL OR key < ?1 ORDER BY key DESC"


class SqliteStore:
    """A `Store` in the file at `path`."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens the database, and makes it where it is missing if `create`. Raises NoStoreError where it is
        missing and not made, StoreError where it cannot be used."""
        self._path = path.absolute()
        self._name = f"sqlite:{path}"
        self._bell = self._path.with_name(path.name + ".bell")
        self._listener: Listener | None = None
        self._readings = 0
        with self._errors():
            self._find(create=create)
            # The URI keeps SQLite from making a file that has gone away meanwhile.
            self._connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode=rw", uri=True, timeout=_PATIENCE, isolation_level=None
            )
            try:
                self._connection.text_factory = _any_text
                self._prepare(create=create)
                self._identity = self._read_identity()
                self._file = self._file_now()
            except BaseException:
                self._connection.close()
                raise
        hang(self._bell, like=self._path)
        with contextlib.suppress(OSError):
            self._listener = Listener(self._bell)

    def identity(self) -> bytes:
        """See `Store`."""
        return self._identity

    def revision(self) -> int:
        """See `Store`. Costs some microseconds."""
        with self._errors():
            self._expect_same_file()
            return self._newest()

    def written(self) -> datetime | None:
        """See `Store`."""
        with self._errors():
            row = self._connection.execute("SELECT at FROM revision ORDER BY number DESC LIMIT 1").fetchone()
        return None if row is None else _instant(row[0])

    def get(self, key: str) -> str | None:
        """See `Store`."""
        with self._errors():
            row = self._connection.execute("SELECT body FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else _text(row[0])

    def read_all(self) -> tuple[int, Iterator[tuple[str, str]]]:
        """See `Store`."""
        with self._errors():
            self._expect_same_file()
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

    def changes(self, since: int) -> Iterator[Change]:
        """See `Store`. One statement, so one state of the database."""
        return self._changes("WHERE revision > ?", since)

    def _changes(self, where: str, value: int | str) -> Iterator[Change]:
        with self._errors():
            rows = self._connection.execute(  # `where` is one of two constants
                "SELECT revision, at, actor, key, before, after FROM change JOIN revision ON number = revision "  # noqa: S608
                f"{where} ORDER BY revision, key",
                (value,),
            )
            for revision, at, actor, key, before, after in rows:
                bodies = (None if body is None else _text(body) for body in (before, after))
                yield Change(revision, _instant(at), _text(actor), _text(key), *bodies)

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
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._expect(expected)
                if not self._put(batch, expected + 1, actor, at, progress):
                    return expected
                self._connection.execute("COMMIT")
            finally:
                self._end_transaction()
        ring(self._bell)
        return expected + 1

    def fileno(self) -> int | None:
        """See `Store`."""
        return None if self._listener is None else self._listener.fileno()

    def drain(self) -> None:
        """See `Store`."""
        if self._listener is not None:
            self._listener.drain()

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
            raise StoreError(f"{self._name}: {_in_words(error)}") from error
        except OSError as error:
            raise StoreError(f"{self._name}: {error.strerror}") from error

    def _find(self, *, create: bool) -> None:
        if "\0" in str(self._path):
            raise NoStoreError(f"{self._name}: no file has a NUL in its name")
        if not self._path.parent.is_dir():
            raise NoStoreError(f"{self._name}: there is no folder {self._path.parent}")
        if self._path.exists():
            return
        if not create:
            raise NoStoreError(f"{self._name}: no such file; create it with 'portward apply'")
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

    def _prepare(self, *, create: bool) -> None:
        execute = self._connection.execute
        version = execute("PRAGMA user_version").fetchone()[0]
        if version > _FORMAT:
            told = f"written by a newer portward (format {version}, this one knows {_FORMAT})"
            raise StoreError(f"{self._name}: {told}")
        if version == 0:
            if execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{self._name}: an SQLite database, but not portward's")
            if not create:
                raise NoStoreError(f"{self._name}: an empty file; 'portward apply' makes it a store")
            self._create()
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")

    def _create(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA journal_mode = WAL")
        execute("BEGIN IMMEDIATE")
        try:
            # Under the lock: somebody else may have made it meanwhile.
            if execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _statements(_SCHEMA):
                    execute(statement)
                execute("INSERT INTO store VALUES (?)", (uuid4().bytes,))
            execute("COMMIT")
        finally:
            self._end_transaction()

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
        if self._file_now() != self._file:
            raise StoreError(f"{self._name}: another file was put in its place; it has to be opened again")

    def _newest(self) -> int:
        newest = int(self._connection.execute("SELECT ifnull(max(number), 0) FROM revision").fetchone()[0])
        if not 0 <= newest < _LAST_REVISION:
            raise StoreError(f"{self._name}: {newest} is no revision that can be; restore it from a backup")
        return newest

    def _records(self, reading: int) -> Iterator[tuple[str, str]]:
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
        execute("INSERT INTO revision VALUES (?, ?, ?)", (revision, at.astimezone(UTC).isoformat(), actor))
        # In the order of the keys the trees grow at their end only.
        ordered = sorted(batch, key=lambda put: put.key)
        for start in range(0, len(ordered), _BATCH):
            part = ordered[start : start + _BATCH]
            many(_LOG, ((revision, put.key, put.body) for put in part))
            many("INSERT OR REPLACE INTO record VALUES (?, ?)", (put for put in part if put.body is not None))
            many("DELETE FROM record WHERE key = ?", ((put.key,) for put in part if put.body is None))
            if progress is not None:
                progress(start + len(part))
        logged = execute("SELECT EXISTS (SELECT 1 FROM change WHERE revision = ?)", (revision,))
        return bool(logged.fetchone()[0])


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


_WORDS: Final = {
    "SQLITE_BUSY": f"another process has held it locked for {_PATIENCE:.0f} s; try again",
    "SQLITE_NOTADB": "this file is no SQLite database",
    "SQLITE_READONLY": "it cannot be written: check the permissions of the file and of its folder",
    "SQLITE_CANTOPEN": "it cannot be opened: check the permissions of the file and of its folder",
    "SQLITE_PERM": "it cannot be opened: check the permissions of the file and of its folder",
    "SQLITE_FULL": "the disk is full; nothing was written",
    "SQLITE_CORRUPT": "the database is damaged; restore it from a backup, or apply the inventory to a new one",
}


def _in_words(error: sqlite3.DatabaseError) -> str:
    """SQLite's message, and what to do about the common ones."""
    # Extended codes begin with the name of what they extend, like SQLITE_READONLY_DBMOVED.
    kind = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
    return _WORDS.get(kind, str(error))
