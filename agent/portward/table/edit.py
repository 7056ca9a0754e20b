"""One write transaction on the policy table: records go in, decided entries and what has changed come out.

Every verdict in the table is worked out here (or in `load`), by the `rule` that is passed in. An edit only ever
touches what its records reach: their own entries, and the other entries of their subscriptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import msgspec

from portward.model import Attachment, Exemption, ExemptionState, Network, Reason, Record, Subscription, Workload
from portward.table import layout
from portward.table.account import Account, ByWorkload, Outcomes, Rule, by_workload
from portward.table.database import Part, TableError, Transaction
from portward.table.denials import BLOCKED, Level, level_of
from portward.table.load import Loadable, load
from portward.table.rows import Rows
from portward.table.segments import Segments

# Beyond so many changed prefixes it is cheaper to forget every remembered verdict than each of them.
MANY_CHANGES: Final = 20_000


class Place(NamedTuple):
    """A prefix in a segment whose verdict has changed."""

    segment: str
    network: Network


class Edit:
    """A write transaction at work. `changed` and `everything` say afterwards which verdicts are new."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], rule: Rule) -> None:
        """`rule` gives what holds for attachments, at the edit's own time."""
        self._transaction, self._parts, self._rule = transaction, parts, rule
        self.changed: list[Place] = []
        self.everything = False
        self._segments = Segments(transaction, parts)
        self._entries = {size: Rows(transaction, parts[name]) for size, name in layout.ENTRIES.items()}
        self._holdings = {size: Rows(transaction, parts[name]) for size, name in layout.HOLDINGS.items()}
        self._ids, self._expiries = Rows(transaction, parts[b"ids"]), Rows(transaction, parts[b"expiries"])
        self._accounts: dict[int, Account] = {}
        self._outcomes: dict[int, ByWorkload] = {}
        self._lengths: dict[bytes, dict[int, int]] = {}
        self._dirty: set[int] = set()
        # Subscriptions whose limit has changed: what the kernel has of it is old, though no verdict is.
        self._relimited: set[int] = set()

    def apply(self, put: Iterable[Record], removed: Iterable[Record]) -> None:
        """Takes records in and out. Subscriptions and exemptions first, so that each attachment among the
        records is decided once; then the other attachments of what they touch are decided again."""
        attachments: list[tuple[Attachment, bool]] = []
        for records, keep in ((removed, False), (put, True)):
            for record in records:
                match record:
                    case Subscription():
                        self._account_changes(record.id, subscription=record if keep else None)
                    case Exemption():
                        self._put_exemption(record, keep=keep)
                    case Attachment():
                        attachments.append((record, keep))
        for attachment, keep in attachments:
            if keep:
                self._put_attachment(attachment)
            else:
                self._remove_attachment(attachment)
        self.settle(self._dirty)
        self._write_lengths()

    def replace(self, records: Iterable[Loadable]) -> None:
        """Makes the table hold these records and nothing else, but for its links and segment numbers: everything
        has changed. See `load` for their order."""
        for name in (b"lengths", b"accounts", *layout.ROWS):
            self._transaction.drop(self._parts[name], delete=False)
        load(self._transaction, self._parts, self._segments, self._rule, records)
        self.everything = True

    def settle(self, subscriptions: Iterable[int]) -> None:
        """Decides all attachments of these subscriptions (the table's numbers) again."""
        for number in sorted(subscriptions):
            places = list(self._places(number))
            for place in places:
                self._settle_entry(place)
            account = self._account(number)
            if not places and account.subscription is None and account.exemption is None:
                self._forget(account, number)

    def settle_everything(self) -> None:
        """Decides every attachment again: another preset, another answer."""
        with self._transaction.cursor(self._parts[b"accounts"]) as cursor:
            numbers = [int.from_bytes(key, "big") for key in cursor.iternext(keys=True, values=False)]
        self.settle(numbers)

    def expired(self, until: int) -> set[int]:
        """Takes the subscriptions whose grant ended at or before `until` (microseconds) off the list."""
        ended: set[int] = set()
        while (row := self._expiries.first()) is not None and int.from_bytes(row[:8], "big") <= until:
            ended.add(int.from_bytes(row[8:], "big"))
            self._expiries.remove(row)
        return ended

    def turned(self, before: Transaction) -> tuple[set[int], set[int]]:
        """Of the subscriptions (the table's numbers) that `before` knows, a reading of the table as it still is:
        those of which this edit refuses a source that passed, and those of which it lets one pass that did not."""
        closed: set[int] = set()
        opened: set[int] = set()
        for row in self._touched(before):
            old = layout.Entry.of(row)
            new = self._entry(layout.place_of(row))
            passes = new is not None and _passes(new)
            if _passes(old) != passes:
                (opened if passes else closed).add(old.subscription)
        return closed, opened

    def before(self, transaction: Transaction) -> Edit:
        """A look at the table as it still is, by the same rule; `transaction` is a reading."""
        return Edit(transaction, self._parts, self._rule)

    def place_of(self, attachment: Attachment) -> bytes:
        """Where the entry of an attachment is, or would be."""
        return layout.place(self._segments.number(attachment.segment), attachment.address)

    def owner_of(self, attachment: Attachment) -> UUID | None:
        """The subscription that holds the very prefix of an attachment."""
        entry = self._entry(self.place_of(attachment))
        return None if entry is None else self._account(entry.subscription).id

    def places_of(self, id_: UUID) -> Iterator[bytes]:
        """The places of all entries of the subscription with this UUID."""
        known = self._ids.find(id_.bytes)
        return iter(()) if known is None else self._places(int.from_bytes(known[16:], "big"))

    def exemption(self, id_: UUID) -> Exemption | None:
        """The exemption of the subscription with this UUID."""
        known = self._ids.find(id_.bytes)
        return None if known is None else self._account(int.from_bytes(known[16:], "big")).exemption

    def level(self, place: bytes) -> tuple[Level, int]:
        """How freely sources at a place may send that no more specific prefix covers, and the number of the
        subscription that covers them (0: none does)."""
        entry = self._covering(place)
        if entry is None:
            return BLOCKED, 0
        number = entry.subscription
        return level_of(entry, self._account(number), self._outcome(number)), number

    def deny_early(self, subscriptions: Iterable[int]) -> None:
        """Notes subscriptions that are denied ahead of a held change."""
        rows = Rows(self._transaction, self._parts[b"early"])
        for number in subscriptions:
            rows.put(layout.number(number))

    def end_early(self) -> None:
        """Forgets which subscriptions were denied ahead of a held change: it is in force, or was taken back."""
        self._transaction.drop(self._parts[b"early"], delete=False)

    def _covering(self, place: bytes) -> layout.Entry | None:
        """The entry with the most specific prefix that covers a place. Lengths as they stand after `apply`."""
        segment, longest = layout.segment_and_length(place)
        size = layout.address_bytes(place)
        data = self._transaction.get(layout.family_key(segment, size), db=self._parts[b"lengths"])
        address = int.from_bytes(place[4:], "big")
        for length in () if data is None else layout.unpack_lengths(data):
            rest = size * 8 - length
            if length <= longest:
                start = layout.prefix_of(segment, length) + (address >> rest << rest).to_bytes(size, "big")
                if (row := self._entries[size].find(start)) is not None:
                    return layout.Entry.of(row)
        return None

    def _touched(self, before: Transaction) -> Iterator[bytes]:
        """The rows of entries, as they still are, that this edit may have changed."""
        entries = {size: Rows(before, self._parts[name]) for size, name in layout.ENTRIES.items()}
        if self.everything:
            for rows in entries.values():
                yield from rows
            return
        for changed in self.changed:
            place = layout.place(self._segments.number(changed.segment), changed.network)
            if (row := entries[layout.address_bytes(place)].find(place)) is not None:
                yield row

    def put_links(self, want: dict[int, tuple[str, bool]], touched: frozenset[int]) -> set[int]:
        """Makes the links be `want` (index → segment name, observed); gives the indexes that have changed,
        those in `touched` in any case."""
        links = self._parts[b"links"]
        with self._transaction.cursor(links) as cursor:
            have = {int.from_bytes(key, "big"): layout.Link.unpack(value) for key, value in cursor}
        target = {
            index: layout.Link(self._segments.number(name), observed, name)
            for index, (name, observed) in want.items()
        }
        for index in have.keys() - target.keys():
            self._transaction.delete(layout.number(index), db=links)
        for index, link in target.items():
            if have.get(index) != link:
                self._transaction.put(layout.number(index), link.pack(), db=links)
        both = have.keys() | target.keys()
        return {index for index in both if index in touched or have.get(index) != target.get(index)}

    def _subscription(self, uuid: UUID) -> int:
        """The table's number of a subscription, a new one where it has none."""
        known = self._ids.find(uuid.bytes)
        if known is not None:
            return int.from_bytes(known[16:], "big")
        with self._transaction.cursor(self._parts[b"accounts"]) as cursor:
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
        self._ids.put(uuid.bytes + layout.number(number))
        self._write_account(number, Account(uuid))
        return number

    def _account(self, number: int) -> Account:
        account = self._accounts.get(number)
        if account is None:
            data = self._transaction.get(layout.number(number), db=self._parts[b"accounts"])
            if data is None:
                raise TableError(f"the policy table is damaged: no subscription has the number {number}")
            account = self._accounts[number] = Account.unpack(data)
        return account

    def _write_account(self, number: int, account: Account) -> None:
        self._accounts[number] = account
        self._outcomes.pop(number, None)
        self._transaction.put(layout.number(number), account.pack(), db=self._parts[b"accounts"])

    def _account_changes(self, uuid: UUID, **fields: Subscription | Exemption | None) -> None:
        number = self._subscription(uuid)
        self._write_account(number, msgspec.structs.replace(self._account(number), **fields))
        self._dirty.add(number)

    def _forget(self, account: Account, number: int) -> None:
        self._ids.remove(account.id.bytes + layout.number(number))
        self._transaction.delete(layout.number(number), db=self._parts[b"accounts"])
        del self._accounts[number]

    def _put_exemption(self, exemption: Exemption, *, keep: bool) -> None:
        number = self._subscription(exemption.subscription)
        before = self._account(number).exemption
        if (None if before is None else before.limit) != exemption.limit:
            self._relimited.add(number)
        for old, present in ((before, False), (exemption, keep)):
            if old is not None and old.state is ExemptionState.GRANTED and old.until is not None:
                self._list_expiry(old.until, number, present=present)
        self._account_changes(exemption.subscription, exemption=exemption if keep else None)

    def _list_expiry(self, until: datetime, number: int, *, present: bool) -> None:
        row = layout.due(layout.microseconds(until), number)
        if present:
            self._expiries.put(row)
        else:
            self._expiries.remove(row)

    def _put_attachment(self, attachment: Attachment) -> None:
        place = layout.place(self._segments.number(attachment.segment), attachment.address)
        holdings = self._holdings[layout.address_bytes(place)]
        number = self._subscription(attachment.subscription)
        before = self._entry(place)
        if before is None:
            self._count_length(place, +1)
        if before is None or before.subscription != number:
            if before is not None:
                holdings.remove(layout.number(before.subscription) + place)
                self._dirty.add(before.subscription)
            holdings.put(layout.number(number) + place)
        outcome = self._outcome(number)[attachment.workload is Workload.PAAS]
        self._write_entry(place, before, outcome, layout.microseconds(attachment.started))

    def _remove_attachment(self, attachment: Attachment) -> None:
        place = layout.place(self._segments.number(attachment.segment), attachment.address)
        before = self._entry(place)
        if before is None:
            return
        self._entries[layout.address_bytes(place)].remove(before.row(place))
        self._holdings[layout.address_bytes(place)].remove(layout.number(before.subscription) + place)
        self._count_length(place, -1)
        self._dirty.add(before.subscription)
        self._note(place)

    def _places(self, number: int) -> Iterator[bytes]:
        """The places of all entries of a subscription."""
        for rows in self._holdings.values():
            for row in rows.starting(layout.number(number)):
                yield row[4:]

    def _entry(self, place: bytes) -> layout.Entry | None:
        row = self._entries[layout.address_bytes(place)].find(place)
        return None if row is None else layout.Entry.of(row)

    def _settle_entry(self, place: bytes) -> None:
        before = self._entry(place)
        if before is not None:
            self._write_entry(place, before, self._outcome(before.subscription)[before.paas], before.started)

    def _write_entry(self, place: bytes, before: layout.Entry | None, outcome: Outcomes, started: int) -> None:
        if outcome.later(started):
            self._expiries.put(layout.due(started, outcome.number))
        row = outcome.row(place, started)
        entry = layout.Entry.of(row)
        if entry == before:
            if entry.subscription in self._relimited:
                self._note(place)
            return
        rows = self._entries[layout.address_bytes(place)]
        if before is not None:
            rows.remove(before.row(place))
        rows.put(row)
        if before is None or _meaning(before) != _meaning(entry) or entry.subscription in self._relimited:
            self._note(place)

    def _outcome(self, number: int) -> ByWorkload:
        found = self._outcomes.get(number)
        if found is None:
            found = self._outcomes[number] = by_workload(number, self._account(number), self._rule)
        return found

    def _note(self, place: bytes) -> None:
        if self.everything:
            return
        segment, network = layout.network_of(place)
        self.changed.append(Place(self._segments.name(segment), network))
        if len(self.changed) > MANY_CHANGES:
            self.everything = True
            self.changed.clear()

    def _count_length(self, place: bytes, step: int) -> None:
        segment, length = layout.segment_and_length(place)
        key = layout.family_key(segment, layout.address_bytes(place))
        counts = self._lengths.get(key)
        if counts is None:
            data = self._transaction.get(key, db=self._parts[b"lengths"])
            counts = self._lengths[key] = {} if data is None else layout.unpack_lengths(data)
        counts[length] = counts.get(length, 0) + step

    def _write_lengths(self) -> None:
        for key, counts in self._lengths.items():
            self._transaction.put(key, layout.pack_lengths(counts), db=self._parts[b"lengths"])


def _passes(entry: layout.Entry) -> bool:
    return entry.reason.allows or entry.observed


def _meaning(entry: layout.Entry) -> tuple[bool, bool, bool, bool, int]:
    """What of an entry a remembered verdict depends on: two entries alike in it need no forgetting."""
    unknown = entry.reason is Reason.DENIED_UNKNOWN_SOURCE
    return entry.reason.allows, unknown, entry.observed, entry.limited, entry.subscription
