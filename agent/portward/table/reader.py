"""Looks a source up in the policy table: the most specific prefix within the segment behind an interface.

A lookup is one read transaction. It reads the entry together with the generation that the entry belongs to, so a
verdict never carries the epoch of a policy under which it was not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import get_ident
from typing import NamedTuple
from uuid import UUID

from portward.base.interfaces import decoded, encoded
from portward.model import Address, Attachment, Exemption, Network, Reason, Record, Subscription, Workload
from portward.table import layout
from portward.table.account import Account
from portward.table.damage import Damage
from portward.table.database import (
    Environment,
    Part,
    Rows,
    TableError,
    Transaction,
    find,
    open_database,
    open_parts,
)
from portward.table.layout import LookupResult

_MASKS = {4: layout.masks(4), 16: layout.masks(16)}


class EntryLookup(NamedTuple):
    """An entry for display: the prefix that matched, its account, and the decision."""

    prefix: Network
    entry: layout.Entry
    account: Account


class Attached(NamedTuple):
    """An entry of an account, with its segment and prefix."""

    segment: str
    prefix: Network
    entry: layout.Entry


class Reader:
    """A read-only view of the policy table that follows every commit of the daemon by itself. It belongs to the
    thread that uses it first, and raises RuntimeError on any other."""

    def __init__(self, environment: Environment, parts: dict[bytes, Part], damage: Damage | None = None) -> None:
        """Reads a table that this process has open, because LMDB lets a process open a file only once. `damage`
        takes the rows that cannot be read."""
        self._environment, self._parts = environment, parts
        self._damage = damage or Damage()
        self._snapshot = -1
        self._head: layout.Head | None = None
        self._links: dict[int, layout.Link | None] = {}
        self._steps: dict[tuple[int, int], tuple[tuple[bytes, int], ...]] = {}
        self._results: dict[tuple[bool, layout.CodeMeaning | None], LookupResult] = {}
        self._viewed: Transaction | None = None
        # The thread that used it first.
        self._thread: int | None = None

    @classmethod
    def open(cls, folder: Path) -> Reader:
        """Opens the table in `folder`. Raises TableError if there is none."""
        environment = open_database(folder, write=False)
        return cls(environment, open_parts(environment, write=False))

    @classmethod
    def open_left(cls, folder: Path) -> Reader:
        """Opens the table that an agent left. Raises TableError if there is none, or if a power cut has shortened
        it: reading it would end the process (SIGBUS)."""
        environment = open_database(folder, write=False)
        if environment.cut_off():
            environment.close()
            raise TableError(f"{folder}: the policy table is cut off")
        return cls(environment, open_parts(environment, write=False))

    def close(self) -> None:
        """Closes the table."""
        self._environment.close()

    @contextmanager
    def view(self) -> Iterator[int]:
        """A context in which all methods read the same commit. Yields a number that no other commit has.

        It makes many lookups cheap. Never keep it open while waiting: what it gives becomes older, and LMDB cannot
        reuse the pages that it sees. Raises lmdb's errors.
        """
        with self._begin() as transaction:
            self._follow(transaction)
            self._viewed = transaction
            try:
                yield self._snapshot
            finally:
                self._viewed = None

    def lookup(self, index: int, source: bytes) -> LookupResult | None:
        """The result for a source address (4 or 16 bytes, network byte order) behind the interface `index`.

        None if the table knows no segment behind that interface yet, or holds no policy. Such a packet is dropped,
        and the kernel caches nothing. Raises lmdb's errors if the file cannot be read.
        """
        if self._viewed is not None:
            return self._look_up(self._viewed, index, source)
        with self._begin() as transaction:
            return self._look_up(transaction, index, source)

    def reach(self, index: int, source: bytes) -> tuple[int, int]:
        """The range of addresses around a source for which `lookup` gives the same result, because no entry begins
        or ends in it: the first and the last address, as numbers. Only inside `view`, and only for an interface
        that is a segment.
        """
        assert self._viewed is not None  # noqa: S101 # said above
        link = self._link(self._viewed, index)
        assert link is not None  # noqa: S101 # said above
        size, address = len(source), int.from_bytes(source, "big")
        first, last = 0, _MASKS[size][-1]
        rows = Rows(self._viewed, self._parts[layout.ENTRIES[size]])
        for start, mask in self._steps_of(self._viewed, link.segment, size):
            network, rest = address & mask, _MASKS[size][-1] ^ mask
            before, after = rows.around(start + network.to_bytes(size, "big"))
            if after is not None and after.startswith(start):
                found = layout.address_of(after, size)
                if found == network:
                    # The entry covers the whole range: less specific prefixes cannot divide it.
                    return max(first, network), min(last, network | rest)
                last = min(last, found - 1)
            if before is not None and before.startswith(start):
                first = max(first, (layout.address_of(before, size) | rest) + 1)
        return first, last

    def head(self) -> layout.Head | None:
        """The head of the table; None if it holds no policy yet."""
        if self._viewed is not None:
            return self._head
        with self._begin() as transaction:
            self._follow(transaction)
            return self._head

    def links(self) -> dict[int, layout.Link]:
        """Interface index → the segment behind it, as the daemon wrote it last."""
        with self._snapshot_of() as transaction, transaction.cursor(self._parts[b"links"]) as cursor:
            links = {int.from_bytes(key, "big"): self._link_of(value) for key, value in cursor}
            return {index: link for index, link in links.items() if link is not None}

    def holding(self, segment: str, address: Address) -> EntryLookup | None:
        """The entry that covers an address in the segment of that name; None if the source is unknown. Raises
        TableError if the table is damaged there."""
        with self._snapshot_of() as transaction:
            if transaction is not self._viewed:
                self._follow(transaction)
            number = transaction.get(encoded(segment), db=self._parts[b"segments"])
            if number is None:
                return None
            found = self._entry(transaction, int.from_bytes(number, "big"), address.packed)
            if found is None:
                return None
            entry = _whole(found)
            account = self._account(transaction, entry.subscription)
            if account is None:
                raise TableError(f"the policy table is damaged: no account has the number {entry.subscription}")
            return EntryLookup(layout.network_of(layout.place_of(found))[1], entry, account)

    def owner(self, index: int, source: bytes) -> tuple[layout.Link, layout.Entry | None] | None:
        """The segment behind an interface, and the entry that covers a source in it; None if there is no segment.
        An entry whose code has no meaning is denied."""
        with self._snapshot_of() as transaction:
            link = self._link(transaction, index)
            if link is None:
                return None
            found = self._entry(transaction, link.segment, source)
            return link, None if found is None else self._closed_if_damaged(found)

    def account(self, subscription: int) -> Account | None:
        """The account with the table's number `subscription`; None if there is none, or none that can be read."""
        with self._snapshot_of() as transaction:
            return self._account(transaction, subscription)

    def account_of(self, id_: UUID) -> Account | None:
        """The account of the subscription with this UUID."""
        with self._snapshot_of() as transaction:
            number = self._number(transaction, id_)
            return None if number is None else self._account(transaction, number)

    def accounts_named(self, name: str) -> list[Account]:
        """The accounts of all subscriptions with exactly this name. Reads every account, which takes a second for
        a million."""
        wanted = encoded(name)
        with self._snapshot_of() as transaction, transaction.cursor(self._parts[b"accounts"]) as cursor:
            near = (self._account_in(data) for data in cursor.iternext(keys=False) if wanted in data)
            return [found for found in near if found and found.subscription and found.subscription.name == name]

    def subscriptions(self) -> list[Subscription]:
        """All subscriptions."""
        with self._snapshot_of() as transaction, transaction.cursor(self._parts[b"accounts"]) as cursor:
            accounts = [self._account_in(data) for data in cursor.iternext(keys=False)]
        return [found.subscription for found in accounts if found and found.subscription]

    def attached(self, id_: UUID) -> list[Attached]:
        """All entries of the subscription with this UUID, by segment's number and prefix, IPv4 first."""
        with self._snapshot_of() as transaction:
            number = self._number(transaction, id_)
            if number is None:
                return []
            start = layout.number(number)
            return [
                self._attached(transaction, row[len(start) :], size)
                for size, part in layout.HOLDINGS.items()
                for row in Rows(transaction, self._parts[part]).starting(start)
            ]

    def number_of(self, record: Record) -> int | None:
        """The table's number of the subscription that a record is about; None if the table has none. For an
        attachment it is the subscription that has exactly this prefix now."""
        with self._snapshot_of() as transaction:
            match record:
                case Subscription():
                    return self._number(transaction, record.id)
                case Exemption():
                    return self._number(transaction, record.subscription)
            row = self._row_at(transaction, record)
            return None if row is None else self._closed_if_damaged(row).subscription

    def record_like(self, record: Record) -> Record | None:
        """The record with the same key in the table; None if there is none. Raises DamagedError if there is one
        that cannot be read."""
        with self._snapshot_of() as transaction:
            if isinstance(record, Attachment):
                row = self._row_at(transaction, record)
                return None if row is None else self._attachment_in(transaction, row, record)
            number = self._number(
                transaction, record.id if isinstance(record, Subscription) else record.subscription
            )
            if number is None:
                return None
            account = self._whole_account(transaction, number)
            return account.subscription if isinstance(record, Subscription) else account.exemption

    def counts(self) -> tuple[int, int]:
        """The numbers of attachments and of subscriptions in the table."""
        with self._snapshot_of() as transaction:
            return (
                sum(transaction.stat(self._parts[name])["entries"] for name in layout.ENTRIES.values()),
                transaction.stat(self._parts[b"ids"])["entries"],
            )

    def _look_up(self, transaction: Transaction, index: int, source: bytes) -> LookupResult | None:
        link, head = self._link(transaction, index), self._head
        if head is None or link is None:
            return None
        found = self._entry(transaction, link.segment, source)
        # The whole table has few different results, so each is created once for a commit.
        kind = (link.observed, None if found is None else layout.meaning_of(found))
        result = self._results.get(kind)
        if result is None:
            meaning = kind[1] or layout.CodeMeaning(Reason.DENIED_UNKNOWN_SOURCE, observed=False, limited=False)
            reason, observed, limited, damaged = meaning
            result = self._results[kind] = LookupResult(
                reason,
                observed or head.observe or link.observed,
                head.reject and found is not None,
                head.generation,
                limited,
                damaged,
            )
        return result

    @contextmanager
    def _snapshot_of(self) -> Iterator[Transaction]:
        """The transaction of `view`, or a new one outside of it."""
        if self._viewed is not None:
            yield self._viewed
            return
        with self._begin() as transaction:
            yield transaction

    def _row_at(self, transaction: Transaction, attachment: Attachment) -> bytes | None:
        """The row of the entry with exactly the prefix of an attachment."""
        segment = transaction.get(encoded(attachment.segment), db=self._parts[b"segments"])
        if segment is None:
            return None
        place = layout.place(int.from_bytes(segment, "big"), attachment.address)
        return Rows(transaction, self._parts[layout.ENTRIES[layout.address_bytes(place)]]).find(place)

    def _attachment_in(self, transaction: Transaction, row: bytes, like: Attachment) -> Attachment:
        """The attachment in a row, with the key of `like`. Raises DamagedError."""
        entry = layout.Entry.of(row)
        return Attachment(
            segment=like.segment,
            address=like.address,
            subscription=self._whole_account(transaction, entry.subscription).id,
            workload=Workload.PAAS if entry.paas else Workload.VM,
            started=layout.instant(entry.started),
        )

    def _number(self, transaction: Transaction, id_: UUID) -> int | None:
        """The table's number of a subscription."""
        row = Rows(transaction, self._parts[b"ids"]).find(id_.bytes)
        return None if row is None else int.from_bytes(row[len(id_.bytes) :], "big")

    def _attached(self, transaction: Transaction, place: bytes, size: int) -> Attached:
        row = Rows(transaction, self._parts[layout.ENTRIES[size]]).find(place)
        segment, prefix = layout.network_of(place)
        name = transaction.get(layout.number(segment), db=self._parts[b"names"])
        if row is None or name is None:
            raise TableError(f"the policy table is damaged: {prefix} in segment {segment} has no entry")
        return Attached(decoded(name), prefix, _whole(row))

    def _begin(self) -> AbstractContextManager[Transaction]:
        # Caches belong to one commit, so two threads would mix two commits.
        thread = get_ident()
        if self._thread != thread:
            if self._thread is not None:
                raise RuntimeError("a Reader of the policy table belongs to the thread that used it first")
            self._thread = thread
        return self._environment.begin()

    def _follow(self, transaction: Transaction) -> None:
        """Clears the caches if `transaction` sees another commit than the last one did."""
        if transaction.id() != self._snapshot:
            self._links.clear()
            self._steps.clear()
            self._results.clear()
            data = transaction.get(layout.HEAD)
            self._head = None if data is None else layout.Head.unpack(data)
            self._snapshot = transaction.id()

    def _link(self, transaction: Transaction, index: int) -> layout.Link | None:
        if transaction is not self._viewed:
            self._follow(transaction)
        try:
            return self._links[index]
        except KeyError:
            data = transaction.get(layout.number(index), db=self._parts[b"links"])
            link = None if data is None else self._link_of(data)
            if link is not None and not self._is_segment(transaction, link):
                self._damage.found(f"interface {index} leads to another segment; what comes from it is dropped")
                link = None
            self._links[index] = link
            return link

    def _is_segment(self, transaction: Transaction, link: layout.Link) -> bool:
        """Whether the segment with the link's number has the link's name. Called once for each commit."""
        return transaction.get(layout.number(link.segment), db=self._parts[b"names"]) == encoded(link.name)

    def _link_of(self, data: bytes) -> layout.Link | None:
        """The link in the bytes; None if they are damaged, so that every packet is dropped as without a
        segment."""
        try:
            return layout.Link.unpack(data)
        except layout.DamagedError as error:
            self._damage.found(f"{error}; what comes from its interface is dropped")
            return None

    def _closed_if_damaged(self, row: bytes) -> layout.Entry:
        entry, damaged = layout.Entry.closed_if_damaged(row)
        if damaged:
            self._damage.found(f"entry {row.hex()} has a code without a meaning; its source is denied")
        return entry

    def _entry(self, transaction: Transaction, segment: int, source: bytes) -> bytes | None:
        """The row of the most specific entry that covers `source`."""
        size = len(source)
        steps = self._steps_of(transaction, segment, size)
        if not steps:
            return None
        cursor, address = transaction.cursor(self._parts[layout.ENTRIES[size]]), int.from_bytes(source, "big")
        for start, mask in steps:
            row = find(cursor, start + (address & mask).to_bytes(size, "big"))
            if row is not None:
                return row
        return None

    def _steps_of(self, transaction: Transaction, segment: int, size: int) -> tuple[tuple[bytes, int], ...]:
        """The steps of a lookup of a source of `size` bytes in a segment: for each prefix length, the most
        specific first, the bytes that the keys begin with, and the netmask."""
        steps = self._steps.get((segment, size))
        if steps is None:
            data = transaction.get(layout.family_key(segment, size), db=self._parts[b"lengths"])
            lengths = () if data is None else self._lengths(data, size)
            steps = tuple((layout.prefix_of(segment, length), _MASKS[size][length]) for length in lengths)
            self._steps[segment, size] = steps
        return steps

    def _lengths(self, data: bytes, size: int) -> Iterable[int]:
        """The prefix lengths to search; all of them if the bytes are damaged, so that no entry is missed."""
        try:
            return layout.unpack_lengths(data, size)
        except layout.DamagedError as error:
            self._damage.found(f"{error}; every prefix length is looked for")
            return range(size * 8, -1, -1)

    def _account(self, transaction: Transaction, subscription: int) -> Account | None:
        data = transaction.get(layout.number(subscription), db=self._parts[b"accounts"])
        return None if data is None else self._account_in(data)

    def _whole_account(self, transaction: Transaction, subscription: int) -> Account:
        """The account with this number. Raises DamagedError if there is none, or if it cannot be read."""
        account = self._account(transaction, subscription)
        if account is None:
            raise layout.DamagedError(f"no account that can be read has the number {subscription}")
        return account

    def _account_in(self, data: bytes) -> Account | None:
        try:
            return Account.unpack(data)
        except layout.DamagedError as error:
            self._damage.found(str(error))
            return None


def _whole(row: bytes) -> layout.Entry:
    """The entry of a row. Raises TableError if it is damaged."""
    try:
        return layout.Entry.of(row)
    except layout.DamagedError as error:
        raise TableError(f"the policy table is damaged: {error}") from None
