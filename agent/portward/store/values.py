"""The values that a store takes and returns: changes, entries of the log, and the errors. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Final, NamedTuple, TypeAlias

import msgspec

from portward.errors import StoreError

# Called with the number of records that are written so far.
Progress: TypeAlias = Callable[[int], None]

# SHA-256.
HASH_BYTES: Final = 32


class NoStoreError(StoreError):
    """There is no store yet at the place that was named."""


class RecordError(StoreError):
    """A record in the store cannot be read; the message names its key and field."""


class Put(NamedTuple):
    """A write to one key: the record as JSON. None removes the record."""

    key: str
    body: str | None


class Change(NamedTuple):
    """One record before and after a revision, as JSON; None if there was no record. `at` is in UTC."""

    revision: int
    at: datetime
    actor: str
    key: str
    before: str | None
    after: str | None


class Odd(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A value that another tool wrote into a text column of the log: its type, and its content in hex or as a
    number."""

    kind: str
    content: str

    def __str__(self) -> str:
        return f"<{self.kind} {self.content}>"


# A text of the log exactly as it is stored, because the hashes are computed from it.
Cell: TypeAlias = str | Odd | None
# A change as it is stored: key, before, after.
LogRow: TypeAlias = tuple[Cell, Cell, Cell]


class Origin(NamedTuple):
    """The beginning of a log's hash chain.

    `at` is when the chain began: when the store was made, or when a log without hashes was sealed, that is, got
    its hashes. `sealed` is the newest revision at that time, 0 in a store that was made with hashes. The chain
    proves nothing about changes before it began. `hash` is None if it is lost.
    """

    at: Cell
    sealed: int
    hash: bytes | None


class Entry(NamedTuple):
    """A revision as the log stores it. `at` is ISO 8601 in UTC, unless another tool wrote it. `previous` is the
    hash of the entry before, `hash` its own: 32 bytes each, None if there is none. `changes` is their number."""

    number: int
    at: Cell
    actor: Cell
    previous: bytes | None
    hash: bytes | None
    changes: int
