"""One write transaction on the policy table: records go in, decided entries and what has changed come out.

Every verdict in the table is worked out here, by the `decide` that is passed in. An edit only ever touches
what its records reach: their own entries, and the other entries of their subscriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

import msgspec

from portward.model import (
    Attachment,
    Exemption,
    ExemptionState,
    Mode,
    Network,
    Reason,
    Record,
    Subscription,
    Workload,
)
from portward.table import layout
from portward.table.database import Part, TableError, Transaction
from portward.table.reader import Account, decode_account

# Beyond so many changed prefixes it is cheaper to forget every remembered verdict than each of them.
MANY_CHANGES: Final = 20_000

Decide: TypeAlias = Callable[[Subscription | None, Exemption | None, Attachment], Reason]


class Place(NamedTuple):
    """A prefix in a segment whose verdict has changed."""

    segment: str
    network: Network


class Edit:
    """A write transaction at work. `changed` and `everything` say afterwards which verdicts are new."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], decide: Decide) -> None:
        """`decide` gives the reason for (subscription, exemption, attachment), at the edit's own time."""
        self._transaction, self._parts, self._decide = transaction, parts, decide
        self.changed: list[Place] = []
        self.everything = False
        self._accounts: dict[int, Account] = {}
        self._lengths: dict[bytes, dict[int, int]] = {}
        self._dirty: set[int] = set()
        self._segments = self._numbered_segments()
        self._names = {number: name for name, number in self._segments.items()}

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
        if not self.everything:  # else each attachment was decided just now
            self.settle(self._dirty)
        self._write_lengths()

    def clear(self) -> None:
        """Empties the table but for its links and segment numbers: everything has changed."""
        for name in (b"lengths", b"entries", b"subscriptions", b"ids", b"holdings", b"expiries"):
            self._transaction.drop(self._parts[name], delete=False)
        self._accounts.clear()
        self._lengths.clear()
        self.everything = True

    def settle(self, subscriptions: Iterable[int]) -> None:
        """Decides all attachments of these subscriptions (the table's numbers) again."""
        for number in sorted(subscriptions):
            keys = list(self._holdings(number))
            for key in keys:
                self._settle_entry(key)
            account = self._account(number)
            if not keys and account.subscription is None and account.exemption is None:
                self._forget(account, number)

    def settle_everything(self) -> None:
        """Decides every attachment again: another preset, another answer."""
        with self._transaction.cursor(self._parts[b"subscriptions"]) as cursor:
            numbers = [int.from_bytes(key, "big") for key in cursor.iternext(keys=True, values=False)]
        self.settle(numbers)

    def expired(self, until: int) -> set[int]:
        """Takes the subscriptions whose grant ended at or before `until` (microseconds) off the list."""
        ended: set[int] = set()
        with self._transaction.cursor(self._parts[b"expiries"]) as cursor:
            while cursor.first() and int.from_bytes(cursor.key(), "big") <= until:
                ended.add(int.from_bytes(cursor.value(), "big"))
                cursor.delete()
        return ended

    def flipped(self, before: Transaction) -> int:
        """How many subscriptions that `before`, a reading of the table as it still is, knows have a source that
        this edit makes pass or be refused, other than before."""
        entries, turned = self._parts[b"entries"], set()
        for key, data in self._touched(before):
            old = layout.Entry.unpack(data)
            if old.subscription not in turned:
                new = self._transaction.get(key, db=entries)
                if _passes(old) != (new is not None and _passes(layout.Entry.unpack(new))):
                    turned.add(old.subscription)
        return len(turned)

    def _touched(self, before: Transaction) -> Iterator[tuple[bytes, bytes]]:
        """The entries, as they still are, that this edit may have changed."""
        entries = self._parts[b"entries"]
        if self.everything:
            with before.cursor(entries) as cursor:
                yield from cursor
            return
        for place in self.changed:
            key = layout.key_of(self._segments[place.segment], place.network)
            if (data := before.get(key, db=entries)) is not None:
                yield key, data

    def put_links(self, want: dict[int, tuple[str, bool]], touched: frozenset[int]) -> set[int]:
        """Makes the links be `want` (index → segment name, observed); gives the indexes that have changed,
        those in `touched` in any case."""
        links = self._parts[b"links"]
        with self._transaction.cursor(links) as cursor:
            have = {int.from_bytes(key, "big"): layout.Link.unpack(value) for key, value in cursor}
        target = {
            index: layout.Link(self._segment(name), observed, name) for index, (name, observed) in want.items()
        }
        for index in have.keys() - target.keys():
            self._transaction.delete(layout.number(index), db=links)
        for index, link in target.items():
            if have.get(index) != link:
                self._transaction.put(layout.number(index), link.pack(), db=links)
        both = have.keys() | target.keys()
        return {index for index in both if index in touched or have.get(index) != target.get(index)}

    def _numbered_segments(self) -> dict[str, int]:
        with self._transaction.cursor(self._parts[b"segments"]) as cursor:
            return {key.decode(): int.from_bytes(value, "big") for key, value in cursor}

    def _segment(self, name: str) -> int:
        number = self._segments.get(name)
        if number is None:
            number = self._segments[name] = len(self._segments) + 1
            self._names[number] = name
            self._transaction.put(name.encode(), layout.number(number), db=self._parts[b"segments"])
        return number

    def _subscription(self, uuid: UUID) -> int:
        """The table's number of a subscription, a new one where it has none."""
        ids = self._parts[b"ids"]
        known = self._transaction.get(uuid.bytes, db=ids)
        if known is not None:
            return int.from_bytes(known, "big")
        with self._transaction.cursor(self._parts[b"subscriptions"]) as cursor:
            number = int.from_bytes(cursor.key(), "big") + 1 if cursor.last() else 1
        self._transaction.put(uuid.bytes, layout.number(number), db=ids)
        self._write_account(number, Account(uuid))
        return number

    def _account(self, number: int) -> Account:
        account = self._accounts.get(number)
        if account is None:
            data = self._transaction.get(layout.number(number), db=self._parts[b"subscriptions"])
            if data is None:
                raise TableError(f"the policy table is damaged: no subscription has the number {number}")
            account = self._accounts[number] = decode_account(data)
        return account

    def _write_account(self, number: int, account: Account) -> None:
        self._accounts[number] = account
        body = msgspec.json.encode(account)
        self._transaction.put(layout.number(number), body, db=self._parts[b"subscriptions"])

    def _account_changes(self, uuid: UUID, **fields: Subscription | Exemption | None) -> None:
        number = self._subscription(uuid)
        self._write_account(number, msgspec.structs.replace(self._account(number), **fields))
        self._dirty.add(number)

    def _forget(self, account: Account, number: int) -> None:
        self._transaction.delete(account.id.bytes, db=self._parts[b"ids"])
        self._transaction.delete(layout.number(number), db=self._parts[b"subscriptions"])
        del self._accounts[number]

    def _put_exemption(self, exemption: Exemption, *, keep: bool) -> None:
        number = self._subscription(exemption.subscription)
        before = self._account(number).exemption
        for old, present in ((before, False), (exemption, keep)):
            if old is not None and old.state is ExemptionState.GRANTED and old.until is not None:
                self._list_expiry(old.until, number, present=present)
        self._account_changes(exemption.subscription, exemption=exemption if keep else None)

    def _list_expiry(self, until: datetime, number: int, *, present: bool) -> None:
        key, value = layout.microseconds(until).to_bytes(8, "big"), layout.number(number)
        if present:
            self._transaction.put(key, value, db=self._parts[b"expiries"])
        else:
            self._transaction.delete(key, value, db=self._parts[b"expiries"])

    def _put_attachment(self, attachment: Attachment) -> None:
        segment = self._segment(attachment.segment)
        key = layout.key_of(segment, attachment.address)
        number = self._subscription(attachment.subscription)
        account = self._account(number)
        reason = self._decide(account.subscription, account.exemption, attachment)
        entry = layout.Entry(
            reason,
            account.subscription is not None and account.subscription.mode is Mode.OBSERVE,
            attachment.workload is Workload.PAAS,
            number,
            layout.microseconds(attachment.started),
        )
        data = self._transaction.get(key, db=self._parts[b"entries"])
        before = None if data is None else layout.Entry.unpack(data)
        if before is None:
            self._count_length(segment, attachment.address, +1)
        if before is None or before.subscription != number:
            if before is not None:
                self._transaction.delete(layout.number(before.subscription), key, db=self._parts[b"holdings"])
                self._dirty.add(before.subscription)
            self._transaction.put(layout.number(number), key, db=self._parts[b"holdings"])
        self._write_entry(key, before, entry)

    def _remove_attachment(self, attachment: Attachment) -> None:
        segment = self._segment(attachment.segment)
        key = layout.key_of(segment, attachment.address)
        data = self._transaction.pop(key, db=self._parts[b"entries"])
        if data is None:
            return
        before = layout.Entry.unpack(data)
        self._transaction.delete(layout.number(before.subscription), key, db=self._parts[b"holdings"])
        self._count_length(segment, attachment.address, -1)
        self._dirty.add(before.subscription)
        self._note(key)

    def _holdings(self, number: int) -> Iterable[bytes]:
        with self._transaction.cursor(self._parts[b"holdings"]) as cursor:
            if cursor.set_key(layout.number(number)):
                yield from cursor.iternext_dup()

    def _settle_entry(self, key: bytes) -> None:
        data = self._transaction.get(key, db=self._parts[b"entries"])
        if data is None:
            return
        before = layout.Entry.unpack(data)
        account = self._account(before.subscription)
        if account.subscription is None:
            reason, observed = Reason.DENIED_UNKNOWN_SOURCE, False
        else:
            segment, network = layout.network_of(key)
            attachment = Attachment(
                segment=self._names[segment],
                address=network,
                subscription=account.subscription.id,
                workload=Workload.PAAS if before.paas else Workload.VM,
                started=layout.instant(before.started),
            )
            reason = self._decide(account.subscription, account.exemption, attachment)
            observed = account.subscription.mode is Mode.OBSERVE
        self._write_entry(key, before, before._replace(reason=reason, observed=observed))

    def _write_entry(self, key: bytes, before: layout.Entry | None, entry: layout.Entry) -> None:
        if entry == before:
            return
        self._transaction.put(key, entry.pack(), db=self._parts[b"entries"])
        if before is None or _meaning(before) != _meaning(entry):
            self._note(key)

    def _note(self, key: bytes) -> None:
        if self.everything:
            return
        segment, network = layout.network_of(key)
        self.changed.append(Place(self._names[segment], network))
        if len(self.changed) > MANY_CHANGES:
            self.everything = True
            self.changed.clear()

    def _count_length(self, segment: int, network: Network, step: int) -> None:
        key = layout.family_key(segment, len(network.network_address.packed))
        counts = self._lengths.get(key)
        if counts is None:
            data = self._transaction.get(key, db=self._parts[b"lengths"])
            counts = self._lengths[key] = {} if data is None else layout.unpack_lengths(data)
        counts[network.prefixlen] = counts.get(network.prefixlen, 0) + step

    def _write_lengths(self) -> None:
        for key, counts in self._lengths.items():
            used = {length: count for length, count in counts.items() if count > 0}
            self._transaction.put(key, layout.pack_lengths(used), db=self._parts[b"lengths"])


def _passes(entry: layout.Entry) -> bool:
    return entry.reason.allows or entry.observed


def _meaning(entry: layout.Entry) -> tuple[bool, bool, bool, int]:
    """What of an entry a remembered verdict depends on: two entries alike in it need no forgetting."""
    unknown = entry.reason is Reason.DENIED_UNKNOWN_SOURCE
    return entry.reason.allows, unknown, entry.observed, entry.subscription
