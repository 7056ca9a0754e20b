"""A part of the table that is one sorted list of rows of the same size, found by the bytes they begin with.

LMDB keeps such rows as the values of a single key (MDB_DUPFIXED): they lie in its pages side by side, where a key
of its own would cost each of them some ten bytes more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Final

from portward.table.database import Cursor, Part, TableError, Transaction

# The single key.
KEY: Final = b"r"


class Rows:
    """The rows of a part, as a transaction sees them."""

    def __init__(self, transaction: Transaction, part: Part) -> None:
        self._transaction, self._part = transaction, part
        self._cursor = transaction.cursor(part)

    def __iter__(self) -> Iterator[bytes]:
        with self._transaction.cursor(self._part) as cursor:
            yield from cursor.iternext(keys=False)

    def find(self, start: bytes) -> bytes | None:
        """The first row that begins with `start`."""
        return find(self._cursor, start)

    def around(self, start: bytes) -> tuple[bytes | None, bytes | None]:
        """The last row that sorts before `start`, and the first one that does not."""
        there = self._cursor.set_range_dup(KEY, start)
        after = self._cursor.value() if there else None
        found = self._cursor.prev_dup() if there else self._cursor.last()
        return self._cursor.value() if found else None, after

    def first(self) -> bytes | None:
        """The first row of all."""
        return self._cursor.value() if self._cursor.first() else None

    def starting(self, start: bytes) -> Iterator[bytes]:
        """The rows that begin with `start`, in their order."""
        with self._transaction.cursor(self._part) as cursor:
            if cursor.set_range_dup(KEY, start):
                for row in cursor.iternext_dup():
                    if not row.startswith(start):
                        return
                    yield row

    def put(self, row: bytes) -> None:
        """Takes a row in; nothing happens where it is there."""
        self._cursor.put(KEY, row)

    def remove(self, row: bytes) -> None:
        """Takes a row out; nothing happens where it is not there."""
        if self._cursor.set_key_dup(KEY, row):
            self._cursor.delete()

    def extend(self, rows: Sequence[bytes]) -> None:
        """Takes in many sorted rows, none of them there yet. What sorts behind all that are there is appended,
        which is the quickest, and fills every page."""
        if not rows:
            return
        last = self._cursor.value() if self._cursor.last() else b""
        _, added = self._cursor.putmulti(zip(repeat(KEY), rows), append=rows[0] > last)
        if added != len(rows):
            raise TableError(f"{len(rows) - added} of {len(rows)} rows stand twice in the policy table")


def find(cursor: Cursor, start: bytes) -> bytes | None:
    """The first row that begins with `start`, by a cursor on a part of rows."""
    if cursor.set_range_dup(KEY, start):
        row = cursor.value()
        if row.startswith(start):
            return row
    return None
