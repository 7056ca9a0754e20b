"""One write transaction on the policy table: takes records in, decides entries, and lists the changed verdicts.

Every verdict in the table is decided here, or in `load`, by the `rule` that is passed in. An edit changes only
what its records reach: their own entries, and the other entries of their subscriptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final
from uuid import UUID

import msgspec

from portward.base.heartbeat import beat
from portward.model import Attachment, Exemption, Reason, Record, Subscription, Workload
from portward.table import layout
from portward.table.account import Account, ByWorkload, Outcomes, Rule, by_workload, grant_end
from portward.table.accounts import Accounts
from portward.table.commits import MANY_CHANGES, ChangedPlace
from portward.table.damage import Damage
from portward.table.database import Part, Rows, TableError, Transaction
from portward.table.denials import BLOCKED, Level, level_of
from portward.table.lengths import Lengths
from portward.table.load import Loadable, load
from portward.table.segments import Segments

# Numbers of subscriptions begin at 1.
_NO_SUBSCRIPTION: Final = 0


class Edit:
    """A write transaction. Afterwards `changed` lists the prefixes with new verdicts, or `everything` is True.
    `opens` says whether a source may send now that could not before, and `closes` whether one may no longer
    send."""

    def __init__(
        self, transaction: Transaction, parts: dict[bytes, Part], rule: Rule, now: datetime, damage: Damage
    ) -> None:
        """`rule` decides on attachments at the time `now`. `damage` takes the rows that cannot be read."""
        self._transaction, self._parts, self._rule, self._damage = transaction, parts, rule, damage
        self._time, self._now = now, layout.microseconds(now)
        self.changed: list[ChangedPlace] = []
        self.everything = False
        self.opens = False
        self.closes = False
        self._segments = Segments(transaction, parts, damage)
        self._entries = {size: Rows(transaction, parts[name]) for size, name in layout.ENTRIES.items()}
        self._holdings = {size: Rows(transaction, parts[name]) for size, name in layout.HOLDINGS.items()}
        self._lengths = Lengths(transaction, parts[b"lengths"], self._entries, damage)
        self._accounts = Accounts(transaction, parts, damage)
        self._expiries = Rows(transaction, parts[b"expiries"])
        self._outcomes: dict[int, ByWorkload] = {}
        # `expiries` has no row for an earlier time and never gets one: what changes before then is decided
        # already.
        self._earliest = self._now if (due := self._expiries.first()) is None else min(self._now, _time_of(due))
        # Subscription → the times whose rows in `expiries` this edit may have to add or remove.
        self._moments: dict[int, set[int]] = {}
        # Subscriptions whose rate limit has changed: the kernel has the old one, although no verdict is new.
        self._relimited: set[int] = set()

    def apply(self, put: Iterable[Record], removed: Iterable[Record]) -> None:
        """Adds and removes records. Subscriptions and exemptions come first, so that each attachment among the
        records is decided once. The other attachments of their subscriptions are decided again after that."""
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
        self.decide(self._accounts.dirty)

    def replace(self, records: Iterable[Loadable]) -> None:
        """Replaces all records of the table; its links and the numbers of segments stay. `load` says in which
        order the records must come."""
        for name in (b"lengths", b"accounts", *layout.ROWS):
            self._transaction.drop(self._parts[name], delete=False)
        load(self._transaction, self._parts, self._segments, self._rule, self._now, records)
        self.everything = True

    def decide(self, subscriptions: Iterable[int]) -> None:
        """Decides all attachments of these subscriptions (the table's numbers) again. Skips a subscription that is
        not in the table."""
        for number in sorted(subscriptions):
            places = list(self._places(number))
            for place in places:
                self._decide_entry(place, number)
            account = self._accounts.find(number)
            if account is None:
                self._damage.found(f"subscription {number} is named, and its account is not there or unreadable")
            elif not places and account.subscription is None and account.exemption is None:
                self._accounts.remove(number, account)
        self._write_moments()
        self._lengths.write()

    def decide_everything(self) -> None:
        """Decides every attachment again, because the preset or the answers have changed."""
        self.decide(self._accounts.numbers())

    def expired(self, until: int) -> set[int]:
        """Removes and returns the subscriptions with a row in `expiries` at or before `until` (microseconds since
        1970)."""
        ended: set[int] = set()
        while (row := self._expiries.first()) is not None and _time_of(row) <= until:
            ended.add(int.from_bytes(row[8:], "big"))
            self._expiries.remove(row)
        return ended

    def turned(self, before: Transaction) -> tuple[set[int], set[int]]:
        """The subscriptions (the table's numbers) of which this edit denies a source that could send, and those of
        which it allows a source that could not. `before` reads the table as it was before the edit."""
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
        """The table as it was before this edit, under the same rule. `transaction` is a read transaction."""
        return Edit(transaction, self._parts, self._rule, self._time, self._damage)

    def place_of(self, attachment: Attachment) -> bytes:
        """The place of an attachment's entry, also if there is no such entry."""
        return layout.place(self._segments.number(attachment.segment), attachment.address)

    def owner_of(self, attachment: Attachment) -> UUID | None:
        """The subscription that has exactly the prefix of an attachment, also if its account cannot be read; None
        if no subscription has it."""
        entry = self._entry(self.place_of(attachment))
        return None if entry is None else self._accounts.uuid_of(entry.subscription)

    def places_of(self, id_: UUID) -> Iterator[bytes]:
        """The places of all entries of the subscription with this UUID."""
        number = self._accounts.number_of(id_)
        return iter(()) if number is None else self._places(number)

    def exemption(self, id_: UUID) -> Exemption | None:
        """The exemption of the subscription with this UUID."""
        return self._accounts.exemption(id_)

    def level(self, place: bytes) -> tuple[Level, int]:
        """How freely sources at a place may send if no more specific prefix covers them, and the number of the
        subscription that covers them (0 if none does)."""
        entry = self._covering(place)
        if entry is None:
            return BLOCKED, 0
        number = entry.subscription
        account = self._accounts.find(number) or Account(UUID(int=0))
        return level_of(entry, account, self._outcome(number)), number

    def deny_early(self, subscriptions: Iterable[int]) -> None:
        """Records subscriptions that are denied ahead of a held change."""
        rows = Rows(self._transaction, self._parts[b"early"])
        for number in subscriptions:
            rows.put(layout.number(number))

    def end_early(self) -> None:
        """Clears the list of subscriptions denied ahead of a held change, because that change is in force or
        withdrawn."""
        self._transaction.drop(self._parts[b"early"], delete=False)

    def _covering(self, place: bytes) -> layout.Entry | None:
        """The entry with the most specific prefix that covers a place. Only after `apply`, which writes the
        lengths."""
        segment, longest = layout.segment_and_length(place)
        size = layout.address_bytes(place)
        address = int.from_bytes(place[4:], "big")
        for length in self._lengths.used(segment, size):
            rest = size * 8 - length
            if length <= longest:
                start = layout.prefix_of(segment, length) + (address >> rest << rest).to_bytes(size, "big")
                if (row := self._entries[size].find(start)) is not None:
                    return layout.Entry.closed_if_damaged(row)[0]
        return None

    def _touched(self, before: Transaction) -> Iterator[bytes]:
        """The rows of entries that this edit may have changed, as they were before it."""
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
        """Replaces the links by `want` (interface index → segment name, observed). Returns the indexes that have
        changed, and those in `touched` in any case."""
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

    def _account_changes(self, uuid: UUID, **fields: Subscription | Exemption | None) -> None:
        number = self._accounts.number_for(uuid)
        account = self._accounts.find(number) or Account(uuid)
        self._accounts.write(number, msgspec.structs.replace(account, **fields))
        self._outcomes.pop(number, None)
        self._accounts.dirty.add(number)

    def _put_exemption(self, exemption: Exemption, *, keep: bool) -> None:
        number = self._accounts.number_for(exemption.subscription)
        account = self._accounts.find(number)
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
        number = self._accounts.number_for(attachment.subscription)
        before = self._entry(place)
        if before is None:
            self._lengths.count(place, +1)
        elif before.subscription != number:
            holdings.remove(layout.number(before.subscription) + place)
            self._accounts.dirty.add(before.subscription)
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
        self._lengths.count(place, -1)
        self._accounts.dirty.add(before.subscription)
        self._look_again(before.subscription, before.started)
        self.opens = self.closes = True  # a wider prefix covers the place now, and may allow or deny
        self._note(place)

    def _places(self, number: int) -> Iterator[bytes]:
        """The places of all entries of a subscription."""
        for rows in self._holdings.values():
            for row in rows.starting(layout.number(number)):
                yield row[4:]

    def _entry(self, place: bytes) -> layout.Entry | None:
        """The entry of a place; denied if it cannot be read."""
        row = self._entries[layout.address_bytes(place)].find(place)
        if row is None:
            return None
        entry, damaged = layout.Entry.closed_if_damaged(row)
        if damaged:
            self._damage.found(f"entry {row.hex()} has a code without a meaning; it is decided anew")
        return entry

    def _remove_row(self, place: bytes) -> None:
        """Removes the entry of a place."""
        rows = self._entries[layout.address_bytes(place)]
        if (row := rows.find(place)) is not None:
            rows.remove(row)

    def _decide_entry(self, place: bytes, number: int) -> None:
        """Decides the entry of a place that `holdings` gives to the subscription with this number."""
        beat()  # a change of many entries takes long, but does not hang
        before = self._entry(place)
        if before is not None and before.subscription == number:
            self._write_entry(place, before, self._outcome(number)[before.paas], before.started)
            return
        self._damage.found(f"subscription {number} holds {place.hex()}, whose entry is not there or another's")
        holdings = self._holdings[layout.address_bytes(place)]
        if before is None or holdings.find(layout.number(before.subscription) + place) is not None:
            holdings.remove(layout.number(number) + place)
            return
        # The owner is unknown, so the entry is denied until the store's attachment is written again.
        unknown = by_workload(_NO_SUBSCRIPTION, Account(UUID(int=0)), self._rule)
        self._write_entry(place, before, unknown[before.paas], before.started)

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
        """Records whether the change of an entry may allow or deny a source. A new entry may deny one, because a
        wider prefix may have allowed it."""
        self.opens |= _passes(after)
        self.closes |= before is None or _passes(before)

    def _look_again(self, number: int, at: int) -> None:
        """Makes `_write_moments` check the row in `expiries` for this time and subscription."""
        if at >= self._earliest:
            self._moments.setdefault(number, set()).add(at)

    def _write_moments(self) -> None:
        """Adds or removes the rows in `expiries` for the times that this edit has touched.

        A time is kept if a grant ends then, or if a recorded start comes then that lets a machine send. A time
        that has passed stays for `expired` if a record still names it.
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
        """The times in `moments` at which a decision on the subscription changes by itself."""
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
        account = self._accounts.find(number)
        return None if account is None else grant_end(account.exemption)

    def _outcome(self, number: int) -> ByWorkload:
        found = self._outcomes.get(number)
        if found is None:
            # Without an account that can be read, the source is unknown and denied.
            account = self._accounts.find(number) or Account(UUID(int=0))
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


def _time_of(due: bytes) -> int:
    """The time of a row in `expiries`, in microseconds since 1970."""
    return int.from_bytes(due[:8], "big")


def _passes(entry: layout.Entry) -> bool:
    return entry.reason.allows or entry.observed


def _meaning(entry: layout.Entry) -> tuple[bool, bool, bool, bool, int]:
    """The fields that a cached verdict depends on. If two entries agree in them, the kernel may keep its
    verdict."""
    unknown = entry.reason is Reason.DENIED_UNKNOWN_SOURCE
    return entry.reason.allows, unknown, entry.observed, entry.limited, entry.subscription
