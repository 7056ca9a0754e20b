"""What always holds in a policy table between two transactions, and a walk that finds what does not.

1. The head is of this format.
2. Segments and names are each other's inverse; a link leads to a segment that has its name.
3. Accounts and ids are each other's inverse; an account can be read, and has a record or an entry.
4. An entry has a code with a meaning, stands in a segment that has a name, and refers to an account. Its network
   address has no bit beyond its prefix length, and no place has two entries.
5. Entries and holdings are each other's inverse.
6. The prefix lengths of a segment and their counts are those of its entries.
7. A row in expiries is for a grant that ends then, or for an entry with that start. Each grant that has not ended
   yet, and has an end, has its row.

Whether an entry's code is what the policy says is not among them: it depends on the preset and on the time. A bit
that turns one code into another one with a meaning is not found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from portward.base.interfaces import decoded, encoded, shown
from portward.table import layout
from portward.table.account import Account, grant_end
from portward.table.database import DatabaseError, Part, Rows, TableError, Transaction, open_database, open_parts

# Violations that are listed one by one.
_LISTED: Final = 10


class Verified(NamedTuple):
    """The result of a walk: the numbers of attachments and subscriptions, and of violations, the first ones in
    words."""

    attachments: int
    subscriptions: int
    broken: int
    listed: tuple[str, ...]


def verify(folder: Path, now: datetime) -> Verified:
    """Walks through the table in `folder` at one commit of it, read-only, also beside a running agent.

    Takes seconds for a million attachments. Raises TableError if the file cannot be opened or read, and
    OtherFormatError for a table of another format.
    """
    environment = open_database(folder, write=False)
    try:
        parts = open_parts(environment, write=False)
        with environment.begin() as transaction:
            walk = Walk(transaction, parts, now)
            findings = walk.findings()
            listed = tuple(islice(findings, _LISTED))
            broken = len(listed) + sum(1 for _ in findings)
            return Verified(walk.attachments, len(walk.accounts), broken, listed)
    except DatabaseError as error:
        raise TableError(f"{folder}: the policy table cannot be read: {error}") from error
    finally:
        environment.close()


class Walk:
    """One walk through a table in a read transaction."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], now: datetime) -> None:
        """Grants that end after `now` must have a row in `expiries`."""
        self._transaction, self._parts, self._now = transaction, parts, layout.microseconds(now)
        self.attachments = 0
        # Number → when its grant ends, in microseconds since 1970, if it does.
        self.accounts: dict[int, int | None] = {}
        self._unnamed: set[int] = set()
        self._segments: set[int] = set()
        # Rows of expiries for which nothing was found yet.
        self._unexplained: set[bytes] = set()
        self._lengths: dict[bytes, Counter[int]] = {}

    def findings(self) -> Iterator[str]:
        """The violations, a line for each."""
        data = self._transaction.get(layout.HEAD)
        if data is None:  # a table that holds no policy yet
            return
        if layout.Head.unpack(data) is None:
            yield f"the head is not one of format {layout.FORMAT}"
        yield from self._segment_findings()
        yield from self._link_findings()
        self._unexplained = set(Rows(self._transaction, self._parts[b"expiries"]))
        yield from self._account_findings()
        for size in layout.ENTRIES:
            yield from self._entry_findings(size)
        yield from self._length_findings()
        for number in sorted(self._unnamed):
            yield f"account {number} has neither a record nor an entry"
        for row in sorted(self._unexplained):
            number, at = int.from_bytes(row[8:], "big"), layout.moment(int.from_bytes(row[:8], "big"))
            yield f"subscription {number} is due for another decision at {at:%Y-%m-%d %H:%M:%SZ}, for no reason"

    def _records(self, part: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._transaction.cursor(self._parts[part]) as cursor:
            yield from cursor

    def _segment_findings(self) -> Iterator[str]:
        names = dict(self._records(b"names"))
        self._segments = {int.from_bytes(key, "big") for key in names}
        for name, number in self._records(b"segments"):
            if names.pop(number, None) != name:
                yield f"segment {_text(name)} has the number of another one"
        for number, name in names.items():
            yield f"segment number {int.from_bytes(number, 'big')} is not that of its segment {_text(name)}"

    def _link_findings(self) -> Iterator[str]:
        for key, data in self._records(b"links"):
            index = int.from_bytes(key, "big")
            try:
                link = layout.Link.unpack(data)
            except layout.DamagedError as error:
                yield f"interface {index}: {error}"
                continue
            if self._transaction.get(layout.number(link.segment), db=self._parts[b"names"]) != encoded(link.name):
                yield f"interface {index} leads to another segment than {shown(link.name)}"

    def _account_findings(self) -> Iterator[str]:
        ids = Rows(self._transaction, self._parts[b"ids"])
        for key, data in self._records(b"accounts"):
            number = int.from_bytes(key, "big")
            self.accounts[number] = None
            try:
                account = Account.unpack(data)
            except layout.DamagedError as error:
                yield f"account {number}: {error}"
                continue
            if ids.find(account.id.bytes) != account.id.bytes + key:
                yield f"subscription {account.id} is not listed with its number {number}"
            end = self.accounts[number] = grant_end(account.exemption)
            if end is not None:
                due = layout.due(end, number)
                if due not in self._unexplained and end > self._now:
                    yield f"the grant of subscription {account.id} has an end that is not listed"
                self._unexplained.discard(due)
            if account.subscription is None and account.exemption is None:
                self._unnamed.add(number)
        listed = self._transaction.stat(self._parts[b"ids"])["entries"]
        if listed != len(self.accounts):
            yield f"{listed} subscriptions are listed, and there are {len(self.accounts)} accounts"

    def _entry_findings(self, size: int) -> Iterator[str]:
        holdings = Rows(self._transaction, self._parts[layout.HOLDINGS[size]])
        masks, before, count = layout.masks(size), b"", 0
        counts: Counter[bytes] = Counter()
        for row in Rows(self._transaction, self._parts[layout.ENTRIES[size]]):
            count += 1
            place = layout.place_of(row)
            counts[place[:4]] += 1
            yield from self._flaws(row, place, masks)
            if place == before:
                yield f"two entries stand for {_where(place)}"
            before = place
            number, start = row[-12:-8], row[-8:-1]
            if holdings.find(number + place) is None:
                yield f"the entry for {_where(place)} is missing among those of its subscription"
            self._unnamed.discard(int.from_bytes(number, "big"))
            if self._unexplained:
                self._unexplained.discard(b"\0" + start + number)
        for prefix, found in counts.items():
            segment, length = layout.segment_and_length(prefix)
            self._lengths.setdefault(layout.family_key(segment, size), Counter())[length] = found
        self.attachments += count
        held = self._transaction.stat(self._parts[layout.HOLDINGS[size]])["entries"]
        if held != count:
            yield f"subscriptions hold {held} entries of IPv{4 if size == 4 else 6}, and there are {count}"

    def _flaws(self, row: bytes, place: bytes, masks: tuple[int, ...]) -> Iterator[str]:
        """The violations within one entry."""
        segment, length = layout.segment_and_length(place)
        if length >= len(masks) or layout.address_of(row, len(place) - 4) & ~masks[length]:
            yield f"an entry stands for no prefix: {row.hex()}"
        elif segment not in self._segments:
            yield f"an entry stands in segment {segment}, which has no name: {row.hex()}"
        if layout.meaning_of(row).damaged:
            yield f"the code of the entry for {_where(place)} has no meaning: {row[-1]}"
        if int.from_bytes(row[-12:-8], "big") not in self.accounts:
            yield f"the entry for {_where(place)} refers to no account"

    def _length_findings(self) -> Iterator[str]:
        for key, data in self._records(b"lengths"):
            try:
                counts = Counter(layout.unpack_lengths(data, 4 if key.endswith(b"4") else 16))
            except layout.DamagedError as error:
                yield f"segment {int.from_bytes(key[:3], 'big')}: {error}"
                counts = self._lengths.get(key, Counter())
            if counts != self._lengths.pop(key, Counter()):
                yield f"the prefix lengths of segment {int.from_bytes(key[:3], 'big')} are not its entries'"
        for key in self._lengths:
            yield f"the prefix lengths of segment {int.from_bytes(key[:3], 'big')} are missing"


def _where(place: bytes) -> str:
    try:
        segment, network = layout.network_of(place)
    except ValueError:
        return place.hex()
    return f"{network} in segment {segment}"


def _text(name: bytes) -> str:
    return shown(decoded(name))
