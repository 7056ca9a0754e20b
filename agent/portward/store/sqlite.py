"""The embedded store: an SQLite database in WAL mode, with a log of who changed what and when.

An accepted change survives a power cut (`synchronous=FULL`): it may be a revocation. Readers need write
access to the database's folder, as WAL keeps an index beside it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from portward.errors import ConflictError, StoreError
from portward.store.bell import Listener, ring
from portward.store.protocol import Change, Progress, Put

_FORMAT: Final = 1
# How long a writer waits for another one, in seconds.
_PATIENCE: Final = 10.0
_BATCH: Final = 20_000

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


class SqliteStore:
    """A `Store` in the file at `path`."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens the database, and makes it where it is missing if `create`; raises StoreError."""
        self._name = f"sqlite:{path}"
        self._bell = path.with_name(path.name + ".bell")
        if not create and not path.exists():
            raise StoreError(f"{self._name}: no such file; create it with `portward apply`")
        with self._errors():
            mode = "rwc" if create else "rw"
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_PATIENCE, isolation_level=None
            )
            try:
                self._prepare(create=create)
                self._identity: bytes = self._connection.execute("SELECT identity FROM store").fetchone()[0]
            except BaseException:
                self._connection.close()
                raise
        self._listener: Listener | None = None
        with contextlib.suppress(OSError):
            if not self._bell.exists():
                ring(self._bell)
            self._listener = Listener(self._bell)

    def identity(self) -> bytes:
        """See `Store`."""
        return self._identity

    def revision(self) -> int:
        """See `Store`."""
        with self._errors():
            return self._newest()

    def get(self, key: str) -> str | None:
        """See `Store`."""
        with self._errors():
            row = self._connection.execute("SELECT body FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def read_all(self) -> tuple[int, Iterator[tuple[str, str]]]:
        """See `Store`."""
        with self._errors():
            self._end_reading()
            self._connection.execute("BEGIN")
            revision = self._newest()
        return revision, self._records()

    def changes(self, since: int) -> Iterator[Change]:
        """See `Store`."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT revision, at, actor, key, before, after FROM change JOIN revision ON number = revision "
                "WHERE revision > ? ORDER BY revision, key",
                (since,),
            )
            for revision, at, actor, key, before, after in rows:
                yield Change(revision, datetime.fromisoformat(at), actor, key, before, after)

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
            self._end_reading()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._expect(expected)
                self._log(batch, expected + 1, actor, at, progress)
                self._connection.execute("COMMIT")
            except BaseException:
                self._end_reading()
                raise
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
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self._name}: {_in_words(error)}") from error
        except OSError as error:
            raise StoreError(f"{self._name}: {error.strerror}") from error

    def _prepare(self, *, create: bool) -> None:
        execute = self._connection.execute
        version = execute("PRAGMA user_version").fetchone()[0]
        if version > _FORMAT:
            raise StoreError(
                f"{self._name}: written by a newer portward (format {version}, this one knows {_FORMAT})"
            )
        if version == 0:
            if not create or execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{self._name}: an SQLite database, but not portward's")
            self._create()
        execute("PRAGMA synchronous = FULL")

    def _create(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        identity = f"INSERT INTO store VALUES (x'{uuid4().hex}');"  # noqa: S608 # hex digits
        try:
            self._connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{identity}COMMIT;")
        except sqlite3.OperationalError:
            self._end_reading()
            # Somebody else has made it meanwhile; anything else is told.
            if self._connection.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
                raise

    def _newest(self) -> int:
        return int(self._connection.execute("SELECT ifnull(max(number), 0) FROM revision").fetchone()[0])

    def _records(self) -> Iterator[tuple[str, str]]:
        try:
            with self._errors():
                yield from self._connection.execute("SELECT key, body FROM record ORDER BY key")
        finally:
            self._end_reading()

    def _end_reading(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _expect(self, expected: int) -> None:
        newest = self._newest()
        if newest == expected:
            return
        at, actor = self._connection.execute(
            "SELECT at, actor FROM revision WHERE number = ?", (newest,)
        ).fetchone()
        raise ConflictError(
            f"{self._name}: {actor} changed it to revision {newest} at {at} while this change was made from "
            f"revision {expected}; nothing was written, run it again"
        )

    def _log(
        self, batch: Sequence[Put], revision: int, actor: str, at: datetime, progress: Progress | None
    ) -> None:
        execute, many = self._connection.execute, self._connection.executemany
        execute("INSERT INTO revision VALUES (?, ?, ?)", (revision, at.astimezone(UTC).isoformat(), actor))
        # In the order of the keys the trees grow at their end only.
        ordered = sorted(batch)
        for start in range(0, len(ordered), _BATCH):
            part = ordered[start : start + _BATCH]
            many(
                "INSERT INTO change SELECT ?1, ?2, (SELECT body FROM record WHERE key = ?2), ?3",
                ((revision, put.key, put.body) for put in part),
            )
            many("INSERT OR REPLACE INTO record VALUES (?, ?)", (put for put in part if put.body is not None))
            many("DELETE FROM record WHERE key = ?", ((put.key,) for put in part if put.body is None))
            if progress is not None:
                progress(start + len(part))


def _in_words(error: sqlite3.DatabaseError) -> str:
    """SQLite's message, and what to do about the common ones."""
    told = str(error)
    if "locked" in told:
        return f"another process has held it locked for {_PATIENCE:.0f} s; try again"
    if "not a database" in told:
        return "this file is no SQLite database"
    if "readonly" in told:
        return "it cannot be written: check the permissions of the file and of its folder"
    if "unable to open" in told:
        return "it cannot be opened: check that its folder exists and may be written"
    return told
