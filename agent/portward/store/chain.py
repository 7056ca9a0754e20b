"""The chain of hashes through a store's log: how an entry is hashed, and how a changed log is found.

The hash of a revision is SHA-256 over lines of JSON, in the short form and with the escapes of RFC 8785:

    ["<hash of the revision before, in hex>",<number>,"<at>","<actor>"]
    ["<key>",<before>,<after>]          for each of its changes, in the order of their keys

The hash before the first revision is that of the log's origin, one line that names the store, so that the logs of
two stores have no common beginning:

    ["portward log","<identity of the store, in hex>","<at>",<sealed>]

Each entry also stores the hash of the one before. So if two neighbours do not fit, the check can say which one was
changed.

A person who can write to the store can restore an older state of it, or rewrite the log from some entry on with
hashes that fit. Only a hash of a later entry, kept elsewhere, reveals that: see `Mark`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from portward.errors import InputError
from portward.store.codec import shown_key
from portward.store.protocol import Store
from portward.store.values import Cell, Entry, LogRow, Origin

# Changes that are hashed at once: enough to make the encoder's calls cheap, and few enough to need no memory.
_PIECE_ROWS: Final = 1000
# Keys that a text about an issue names.
_NAMED_KEYS: Final = 5
# The check keeps a digest of each record. At 128 bits, finding a second text with the same digest is infeasible.
_DIGEST_BYTES: Final = 16

_MARK: Final = re.compile(r"([0-9]{1,18}):([0-9a-fA-F]{64})")

_encoder: Final = msgspec.json.Encoder()


class Sealing:
    """Computes the hash of one revision."""

    def __init__(self, previous: bytes, number: int, at: Cell, actor: Cell) -> None:
        """`previous` is the hash of the revision before, or of the origin. `at` and `actor` are as the log stores
        them."""
        self._hash = hashlib.sha256(_encoder.encode_lines([(previous.hex(), number, at, actor)]))

    def add(self, rows: Sequence[LogRow]) -> None:
        """Adds the next changes, in the order of their keys."""
        self._hash.update(_encoder.encode_lines(rows))

    def hash(self) -> bytes:
        """The hash of everything added so far, 32 bytes."""
        return self._hash.digest()


def origin_hash(identity: bytes, at: Cell, sealed: int) -> bytes:
    """The hash before the first revision; `at` and `sealed` as `Origin` has them."""
    line = ("portward log", identity.hex(), at, sealed)
    return hashlib.sha256(_encoder.encode_lines([line])).digest()


class Mark(NamedTuple):
    """A revision and its hash, kept outside the store to find the entry in the log later. Its text is `120:6f1e…`,
    with the hash in hex. Number 0 is the log's origin."""

    number: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.number}:{self.hash.hex()}"


def parse_mark(text: str) -> Mark:
    """The mark that a text writes; raises InputError if it is not one."""
    found = _MARK.fullmatch(text.strip())
    if found is None:
        problem = f"{text!r} is not REVISION:HASH with all 64 digits, as `portward audit` prints it"
        raise InputError(problem, field="--expect")
    return Mark(int(found[1]), bytes.fromhex(found[2]))


class IntegrityIssueKind(StrEnum):
    """The kind of an issue. Other tools rely on these codes, so they never change."""

    UNSEALED = "unsealed"
    ORIGIN = "origin-changed"
    CHANGED = "entry-changed"
    MISSING = "entry-missing"
    STRAY = "changes-without-entry"
    RECORD = "record-differs"
    EXPECTED = "expected-missing"


class IntegrityIssue(NamedTuple):
    """A difference between the log, the records and the expected mark. `revision` is the one that it is about, or
    the first of them; `keys` are the first few keys that it is about."""

    kind: IntegrityIssueKind
    revision: int | None
    keys: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


