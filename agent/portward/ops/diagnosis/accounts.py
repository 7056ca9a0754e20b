"""Looks up accounts: in the policy table of the running agent, or in the store if no agent runs."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, Protocol
from uuid import UUID

from portward.base.clock import agent_time, utc_now
from portward.config.keys import Config
from portward.daemon.runtime import running
from portward.model import Address, Attachment, Network, Subscription, Workload
from portward.ops.diagnosis.facts import FactSource
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.codec import readable
from portward.store.lookup import SubscriptionRecords, find, records_of, uuid_of
from portward.store.protocol import Store
from portward.table import layout
from portward.table.account import Account
from portward.table.reader import Attached, Reader


class Matched(NamedTuple):
    """The subscription of a source, and the attachment (segment and prefix) that covers it."""

    segment: str
    prefix: Network
    subscription: UUID


class Accounts(Protocol):
    """A place to look accounts up. `at` is the time for which to decide about them."""

    place: FactSource
    revision: int
    at: datetime
    other_preset: bool

    def found(self, wanted: str) -> list[SubscriptionRecords]:
        """The account of the subscription with this UUID; if there is none, all with exactly this name."""

    def names(self) -> list[str]:
        """The names of all subscriptions."""

    def matched(self, segment: str, address: Address) -> Matched | None:
        """The subscription of a source; None if it is unknown."""

    def close(self) -> None:
        """Closes table or store."""


def accounts(config: Config, preset: Preset) -> Accounts:
    """The running agent's table; without one, the store. Raises PortwardError if neither can be read."""
    if running(config.table) is not None:
        reader = Reader.open(config.table)
        head = reader.head()
        if head is not None:
            return TableAccounts(reader, head, preset)
        reader.close()
    return StoreAccounts(open_store(config.store))


class TableAccounts:
    """Accounts of the policy table."""

    place = FactSource.TABLE

    def __init__(self, reader: Reader, head: layout.Head, preset: Preset) -> None:
        self._reader = reader
        self.revision = head.revision
        self.other_preset = head.preset.hex() != preset.digest
        # The agent's clock may have been ahead when it decided. Its decisions hold until this clock gets there,
        # too.
        self.at = agent_time(head.decided())

    def found(self, wanted: str) -> list[SubscriptionRecords]:
        """See `Accounts`."""
        id_ = uuid_of(wanted)
        with self._reader.view():
            account = None if id_ is None else self._reader.account_of(id_)
            held = self._reader.accounts_named(wanted) if account is None else [account]
            return [self._records(one) for one in held]

    def names(self) -> list[str]:
        """See `Accounts`."""
        return [one.name for one in self._reader.subscriptions()]

    def matched(self, segment: str, address: Address) -> Matched | None:
        """See `Accounts`."""
        holding = self._reader.holding(segment, address)
        return None if holding is None else Matched(segment, holding.prefix, holding.account.id)

    def close(self) -> None:
        """See `Accounts`."""
        self._reader.close()

    def _records(self, account: Account) -> SubscriptionRecords:
        attached = tuple(_attachment(one, account.id) for one in self._reader.attached(account.id))
        return SubscriptionRecords(account.id, account.subscription, account.exemption, attached)


class StoreAccounts:
    """Accounts of the store."""

    place = FactSource.STORE
    other_preset = False

    def __init__(self, store: Store) -> None:
        self._store = store
        self.revision, self.at = store.revision(), utc_now()

    def found(self, wanted: str) -> list[SubscriptionRecords]:
        """See `Accounts`."""
        self.revision, held = records_of(self._store, wanted)
        return held

    def names(self) -> list[str]:
        """See `Accounts`."""
        _, records = self._store.read_all()
        found = (readable(key, body) for key, body in records if key.startswith("subscriptions/"))
        return [one.name for one in found if isinstance(one, Subscription)]

    def matched(self, segment: str, address: Address) -> Matched | None:
        """See `Accounts`."""
        _, attachment, _, _ = find(self._store, segment, address)
        return None if attachment is None else Matched(segment, attachment.address, attachment.subscription)

    def close(self) -> None:
        """See `Accounts`."""
        self._store.close()


def _attachment(found: Attached, owner: UUID) -> Attachment:
    return Attachment(
        segment=found.segment,
        address=found.prefix,
        subscription=owner,
        workload=Workload.PAAS if found.entry.paas else Workload.VM,
        started=layout.instant(found.entry.started),
    )
