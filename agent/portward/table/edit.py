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

from portward.base.heartbeat import beat
from portward.model import Attachment, Exemption, Network, Reason, Record, Subscription, Workload
from portward.table import layout
from portward.table.account import Account, ByWorkload, Outcomes, Rule, by_workload, grant_end
from portward.table.damage import Damage
from portward.table.database import Part, Rows, TableError, Transaction
from portward.table.denials import BLOCKED, Level, level_of
from portward.table.load import Loadable, load
from portward.table.segments import Segments

# The number of no subscription: they begin at 1.
_NOBODY: Final = 0
# Beyond so many changed prefixes it is cheaper to forget every remembered verdict than each of them.
MANY_CHANGES: Final = 20_000


class ChangedPlace(NamedTuple):
    """A prefix in a segment whose verdict has changed."""

    segment: str
    network: Network


class Edit:
    """A write transaction at work. `changed` and `everything` say afterwards which verdicts are new, and `opens`
    whether any of them may let packets pass that were stopped before, `closes` the reverse."""

    def __init__(
        self, transaction: Transaction, parts: dict[bytes, Part], rule: Rule, now: datetime, damage: Damage
    ) -> None:
        """`rule` gives what holds for attachments at the time `now`; `damage` takes what cannot be read."""
        self._transaction, self._parts, self._rule, self._damage = transaction, parts, rule, damage
        self._time, self._now = now, layout.microseconds(now)
        self.changed: list[ChangedPlace] = []
        self.everything = False
        self.opens = False
        self.closes = False
        self._segments = Segments(transaction, parts, damage)
        self._entries = {size: Rows(transaction, parts[name]) for size, name in layout.ENTRIES.items()}
        self._holdings = {size: Rows(transaction, parts[name]) for size, name in layout.HOLDINGS.items()}
        self._ids, self._expiries = Rows(transaction, parts[b"ids"]), Rows(transaction, parts[b"expiries"])
        self._accounts: dict[int, Account] = {}
        self._outcomes: dict[int, ByWorkload] = {}
        self._lengths: dict[bytes, dict[int, int]] = {}
        # As `lengths` are written, the longest first: if they are damaged, reading them counts all entries.
        self._covering_lengths: dict[bytes, list[int]] = {}
        # Number → UUID, of subscriptions whose account cannot be read.
        self._uuids: dict[int, UUID] = {}
        self._dirty: set[int] = set()
        # No row of `expiries` is for an earlier time, or is to be: what lies before has been decided.
        self._earliest = self._now if (due := self._expiries.first()) is None else min(self._now, _time_of(due))
        # Subscription → times whose rows in `expiries` may have to come or go.
        self._moments: dict[int, set[int]] = {}
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

    def replace(self, records: Iterable[Loadable]) -> None:
        """Makes the table hold these records and nothing else, but for its links and segment numbers: everything
        has changed. See `load` for their order."""
        for name in (b"lengths", b"accounts", *layout.ROWS):
            self._transaction.drop(self._parts[name], delete=False)
        load(self._transaction, self._parts, self._segments, self._rule, self._now, records)
        self.everything = True

    def settle(self, subscriptions: Iterable[int]) -> None:
        """Decides all attachments of these subscriptions (the table's numbers) again. One of whom the table holds
        nothing is passed over."""
        for number in sorted(subscriptions):
            places = list(self._places(number))
            for place in places:
                self._settle_entry(place, number)
            account = self._account(number)
            if account is None:
                self._damage.found(f"subscription {number} is named, and its account is not there or unreadable")
            elif not places and account.subscription is None and account.exemption is None:
                self._forget(account, number)
        self._write_moments()
        self._write_lengths()

    def settle_everything(self) -> None:
        """Decides every attachment again: another preset, another answer."""
        with self._transaction.cursor(self._parts[b"accounts"]) as cursor:
            numbers = [int.from_bytes(key, "big") for key in cursor.iternext(keys=True, values=False)]
        self.settle(numbers)

    def expired(self, until: int) -> set[int]:
        """Takes the subscriptions whose grant ended at or before `until` (microseconds) off the list."""
        ended: set[int] = set()
        while (row := self._expiries.first()) is not None and _time_of(row) <= until:
            ended.add(int.from_bytes(row[8:], "big"))
            self._expiries.remove(row)
        return ended

    def turned(self, before: Transaction) -> tuple[set[int], set[int]]:
        """Of the subscriptions (the table's numbers) that `before` knows, a reading of the table as it still is:
        those of which this edit refuses a source that passed, and those of which it lets one pass that did not."""
        closed: set[int] = set()
        opened: set[int] = set()
        for row in self._touched(before):
            old, _ = layout.Entry.closed_if_damaged(row)
            new = self._entry(layout.place_of(row))
            passes = new is not None and _passes(new)
            if _passes(old) != passes:
                (opened if passes else closed).add(old.subscription)
        return closed, opened

    def before(self, transaction: Transaction) -> Edit:
        """A look at the table as it still is, by the same rule; `transaction` is a reading."""
        return Edit(transaction, self._parts, self._rule, self._time, self._damage)

    def place_of(self, attachment: Attachment) -> bytes:
        """Where the entry of an attachment is, or would be."""
        return layout.place(self._segments.number(attachment.segment), attachment.address)

    def owner_of(self, attachment: Attachment) -> UUID | None:
        """The subscription that holds the very prefix of an attachment, also if its account cannot be read; None:
        nobody holds it."""
        entry = self._entry(self.place_of(attachment))
        if entry is None:
            return None
        account = self._account(entry.subscription)
        return self._listed(entry.subscription) if account is None else account.id

    def _listed(self, number: int) -> UUID:
        """The subscription that is listed with this number. If none is, a UUID that no subscription has."""
        found = self._uuids.get(number)
        if found is None:
            # Looks at every subscription. Only after a damage, and once for each number.
            end = layout.number(number)
            id_ = next((row[:16] for row in self._ids if row[16:] == end), b"\xff" * 12 + end)
            found = self._uuids[number] = UUID(bytes=id_)
        return found

    def places_of(self, id_: UUID) -> Iterator[bytes]:
        """The places of all entries of the subscription with this UUID."""
        known = self._ids.find(id_.bytes)
        return iter(()) if known is None else self._places(int.from_bytes(known[16:], "big"))

    def exemption(self, id_: UUID) -> Exemption | None:
        """The exemption of the subscription with this UUID."""
        known = self._ids.find(id_.bytes)
        account = None if known is None else self._account(int.from_bytes(known[16:], "big"))
        return None if account is None else account.exemption

    def level(self, place: bytes) -> tuple[Level, int]:
        """How freely sources at a place may send that no more specific prefix covers, and the number of the
        subscription that covers them (0: none does)."""
        entry = self._covering(place)
        if entry is None:
            return BLOCKED, 0
        number = entry.subscription
        account = self._account(number) or Account(UUID(int=0))
        return level_of(entry, account, self._outcome(number)), number

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
        key = layout.family_key(segment, size)
        if key not in self._covering_lengths:
            self._covering_lengths[key] = sorted(self._read_lengths(key, segment, size), reverse=True)
        address = int.from_bytes(place[4:], "big")
        for length in self._covering_lengths[key]:
            rest = size * 8 - length
            if length <= longest:
                start = layout.prefix_of(segment, length) + (address >> rest << rest).to_bytes(size, "big")
                if (row := self._entries[size].find(start)) is not None:
                    return layout.Entry.closed_if_damaged(row)[0]
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
            have = {int.from_bytes(key, "big"): self._link(value) for key, value in cursor}
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

    def _link(self, data: bytes) -> layout.Link | None:
        try:
            return layout.Link.unpack(data)
        except layout.DamagedError as error:
            self._damage.found(f"{error}; it is written anew")
            return None

    def _subscription(self, uuid: UUID) -> int:
        """The table's number of a subscription, a new one where it has none."""
        known = self._ids.find(uuid.bytes)
        if known is not None:
            number = int.from_bytes(known[16:], "big")
            account = self._account(number)
            if account is not None and account.id == uuid:
                return number
            self._damage.found(f"subscription {uuid} has no account that can be read; what it holds is denied")
            self._dirty.add(number)
            if account is None:
                # Closed: of the records that are lost only those that come again are there.
                self._write_account(number, Account(uuid))
                return number
            # Another customer's number: what comes must not be written into that account.
            self._ids.remove(known)
        with self._transaction.cursor(self._parts[b"accounts"]) as cursor:
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
        if number > layout.LAST_NUMBER:
            raise TableError("the policy table has no number left for another subscription")
        self._ids.put(uuid.bytes + layout.number(number))
        self._write_account(number, Account(uuid))
        return number

    def _account(self, number: int) -> Account | None:
        """The account with this number; None if there is none, or none that can be read."""
        account = self._accounts.get(number)
        if account is None:
            data = self._transaction.get(layout.number(number), db=self._parts[b"accounts"])
            if data is None:
                return None
            try:
                account = self._accounts[number] = Account.unpack(data)
            except layout.DamagedError as error:
                self._damage.found(f"account {number}: {error}; its sources are denied")
                return None
        return account

    def _write_account(self, number: int, account: Account) -> None:
        self._accounts[number] = account
        self._outcomes.pop(number, None)
        self._transaction.put(layout.number(number), account.pack(), db=self._parts[b"accounts"])

    def _account_changes(self, uuid: UUID, **fields: Subscription | Exemption | None) -> None:
        number = self._subscription(uuid)
        self._write_account(number, msgspec.structs.replace(self._account(number) or Account(uuid), **fields))
        self._dirty.add(number)

    def _forget(self, account: Account, number: int) -> None:
        self._ids.remove(account.id.bytes + layout.number(number))
        self._transaction.delete(layout.number(number), db=self._parts[b"accounts"])
        del self._accounts[number]

    def _put_exemption(self, exemption: Exemption, *, keep: bool) -> None:
        number = self._subscription(exemption.subscription)
        account = self._account(number)
        before = None if account is None else account.exemption
        if (None if before is None else before.limit) != exemption.limit:
            self._relimited.add(number)
        for one in (before, exemption):
            if (end := grant_end(one)) is not None:
                self._look_again(number, end)
        self._account_changes(exemption.subscription, exemption=exemption if keep else None)

    def _put_attachment(self, attachment: Attachment) -> None:
        place = layout.place(self._segments.number(attachment.segment), attachment.address)
        holdings = self._holdings[layout.address_bytes(place)]
        number = self._subscription(attachment.subscription)
        before = self._entry(place)
        if before is None:
            self._count_length(place, +1)
        elif before.subscription != number:
            holdings.remove(layout.number(before.subscription) + place)
            self._dirty.add(before.subscription)
        holdings.put(layout.number(number) + place)
        outcome = self._outcome(number)[attachment.workload is Workload.PAAS]
        started = min(layout.microseconds(attachment.started), layout.LATEST_START)
        self._write_entry(place, before, outcome, started)

    def _remove_attachment(self, attachment: Attachment) -> None:
        place = layout.place(self._segments.number(attachment.segment), attachment.address)
        before = self._entry(place)
        if before is None:
            return
        self._remove_row(place)
        self._holdings[layout.address_bytes(place)].remove(layout.number(before.subscription) + place)
        self._count_length(place, -1)
        self._dirty.add(before.subscription)
        self._look_again(before.subscription, before.started)
        self.opens = self.closes = True  # a wider prefix holds there now, and may allow or deny
        self._note(place)

    def _places(self, number: int) -> Iterator[bytes]:
        """The places of all entries of a subscription."""
        for rows in self._holdings.values():
            for row in rows.starting(layout.number(number)):
                yield row[4:]

    def _entry(self, place: bytes) -> layout.Entry | None:
        """The entry of a place; one that cannot be read comes out as denied."""
        row = self._entries[layout.address_bytes(place)].find(place)
        if row is None:
            return None
        entry, damaged = layout.Entry.closed_if_damaged(row)
        if damaged:
            self._damage.found(f"entry {row.hex()} has a code without a meaning; it is decided anew")
        return entry

    def _remove_row(self, place: bytes) -> None:
        """Takes the entry of a place out, as it stands there."""
        rows = self._entries[layout.address_bytes(place)]
        if (row := rows.find(place)) is not None:
            rows.remove(row)

    def _settle_entry(self, place: bytes, number: int) -> None:
        """Decides the entry of a place that the subscription with this number holds."""
        beat()  # a change of many entries takes long, and is no hang
        before = self._entry(place)
        if before is not None and before.subscription == number:
            self._write_entry(place, before, self._outcome(number)[before.paas], before.started)
            return
        self._damage.found(f"subscription {number} holds {place.hex()}, whose entry is not there or another's")
        holdings = self._holdings[layout.address_bytes(place)]
        if before is None or holdings.find(layout.number(before.subscription) + place) is not None:
            holdings.remove(layout.number(number) + place)
            return
        # Whose it is cannot be known: it is denied, as nobody's, until the store's attachment is written again.
        nobody = by_workload(_NOBODY, Account(UUID(int=0)), self._rule)
        self._write_entry(place, before, nobody[before.paas], before.started)

    def _write_entry(self, place: bytes, before: layout.Entry | None, outcome: Outcomes, started: int) -> None:
        if outcome.later(started):
            self._look_again(outcome.number, started)
        if before is not None:
            self._look_again(before.subscription, before.started)
        row = outcome.row(place, started)
        entry = layout.Entry.of(row)
        rows = self._entries[layout.address_bytes(place)]
        old = None if before is None else rows.find(place)
        relimited = outcome.number in self._relimited
        if row == old:
            if relimited:
                self._turn(before, entry)
                self._note(place)
            return
        if old is not None:
            rows.remove(old)
        rows.put(row)
        if before is None or _meaning(before) != _meaning(entry) or relimited:
            self._turn(before, entry)
            self._note(place)

    def _turn(self, before: layout.Entry | None, after: layout.Entry) -> None:
        """Records what the change of an entry may do. Before a new one, that of a wider prefix held, and may have
        let packets pass."""
        self.opens |= _passes(after)
        self.closes |= before is None or _passes(before)

    def _look_again(self, number: int, at: int) -> None:
        """Has the row of this time and subscription looked at when all entries are written."""
        if at >= self._earliest:
            self._moments.setdefault(number, set()).add(at)

    def _write_moments(self) -> None:
        """Writes or removes the rows in `expiries` of the times that this edit has touched.

        A time is kept if a grant ends then, or a machine was started then by its record and may send from then on.
        One that has passed stays for `expired`, if anything is still recorded for it.
        """
        for number, moments in self._moments.items():
            kept = self._kept(number, moments)
            for at in moments:
                row = layout.due(at, number)
                if at not in kept:
                    self._expiries.remove(row)
                elif at > self._now:
                    self._expiries.put(row)
        self._moments.clear()

    def _kept(self, number: int, moments: set[int]) -> set[int]:
        """Those of the times at which something of the subscription changes by itself."""
        kept = {at for at in moments if at == self._end(number)}
        for place in self._places(number):
            if kept == moments:
                break
            entry = self._entry(place)
            if entry is None or entry.subscription != number or entry.started not in moments:
                continue
            if entry.started <= self._now or self._outcome(number)[entry.paas].later(entry.started):
                kept.add(entry.started)
        return kept

    def _end(self, number: int) -> int | None:
        account = self._account(number)
        return None if account is None else grant_end(account.exemption)

    def _outcome(self, number: int) -> ByWorkload:
        found = self._outcomes.get(number)
        if found is None:
            # Without an account that can be read nothing is known of a source: it is denied.
            account = self._account(number) or Account(UUID(int=0))
            found = self._outcomes[number] = by_workload(number, account, self._rule)
        return found

    def _note(self, place: bytes) -> None:
        if self.everything:
            return
        try:
            segment, network = layout.network_of(place)
            self.changed.append(ChangedPlace(self._segments.name(segment), network))
            many = len(self.changed) > MANY_CHANGES
        except (TableError, ValueError) as error:
            self._damage.found(f"{error}; every cached verdict goes")
            many = True
        if many:
            self.everything = True
            self.changed.clear()

    def _count_length(self, place: bytes, step: int) -> None:
        """Counts an entry that comes (+1) before it is written, or one that goes (-1) after it is removed."""
        segment, length = layout.segment_and_length(place)
        key = layout.family_key(segment, layout.address_bytes(place))
        counts = self._lengths.get(key)
        if counts is None:
            counts = self._lengths[key] = self._read_lengths(key, segment, layout.address_bytes(place))
        counts[length] = counts.get(length, 0) + step

    def _read_lengths(self, key: bytes, segment: int, size: int) -> dict[int, int]:
        data = self._transaction.get(key, db=self._parts[b"lengths"])
        try:
            return {} if data is None else layout.unpack_lengths(data, size)
        except layout.DamagedError as error:
            self._damage.found(f"{error}; they are counted anew")
        starts = {length: layout.prefix_of(segment, length) for length in range(size * 8 + 1)}
        rows = self._entries[size]
        return {length: sum(1 for _ in rows.starting(start)) for length, start in starts.items()}

    def _write_lengths(self) -> None:
        for key, counts in self._lengths.items():
            self._transaction.put(key, layout.pack_lengths(counts), db=self._parts[b"lengths"])
        self._lengths.clear()
        self._covering_lengths.clear()


def _time_of(due: bytes) -> int:
    """The time of a row of `expiries`, in microseconds since 1970."""
    return int.from_bytes(due[:8], "big")


def _passes(entry: layout.Entry) -> bool:
    return entry.reason.allows or entry.observed


def _meaning(entry: layout.Entry) -> tuple[bool, bool, bool, bool, int]:
    """What of an entry a remembered verdict depends on: two entries alike in it need no forgetting."""
    unknown = entry.reason is Reason.DENIED_UNKNOWN_SOURCE
    return entry.reason.allows, unknown, entry.observed, entry.limited, entry.subscription
