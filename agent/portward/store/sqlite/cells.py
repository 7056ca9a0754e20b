"""Column values → Python values. SQLite stores any type and any bytes in a TEXT column, and another tool may have
done so. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Final

from portward.store.values import HASH_BYTES, Cell, LogRow, Odd

_PLAIN: Final = frozenset((str, type(None)))


def text_of_bytes(data: bytes) -> str:
    """A text factory that never fails: one text that is not UTF-8 must not make the others unreadable."""
    return data.decode(errors="backslashreplace")


def cell_of_bytes(data: bytes) -> str | Odd:
    """A text factory for the log: a text that is not UTF-8 stays different from every other text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Odd("text", data.hex())


def cell(value: object) -> Cell:
    """A column of the log. Different values stay different."""
    return value if value is None or isinstance(value, str | Odd) else odd(value)


def odd(value: object) -> Odd:
    """A value that is not text, as the log shows it."""
    if isinstance(value, Odd):
        return value
    return Odd(type(value).__name__, value.hex() if isinstance(value, bytes) else repr(value))


def log_rows(rows: list[Any]) -> list[LogRow]:
    """Rows of `change`, with their columns as cells."""
    if _PLAIN.issuperset(map(type, chain.from_iterable(rows))):
        return rows
    return cells(rows)


def cells(rows: Iterable[Any]) -> list[LogRow]:
    """The same for rows that may contain other values than text."""
    return [(cell(key), cell(before), cell(after)) for key, before, after in rows]


def hash_or_none(value: object) -> bytes | None:
    """A hash; None for a value that is not 32 bytes."""
    return value if isinstance(value, bytes) and len(value) == HASH_BYTES else None


def text(value: object) -> str:
    """A text column. Another type becomes a text that is not a valid record, and so is refused as one."""
    return value if isinstance(value, str) else repr(value)


def instant(value: object) -> datetime:
    """The time of a revision, in UTC; the earliest possible time if another tool wrote something else."""
    try:
        return datetime.fromisoformat(text(value)).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)
