"""`SqliteStore`: the methods of `Store` on an SQLite database."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from portward.errors import ConflictError, StoreError
from portward.store.notifier import ChangeListener, create_notifier, notify_followers
from portward.store.sqlite.cells import text, text_of_bytes
from portward.store.sqlite.database import Database, NotUtf8Error, statements
from portward.store.sqlite.log import Log
from portward.store.sqlite.schema import LOG_CHANGE, RECORDS, SCHEMA
from portward.store.values import Change, Entry, LogRow, Odd, Origin, Progress, Put

# Records that are written between two reports of progress: a fraction of a second.
_BATCH_RECORDS: Final = 20_000
_IDENTITY_BYTES: Final = 16


class SqliteStore:
    """A `Store` in the file at `path`."""

    def __init__(self, path: Path, *, create: bool = False, agent: bool = False) -> None:
        """Opens the database, and makes it if it is missing and `create`. An `agent` waits for a lock of another
        process only `AGENT_LOCK_TIMEOUT_S`. Raises NoStoreError if the store is missing and not made, StoreError
        if it cannot be used."""
        self._database = Database(path, create=create, agent=agent)
        self._log = Log(self._database)
        # How often `read_all` was called: an iterator that was abandoned must not end the transaction of the next.
        self._readings = 0
        try:
            with self._database.errors():
                self._prepare(create=create, agent=agent)
                self._read_identity()
                self._database.note_file()
        except BaseException:
            self._database.close()
            raise
        notifier = self._database.path.with_name(path.name + ".bell")
        self._notifier = notifier
        self._listener: ChangeListener | None = None
        create_notifier(notifier, like=self._database.path)
        with contextlib.suppress(OSError):
            self._listener = ChangeListener(notifier)

    def identity(self) -> bytes:
        """See `Store`. Read each time, because another store's backup may be restored into the open file."""
        with self._database.errors():
            return self._read_identity()

    def revision(self) -> int:
        """See `Store`. Costs some microseconds."""
        with self._database.errors():
            self._database.expect_same_file()
            return self._log.newest()

    def hash_of(self, revision: int) -> bytes | None:
        """See `Store`. Costs some microseconds."""
        with self._database.errors():
            return self._log.hash_of(revision, self._read_identity)

    def get(self, key: str) -> str | None:
        """See `Store`."""
        with self._database.errors():
            row = self._database.execute("SELECT body FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else text(row[0])

    def read_all(self) -> tuple[int, Generator[tuple[str, str], None, None]]:
        """See `Store`."""
        with self._database.errors():
            self._database.expect_same_file()
            if not self._database.pinned:
                self._database.end_transaction()
                self._database.execute("BEGIN")
            revision = self._log.newest()
        self._readings += 1
        return revision, self._records(self._readings)

    def under(self, prefix: str) -> Iterator[tuple[str, str]]:
        """See `Store`."""
        with self._database.errors():
            rows = self._database.execute(
                "SELECT key, body FROM record WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, f"{prefix}\U0010ffff"),
            )
            for key, body in rows:
                yield text(key), text(body)

    def history(self, key: str) -> Iterator[Change]:
        """See `Store`. Reads through the whole log."""
        with self._database.errors():
            yield from self._log.changes("WHERE key = ?", key)

    def changes(self, since: int) -> Generator[Change, None, None]:
        """See `Store`."""
        with self._database.errors():
            yield from self._log.changes("WHERE revision > ?", since)

    def written(self) -> datetime | None:
        """See `Store`. Costs some microseconds."""
        with self._database.errors():
            return self._log.written()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """See `Store`."""
        with self._database.errors():
            self._database.expect_same_file()
            self._database.end_transaction()
            self._database.execute("BEGIN")
            # The first read of a transaction fixes the state that it sees.
            self._database.execute("SELECT 1 FROM store").fetchone()
        self._database.pinned = True
        try:
            yield
        finally:
            self._database.pinned = False
            self._database.end_transaction()

    def origin(self) -> Origin | None:
        """See `Store`."""
        with self._database.errors():
            return self._log.origin()

    def log(self, since: int | None = None) -> Iterator[Entry]:
        """See `Store`."""
        with self._database.errors():
            yield from self._log.entries(since)

    def rows(self, revision: int) -> Iterator[LogRow]:
        """See `Store`."""
        with self._database.errors():
            for piece in self._log.pieces(revision):
                yield from piece

    def strays(self) -> Iterator[int | Odd]:
        """See `Store`."""
        with self._database.errors():
            yield from self._log.strays()

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
        with self._database.errors():
            self._database.expect_same_file()
            self._database.end_transaction()
            self._log.seal(self._read_identity)
            with self._database.locked():
                self._database.expect_format()  # under the lock: a newer portward may have upgraded it meanwhile
                self._expect(expected)
                if not self._put(batch, expected + 1, actor, max(at, self._log.written() or at), progress):
                    self._database.end_transaction()
                    return expected
        notify_followers(self._notifier)
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
        return self._database.waits

    def close(self) -> None:
        """See `Store`."""
        if self._listener is not None:
            self._listener.close()
        self._database.close()

    def _prepare(self, *, create: bool, agent: bool) -> None:
        # The first statement that reads the file. In another mode than WAL it waits for a writer.
        self._database.execute_patiently("PRAGMA user_version")
        self._database.expect_format()
        if self._database.is_empty(create=create):
            self._create()
        # A verb that only reads (`explain`, `audit`) leaves the file as it is.
        if create or agent:
            self._database.restore_wal()
        self._database.configure()
        if create:
            self._log.seal(self._read_identity)

    def _create(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        with self._database.locked():
            # Under the lock, because another process may have made the store meanwhile.
            if self._database.format() == 0:
                for statement in statements(SCHEMA):
                    self._database.execute(statement)
                identity = uuid4().bytes
                self._database.execute("INSERT INTO store VALUES (?)", (identity,))
                self._log.begin(identity, sealed=0)

    def _read_identity(self) -> bytes:
        row = self._database.execute("SELECT identity FROM store").fetchone()
        if row is None or not isinstance(row[0], bytes) or len(row[0]) != _IDENTITY_BYTES:
            raise StoreError(f"{self._database.name}: the store has lost its identity; restore it from a backup")
        return row[0]

    def _records(self, reading: int) -> Generator[tuple[str, str], None, None]:
        connection = self._database.connection
        last: object = None
        try:
            with self._database.errors():
                # SQLite's own decoding of text is the fastest, but fails at the first text that is not UTF-8.
                connection.text_factory = str
                with contextlib.suppress(NotUtf8Error):
                    for row in connection.execute(RECORDS, (None,)):
                        last, body = row
                        yield row if type(last) is type(body) is str else (text(last), text(body))
                    return
                connection.text_factory = text_of_bytes
                for key, body in connection.execute(RECORDS, (last,)):
                    yield text(key), text(body)
        finally:
            if reading == self._readings:  # else this iterator was abandoned, and a later call reads now
                self._database.end_transaction()

    def _expect(self, expected: int) -> None:
        newest = self._log.newest()
        if newest != expected:
            raise ConflictError(
                f"{self._database.name}: it was read at revision {expected} and is now at revision {newest}"
                f"{self._log.author(newest)}; nothing was written; run it again"
            )

    def _put(
        self, batch: Sequence[Put], revision: int, actor: str, at: datetime, progress: Progress | None
    ) -> bool:
        """Writes records and log in the open transaction; False if the batch changes nothing."""
        many = self._database.connection.executemany
        previous = self._log.head(revision - 1)
        # In the order of the keys, SQLite's trees grow only at their end.
        ordered = sorted(batch, key=lambda put: put.key)
        for start in range(0, len(ordered), _BATCH_RECORDS):
            part = ordered[start : start + _BATCH_RECORDS]
            many(LOG_CHANGE, ((revision, put.key, put.body) for put in part))
            many("INSERT OR REPLACE INTO record VALUES (?, ?)", (put for put in part if put.body is not None))
            many("DELETE FROM record WHERE key = ?", ((put.key,) for put in part if put.body is None))
            if progress is not None:
                progress(start + len(part))
        return self._log.append(revision, at.astimezone(UTC).isoformat(), actor, previous)
