"""The chain of hashes through a store's log: how an entry is hashed, and what of a log no longer fits.

The hash of a revision is SHA-256 over lines of JSON, in the short form and with the escapes of RFC 8785:

    ["<hash of the revision before, in hex>",<number>,"<at>","<actor>"]
    ["<key>",<before>,<after>]          for each of its changes, in the order of their keys

The hash before the first revision is that of the log's origin, one line that names the store, so that no two
stores have a beginning in common:

    ["portward log","<identity of the store, in hex>","<at>",<sealed>]

Each entry also carries the hash of the one before, so that where two of them do not fit, it is known which of
the two was changed.

Whoever may write to the store can take all of it back to an older state, or write a log of their own from some
entry on, with hashes that fit. That is found by who has kept the hash of a later entry: see `Mark`.
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

# Changes that are hashed at once: the encoder is called seldom, and a million changes need no memory.
_PIECE: Final = 1000
# Keys that a finding names.
_NAMED: Final = 5
# Of what a key was left with, so much is kept to compare: 16 bytes, and nobody finds another text with the same.
_DIGEST_BYTES: Final = 16

_MARK: Final = re.compile(r"([0-9]{1,18}):([0-9a-fA-F]{64})")

_encoder: Final = msgspec.json.Encoder()


class Sealing:
    """The hash of one revision, while its changes go by."""

    def __init__(self, previous: bytes, number: int, at: Cell, actor: Cell) -> None:
        """`previous` is the hash of the revision before, or of the origin; `at` and `actor` as the log holds
        them."""
        self._hash = hashlib.sha256(_encoder.encode_lines([(previous.hex(), number, at, actor)]))

    def add(self, rows: Sequence[LogRow]) -> None:
        """Takes the next changes, in the order of their keys."""
        self._hash.update(_encoder.encode_lines(rows))

    def hash(self) -> bytes:
        """The hash over what was taken."""
        return self._hash.digest()


def origin_hash(identity: bytes, at: Cell, sealed: int) -> bytes:
    """The hash before the first revision; `at` and `sealed` as `Origin` has them."""
    line = ("portward log", identity.hex(), at, sealed)
    return hashlib.sha256(_encoder.encode_lines([line])).digest()


class Mark(NamedTuple):
    """An entry that somebody has noted down, to find it in the log later: the number of a revision and its hash.
    As text `120:6f1e…`, the hash in hex. Number 0 stands for the log's origin."""

    number: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.number}:{self.hash.hex()}"


def parse_mark(text: str) -> Mark:
    """The mark in a text; raises InputError."""
    found = _MARK.fullmatch(text.strip())
    if found is None:
        problem = f"{text!r} is not REVISION:HASH with all 64 digits, as `portward audit` prints it"
        raise InputError(problem, field="--expect")
    return Mark(int(found[1]), bytes.fromhex(found[2]))


class IntegrityIssueKind(StrEnum):
    """What kind of thing was found. Fixed: tools rely on these codes."""

    UNSEALED = "unsealed"
    ORIGIN = "origin-changed"
    CHANGED = "entry-changed"
    MISSING = "entry-missing"
    STRAY = "changes-without-entry"
    RECORD = "record-differs"
    EXPECTED = "expected-missing"


class IntegrityIssue(NamedTuple):
    """Something that is not as the log says, or as it was noted down. `revision` is the one that it is about, the
    first of several; `keys` are those that it is about, the first few."""

    kind: IntegrityIssueKind
    revision: int | None
    keys: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


class Check:
    """One walk through a store's log. After `findings` has come to its end, `revisions` and `changes` say how many
    were there, `head` is the newest entry (the origin, where there is none), `origin` the beginning; both are None
    for a log without hashes. `newer` is how many entries follow the one that is expected; None if none is
    expected, or it is not there."""

    def __init__(self, store: Store, expect: Mark | None = None) -> None:
        self._store, self._expect = store, expect
        self.revisions = self.changes = 0
        self.origin: Origin | None = None
        self.head: Mark | None = None
        # Of the entry before, or of the origin: whether it fits its own hash.
        self._fitted = True
        self._last: Entry | None = None
        self.newer: int | None = None
        # What the log left each key with: the number of the revision, and a digest of the text.
        self._left: dict[str, tuple[int, bytes]] = {}

    def findings(self) -> Iterator[IntegrityIssue]:
        """Everything that does not fit, in the order of the log, and then of the records. Has to be asked while
        the store is held at one state (`Store.reading`). Keeps some 250 bytes for each record."""
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
        """The head, as far as the walk has come."""
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
        """`entry` fits its own hash, and so does what comes before it; but it carries another hash of that."""
        told = f"{_called(entry)} carries another hash of it"
        last = self._last
        if last is None:
            return IntegrityIssue(
                IntegrityIssueKind.ORIGIN, None, (), f"the log's origin was changed, and its hash with it: {told}"
            )
        keys = self._first_keys(last.number)
        return IntegrityIssue(
            IntegrityIssueKind.CHANGED, last.number, keys,
            f"{_called(last)} was changed, and its hash with it: {told}; it holds now "
            f"{_counted(last.changes, keys)}",
        )  # fmt: skip

    def _walk(self, entry: Entry) -> tuple[bool, tuple[str, ...]]:
        """Whether the entry fits its hash, and its first keys. Takes its changes to what the log has left."""
        sealing = Sealing(entry.previous or b"", entry.number, entry.at, entry.actor)
        rows = self._store.rows(entry.number)
        keys: list[str] = []
        while piece := list(islice(rows, _PIECE)):
            sealing.add(piece)
            self.changes += len(piece)
            if len(keys) < _NAMED:
                keys += [shown_key(str(key)) for key, _, _ in piece[: _NAMED - len(keys)]]
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
        return tuple(shown_key(str(key)) for key, _, _ in islice(self._store.rows(number), _NAMED))

    def _strays(self) -> Iterator[IntegrityIssue]:
        for number in self._store.strays():
            keys = self._first_keys(number) if isinstance(number, int) else ()
            told = f", among them {', '.join(keys)}" if keys else ""
            yield IntegrityIssue(
                IntegrityIssueKind.STRAY, number if isinstance(number, int) else None, keys,
                f"changes stand under revision {number}, which has no entry{told}",
            )  # fmt: skip

    def _expected(self) -> Iterator[IntegrityIssue]:
        if self._expect is None or self.newer is not None:
            return
        number = self._expect.number
        newest = 0 if self._last is None else self._last.number
        if number > newest:
            told = f"the log ends with {newest}: it was taken back to an older state"
        else:
            told = "the log holds another entry, or none, in its place: it was written anew"
        text = f"revision {number} with the hash that is expected is not there: {told}"
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


def _record(key: str, number: int | None, told: str) -> IntegrityIssue:
    name = shown_key(key)
    text = f"{name}: the record {told}: it was changed past the log, or newer entries of the log were cut off"
    return IntegrityIssue(IntegrityIssueKind.RECORD, number, (name,), text)


def _called(entry: Entry) -> str:
    return f"revision {entry.number}, by {entry.actor} at {entry.at},"


def _counted(changes: int, keys: Sequence[str]) -> str:
    """How many changes, and the first keys of them."""
    if not changes:
        return "no change"
    more = f" and {changes - len(keys)} more" if changes > len(keys) else ""
    return f"{changes} {'change' if changes == 1 else 'changes'}: {', '.join(keys)}{more}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
