"""Fills an empty table with all records of a store, in some microseconds for each attachment.

Rows are encoded, sorted and appended, so that they fill their pages. They are the rows that an `Edit` would have
written. A row of about 60 bytes for each attachment, and the accounts, are in memory meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias
from uuid import UUID

from portward.model import Attachment, Exemption, Subscription
from portward.store.packed import Packed, packed
from portward.table import layout
from portward.table.account import Account, ByWorkload, Rule, by_workload, grant_end
from portward.table.database import Part, Rows, Transaction
from portward.table.segments import Segments

Loadable: TypeAlias = Subscription | Exemption | Attachment | Packed


def load(
    transaction: Transaction,
    parts: dict[bytes, Part],
    segments: Segments,
    rule: Rule,
    now: int,
    records: Iterable[Loadable],
) -> None:
    """Fills the parts that hold records, decided at `now` (microseconds since 1970). Raises ValueError if a
    subscription or an exemption comes after an attachment, because it would decide that one. Raises TableError if
    a key comes twice."""
    accounts, attachments = _Accounts(transaction, parts, rule, now), _Attachments(transaction, parts, segments)
    known, put = accounts.known, attachments.put
    for record in records:
        match record:
            case Packed():
                put(record, known.get(record.subscription) or accounts.outcomes(record.subscription))
            case Attachment():
                same = packed(record)
                attachments.put(same, accounts.outcomes(same.subscription))
            case Subscription():
                accounts.put_subscription(record)
            case Exemption():
                accounts.put_exemption(record)
    accounts.write()
    attachments.write()


class _Accounts:
    """Subscriptions and exemptions. From the first attachment on, it has only the outcomes for their
    attachments."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], rule: Rule, now: int) -> None:
        self._transaction, self._parts, self._rule, self._now = transaction, parts, rule, now
        self._subscriptions: dict[UUID, Subscription] = {}
        self._exemptions: dict[UUID, Exemption] = {}
        # The outcomes so far, by the UUID as text, as attachments name it.
        self.known: dict[str, ByWorkload] = {}
        self._ids: list[bytes] = []

    def put_subscription(self, subscription: Subscription) -> None:
        """Takes in a subscription."""
        self._expect_no_attachment()
        self._subscriptions[subscription.id] = subscription

    def put_exemption(self, exemption: Exemption) -> None:
        """Takes in an exemption."""
        self._expect_no_attachment()
        self._exemptions[exemption.subscription] = exemption

    def outcomes(self, subscription: str) -> ByWorkload:
        """The outcomes for the attachments of a subscription (UUID as text), also if it has no record."""
        found = self.known.get(subscription)
        if found is None:
            self._write_all()
            found = self.known.get(subscription) or self._write(Account(UUID(subscription)))
        return found

    def write(self) -> None:
        """Writes the accounts that `outcomes` has not written yet."""
        self._write_all()
        Rows(self._transaction, self._parts[b"ids"]).extend(sorted(self._ids))

    def _expect_no_attachment(self) -> None:
        if self._ids:
            raise ValueError("a subscription or an exemption comes after an attachment")

    def _write_all(self) -> None:
        for id_ in sorted(self._subscriptions.keys() | self._exemptions.keys(), key=lambda uuid: uuid.int):
            self._write(Account(id_, self._subscriptions.pop(id_, None), self._exemptions.pop(id_, None)))

    def _write(self, account: Account) -> ByWorkload:
        number = len(self._ids) + 1
        key = layout.number(number)
        self._transaction.put(key, account.pack(), db=self._parts[b"accounts"], append=True)
        self._ids.append(account.id.bytes + key)
        if (end := grant_end(account.exemption)) is not None and end > self._now:
            Rows(self._transaction, self._parts[b"expiries"]).put(layout.due(end, number))
        found = self.known[str(account.id)] = by_workload(number, account, self._rule)
        return found


class _Attachments:
    """Entries, holdings and prefix lengths."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], segments: Segments) -> None:
        self._transaction, self._parts, self._segments = transaction, parts, segments
        self._prefixes: dict[tuple[str, int], bytes] = {}
        self._rows: dict[int, list[bytes]] = {size: [] for size in layout.ENTRIES}

    def put(self, attachment: Packed, outcomes: ByWorkload) -> None:
        """Adds an attachment of a subscription with these outcomes."""
        start, address = (attachment.segment, attachment.length), attachment.address
        prefix = self._prefixes.get(start)
        if prefix is None:
            prefix = self._prefixes[start] = layout.prefix_of(self._segments.number(start[0]), start[1])
        outcome, started = outcomes[attachment.paas], attachment.started
        if started > layout.LATEST_START:  # noqa: PLR1730 # `min` takes longer, a million times
            started = layout.LATEST_START
        self._rows[len(address)].append(outcome.row(prefix + address, started))
        if outcome.later(started):
            Rows(self._transaction, self._parts[b"expiries"]).put(layout.due(started, outcome.number))

    def write(self) -> None:
        """Writes all attachments."""
        for size, rows in self._rows.items():
            rows.sort()
            Rows(self._transaction, self._parts[layout.ENTRIES[size]]).extend(rows)
            self._write_lengths(rows, size)
            layout.make_holdings(rows)
            rows.sort()
            Rows(self._transaction, self._parts[layout.HOLDINGS[size]]).extend(rows)
            rows.clear()

    def _write_lengths(self, rows: list[bytes], size: int) -> None:
        """`rows` are sorted."""
        lengths: dict[int, dict[int, int]] = defaultdict(dict)
        for prefix in self._prefixes.values():
            first = bisect_left(rows, prefix)
            count = bisect_left(rows, layout.after(prefix), first) - first
            if count:
                segment, length = layout.segment_and_length(prefix)
                lengths[segment][length] = count
        for segment, counts in lengths.items():
            key = layout.family_key(segment, size)
            self._transaction.put(key, layout.pack_lengths(counts), db=self._parts[b"lengths"])
