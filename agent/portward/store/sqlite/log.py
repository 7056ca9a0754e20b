"""The log in the database: who changed what and when, and the chain of hashes through it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from typing import Any, Final

from portward.base.clock import utc_now
from portward.errors import StoreError
from portward.store.chain import Sealing, origin_hash
from portward.store.sqlite.cells import cell, cell_of_bytes, cells, hash_or_none, instant, log_rows, odd, text
from portward.store.sqlite.database import Database, NotUtf8Error, statements
from portward.store.sqlite.schema import (
    CREATE_ORIGIN,
    CREATE_SEALED,
    ENTRIES,
    REPLACE_REVISION,
    ROWS,
    SEAL_ONE,
    STRAYS,
    UNSEALED,
)
from portward.store.values import Cell, Change, Entry, LogRow, Odd, Origin

# SQLite's integers have 63 bits and a sign; the next revision must still be one.
_MAX_REVISION: Final = 2**63 - 1
# Rows that are fetched at once: a single fetch costs as much as decoding a row.
_PIECE_ROWS: Final = 1000


class Log:
    """The tables `revision`, `change` and `origin`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def newest(self) -> int:
        """The newest revision; 0 if there is none. Raises StoreError for an impossible number."""
        newest = int(self._database.execute("SELECT ifnull(max(number), 0) FROM revision").fetchone()[0])
        if not 0 <= newest < _MAX_REVISION:
            raise StoreError(
                f"{self._database.name}: {newest} is no revision that can be; restore it from a backup"
            )
        return newest

    def written(self) -> datetime | None:
        """When the newest revision was written, in UTC; None if there is none."""
        row = self._database.execute("SELECT at FROM revision ORDER BY number DESC LIMIT 1").fetchone()
        return None if row is None else instant(row[0])

    def author(self, revision: int) -> str:
        """`, by ACTOR at TIME` of a revision, for a message; empty if there is no such revision."""
        row = self._database.execute("SELECT at, actor FROM revision WHERE number = ?", (revision,)).fetchone()
        return f", by {row[1]} at {row[0]}" if row else ""

    def changes(self, where: str, value: int | str) -> Generator[Change, None, None]:
        """The changes for which `where` holds, oldest first, from one state of the database. `where` is SQL with
        one parameter, and never comes from outside."""
        rows = self._database.execute(
            "SELECT revision, at, actor, key, before, after FROM change JOIN revision ON number = revision "  # noqa: S608 # `where` is one of two constants
            f"{where} ORDER BY revision, key",
            (value,),
        )
        for revision, at, actor, key, before, after in rows:
            bodies = (None if body is None else text(body) for body in (before, after))
            yield Change(revision, instant(at), text(actor), text(key), *bodies)

    def origin(self) -> Origin | None:
        """As `Store.origin`."""
        if self._database.format() == UNSEALED:
            return None
        with self._database.decoding(cell_of_bytes):
            rows = self._database.execute("SELECT at, sealed, hash FROM origin LIMIT 2").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][1], int):
            return Origin("", 0, None)
        at, sealed, found = rows[0]
        return Origin(cell(at), sealed, hash_or_none(found))

    def entries(self, since: int | None = None) -> Iterator[Entry]:
        """As `Store.log`."""
        hashes = "NULL, NULL" if self._database.format() == UNSEALED else "previous, hash"
        rows = self._database.execute(ENTRIES.format(hashes=hashes), (since,))
        while True:
            with self._database.decoding(cell_of_bytes):
                row = rows.fetchone()
            if row is None:
                return
            number, at, actor, previous, found, changes = row
            yield Entry(number, cell(at), cell(actor), hash_or_none(previous), hash_or_none(found), changes)

    def pieces(self, revision: int) -> Iterator[list[LogRow]]:
        """The changes of a revision as they are stored, in the order of their keys, many at a time."""
        last: object = None
        try:
            # SQLite's own decoding of text is the fastest, but fails at the first text that is not UTF-8.
            for rows in self._fetched(str, revision, None):
                last = rows[-1][0]
                yield log_rows(rows)
        except NotUtf8Error:
            for rows in self._fetched(cell_of_bytes, revision, last):
                yield cells(rows)

    def strays(self) -> Iterator[int | Odd]:
        """As `Store.strays`."""
        with self._database.decoding(cell_of_bytes):
            found = self._database.execute(STRAYS).fetchall()
        for (number,) in found:
            yield number if isinstance(number, int) else odd(number)

    def begin(self, identity: bytes, *, sealed: int) -> bytes:
        """Writes the origin of the chain, and returns its hash."""
        at = utc_now().isoformat()
        found = origin_hash(identity, at, sealed)
        self._database.execute("INSERT INTO origin VALUES (?, ?, ?)", (at, sealed, found))
        return found

    def seal(self, identity: Callable[[], bytes]) -> None:
        """Brings a store of format 1 to format 2: each revision gets its hash, all of them or none. Does nothing
        to any other store. `identity` reads the store's identity."""
        if self._database.format() != UNSEALED:
            return
        with self._database.locked():
            # Under the lock, because another process may have sealed it meanwhile.
            if self._database.format() == UNSEALED:
                self._seal_all(identity())

    def _seal_all(self, identity: bytes) -> None:
        execute = self._database.execute
        execute(CREATE_ORIGIN)
        execute(CREATE_SEALED)
        previous = self.begin(identity, sealed=self.newest())
        for entry in self.entries():
            found = self._hashed(previous, entry.number, entry.at, entry.actor)
            execute(SEAL_ONE, (entry.number, previous, found))
            previous = found
        for statement in statements(REPLACE_REVISION):
            execute(statement)

    def append(self, revision: int, at: str, actor: str, previous: bytes) -> bool:
        """Writes the entry of a revision whose changes are in the log already. False if it has none: then no entry
        is written."""
        execute = self._database.execute
        if execute("SELECT 1 FROM change WHERE revision = ? LIMIT 1", (revision,)).fetchone() is None:
            return False
        found = self._hashed(previous, revision, at, actor)
        # The entry comes last, because it needs the hash over its changes and no row of the log can be changed.
        execute("INSERT INTO revision VALUES (?, ?, ?, ?, ?)", (revision, at, actor, previous, found))
        return True

    def hash_of(self, revision: int, identity: Callable[[], bytes]) -> bytes | None:
        """As `Store.hash_of`. `identity` reads the store's identity."""
        if self._database.format() != UNSEALED:
            return self._hash_of(revision)
        if revision == 0:
            return origin_hash(identity(), "", 0)
        with self._database.decoding(cell_of_bytes):
            row = self._database.execute("SELECT at, actor FROM revision WHERE number = ?", (revision,)).fetchone()
        return None if row is None else Sealing(b"", revision, cell(row[0]), cell(row[1])).hash()

    def head(self, revision: int) -> bytes:
        """The hash of the newest revision, or of the origin if `revision` is 0. Raises StoreError if it is
        lost."""
        found = self._hash_of(revision)
        if found is None:
            problem = f"the log has lost the hash of revision {revision}, so no entry can follow it"
            raise StoreError(f"{self._database.name}: {problem}; restore it from a backup")
        return found

    def _hash_of(self, revision: int) -> bytes | None:
        row = self._database.execute(
            "SELECT hash FROM revision WHERE number = ?1 UNION ALL SELECT hash FROM origin WHERE ?1 = 0",
            (revision,),
        ).fetchone()
        return None if row is None else hash_or_none(row[0])

    def _hashed(self, previous: bytes, number: int, at: Cell, actor: Cell) -> bytes:
        """The hash of a revision whose changes are all written."""
        sealing = Sealing(previous, number, at, actor)
        for piece in self.pieces(number):
            sealing.add(piece)
        return sealing.hash()

    def _fetched(self, decode: Callable[[bytes], object], revision: int, after: object) -> Iterator[list[Any]]:
        cursor = self._database.execute(ROWS, (revision, after))
        while True:
            with self._database.decoding(decode):
                rows = cursor.fetchmany(_PIECE_ROWS)
            if not rows:
                return
            yield rows