class Check:
    """One check of a store's log.

    After the iterator `issues` has ended, `revisions` and `changes` are the numbers of those in the log, `head` is
    the newest entry (or the origin, if there is none), and `origin` is the beginning of the chain. Both are None
    for a log without hashes. `newer` is the number of entries after the expected mark; None if no mark is
    expected, or if it is not in the log.
    """

    def __init__(self, store: Store, expect: Mark | None = None) -> None:
        self._store, self._expect = store, expect
        self.revisions = self.changes = 0
        self.origin: Origin | None = None
        self.head: Mark | None = None
        # Whether the entry before, or the origin, fits its own hash.
        self._fitted = True
        self._last: Entry | None = None
        self.newer: int | None = None
        # For each key, the revision that wrote it last, and a digest of the record's JSON.
        self._left: dict[str, tuple[int, bytes]] = {}

    def issues(self) -> Iterator[IntegrityIssue]:
        """All issues, in the order of the log, then of the records. Call it within `Store.reading`, so that the
        store stays in one state. Needs about 250 bytes of memory for each record."""
        yield from self._begin()
        for entry in self._store.log():
            if entry.number < 1:
                text = f"{_called(entry)} cannot be: the first revision is 1"
                yield IntegrityIssue(
                    IntegrityIssueKind.CHANGED, entry.number, self._first_keys(entry.number), text
                )
                continue
            yield from self._gap(entry)
            yield from self._entry(entry)
            self._last = entry
            self.revisions += 1
        yield from self._strays()
        yield from self._expected()
        yield from self._records()

    def _begin(self) -> Iterator[IntegrityIssue]:
        origin = self.origin = self._store.origin()
        if origin is None:
            yield IntegrityIssue(
                IntegrityIssueKind.UNSEALED, None, (),
                "the log has no hashes: the store was made by an older portward, and the next change seals it",
            )  # fmt: skip
            return
        if origin.hash != origin_hash(self._store.identity(), origin.at, origin.sealed):
            self._fitted = False
            text = "the log's origin does not fit its hash: it was changed, or the store's identity"
            yield IntegrityIssue(IntegrityIssueKind.ORIGIN, None, (), text)
        self._at(0, origin.hash)

    def _at(self, number: int, found: bytes | None) -> None:
        """Moves the head to a revision with this hash."""
        self.head = None if found is None else Mark(number, found)
        if self._expect is not None and self._expect == self.head:
            self.newer = 0
        elif self.newer is not None:
            self.newer += 1

    def _gap(self, entry: Entry) -> Iterator[IntegrityIssue]:
        first, last = 1 if self._last is None else self._last.number + 1, entry.number - 1
        if first > last:
            return
        missing = f"revision {first} is missing" if first == last else f"revisions {first} to {last} are missing"
        where = f"the log begins with {entry.number}" if self._last is None else f"{entry.number} comes next"
        yield IntegrityIssue(IntegrityIssueKind.MISSING, first, (), f"{missing}: {where}")
        self._fitted = False  # nothing to compare with

    def _entry(self, entry: Entry) -> Iterator[IntegrityIssue]:
        before, fitted = self.head, self._fitted
        fits, keys = self._walk(entry)
        self._at(entry.number, entry.hash)
        if self.origin is None:
            return
        self._fitted = fits
        if not fits:
            yield IntegrityIssue(
                IntegrityIssueKind.CHANGED, entry.number, keys,
                f"{_called(entry)} does not fit its hash: it was changed after it was written; it holds now "
                f"{_counted(entry.changes, keys)}",
            )  # fmt: skip
        elif fitted and before is not None and entry.previous != before.hash:
            yield self._replaced(entry)

    def _replaced(self, entry: Entry) -> IntegrityIssue:
        """The issue if `entry` and the one before each fit their own hash, but `entry` stores another hash of the
        one before."""
        differs = f"{_called(entry)} carries another hash of it"
        last = self._last
        if last is None:
            text = f"the log's origin was changed, and its hash with it: {differs}"
            return IntegrityIssue(IntegrityIssueKind.ORIGIN, None, (), text)
        keys = self._first_keys(last.number)
        return IntegrityIssue(
            IntegrityIssueKind.CHANGED, last.number, keys,
            f"{_called(last)} was changed, and its hash with it: {differs}; it holds now "
            f"{_counted(last.changes, keys)}",
        )  # fmt: skip

    def _walk(self, entry: Entry) -> tuple[bool, tuple[str, ...]]:
        """Whether the entry fits its hash, and its first keys. Applies its changes to the expected records."""
        sealing = Sealing(entry.previous or b"", entry.number, entry.at, entry.actor)
        rows = self._store.rows(entry.number)
        keys: list[str] = []
        while piece := list(islice(rows, _PIECE_ROWS)):
            sealing.add(piece)
            self.changes += len(piece)
            if len(keys) < _NAMED_KEYS:
                keys += [shown_key(str(key)) for key, _, _ in piece[: _NAMED_KEYS - len(keys)]]
            self._leave(entry.number, piece)
        return entry.previous is not None and entry.hash == sealing.hash(), tuple(keys)

    def _leave(self, number: int, piece: Iterable[LogRow]) -> None:
        left = self._left
        for key, _, after in piece:
            if after is None:
                left.pop(str(key), None)
            else:
                left[str(key)] = (number, _digest(str(after)))

    def _first_keys(self, number: int) -> tuple[str, ...]:
        return tuple(shown_key(str(key)) for key, _, _ in islice(self._store.rows(number), _NAMED_KEYS))

    def _strays(self) -> Iterator[IntegrityIssue]:
        for number in self._store.strays():
            keys = self._first_keys(number) if isinstance(number, int) else ()
            named = f", among them {', '.join(keys)}" if keys else ""
            yield IntegrityIssue(
                IntegrityIssueKind.STRAY, number if isinstance(number, int) else None, keys,
                f"changes stand under revision {number}, which has no entry{named}",
            )  # fmt: skip

    def _expected(self) -> Iterator[IntegrityIssue]:
        if self._expect is None or self.newer is not None:
            return
        number = self._expect.number
        newest = 0 if self._last is None else self._last.number
        if number > newest:
            why = f"the log ends with {newest}: it was taken back to an older state"
        else:
            why = "the log holds another entry, or none, in its place: it was written anew"
        text = f"revision {number} with the hash that is expected is not there: {why}"
        yield IntegrityIssue(IntegrityIssueKind.EXPECTED, number, (), text)

    def _records(self) -> Iterator[IntegrityIssue]:
        left = self._left
        for key, body in self._store.read_all()[1]:
            number, digest = left.pop(key, (None, b""))
            if number is None:
                yield _record(key, None, "is there, and the log says that it is not")
            elif digest != _digest(body):
                yield _record(key, number, f"is not as revision {number} left it")
        for key, (number, _) in sorted(left.items()):
            yield _record(key, number, f"is not there, and revision {number} left one")


def _record(key: str, number: int | None, problem: str) -> IntegrityIssue:
    name = shown_key(key)
    text = f"{name}: the record {problem}: it was changed past the log, or newer entries of the log were cut off"
    return IntegrityIssue(IntegrityIssueKind.RECORD, number, (name,), text)


def _called(entry: Entry) -> str:
    return f"revision {entry.number}, by {entry.actor} at {entry.at},"


def _counted(changes: int, keys: Sequence[str]) -> str:
    """The number of changes, and their first keys."""
    if not changes:
        return "no change"
    more = f" and {changes - len(keys)} more" if changes > len(keys) else ""
    return f"{changes} {'change' if changes == 1 else 'changes'}: {', '.join(keys)}{more}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
