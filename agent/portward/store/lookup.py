"""Finds what a store has on one subscription, by UUID or name, or on one source address. Pure."""

from __future__ import annotations

from ipaddress import ip_network
from typing import NamedTuple
from uuid import UUID

import msgspec

from portward.config.documents import network_text
from portward.model import Address, Attachment, Exemption, Record, Subscription
from portward.store.codec import attachment_key, decode, readable
from portward.store.protocol import Store
from portward.store.validity import is_interface


class SubscriptionRecords(NamedTuple):
    """A subscription, its exemption and its attachments; None for a record that the store does not have."""

    id: UUID
    subscription: Subscription | None
    exemption: Exemption | None
    attachments: tuple[Attachment, ...]


def find(
    store: Store, segment: str, address: Address
) -> tuple[int, Attachment | None, Subscription | None, Exemption | None]:
    """The store's revision, and its records on a source address: the attachment with the most specific prefix, its
    subscription, and that subscription's exemption. Raises RecordError if one cannot be read."""
    revision = store.revision()
    attachment = _most_specific(store, segment, address)
    if attachment is None:
        return revision, None, None, None
    subscription = _read(store, f"subscriptions/{attachment.subscription}")
    return (
        revision,
        attachment,
        subscription if isinstance(subscription, Subscription) else None,
        _exemption(store, attachment.subscription),
    )


def records_of(store: Store, wanted: str) -> tuple[int, list[SubscriptionRecords]]:
    """The store's revision, and the records of the subscription with this UUID; if there is none, those of all
    subscriptions with exactly this name.

    Reads every record of the store, because attachments are stored by segment and address.
    """
    revision, records = store.read_all()
    search = _Search(wanted)
    for key, body in records:
        search.look_at(key, body)
    found = [
        SubscriptionRecords(owner, search.subscriptions.get(owner), _exemption(store, owner), tuple(attachments))
        for owner, attachments in search.owners.items()
    ]
    by_id = [
        one for one in found if one.id == search.id and (one.subscription or one.exemption or one.attachments)
    ]
    return revision, by_id or [one for one in found if one.subscription and one.subscription.name == wanted]


def uuid_of(text: str) -> UUID | None:
    """The UUID that a text writes; None if it is not a UUID."""
    try:
        return UUID(text)
    except ValueError:
        return None


class _Search:
    """Goes through all records, subscriptions before attachments, and decodes only those that may match."""

    def __init__(self, wanted: str) -> None:
        self.id = uuid_of(wanted)
        self.subscriptions: dict[UUID, Subscription] = {}
        self.owners: dict[UUID, list[Attachment]] = {} if self.id is None else {self.id: []}
        self._key, self._wanted = f"subscriptions/{self.id}", wanted
        self._name = msgspec.json.encode(wanted).decode()
        self._ids: tuple[str, ...] | None = None

    def look_at(self, key: str, body: str) -> None:
        """Collects the record if it matches. A record that cannot be read matches nothing."""
        if key.startswith("attachments/"):
            # Attachments come last, so all owners are known by now.
            self._ids = self._ids or tuple(map(str, self.owners))
            if any(id_ in body.lower() for id_ in self._ids):
                record = readable(key, body)
                if isinstance(record, Attachment) and record.subscription in self.owners:
                    self.owners[record.subscription].append(record)
        # Another tool may have written any character of the name as an escape.
        elif key == self._key or (key.startswith("subscriptions/") and (self._name in body or "\\u" in body)):
            record = readable(key, body)
            if isinstance(record, Subscription) and (record.id == self.id or record.name == self._wanted):
                self.subscriptions[record.id] = record
                self.owners.setdefault(record.id, [])


def _most_specific(store: Store, segment: str, address: Address) -> Attachment | None:
    if not is_interface(segment):  # no key contains bytes that are not UTF-8
        return None
    for length in range(address.max_prefixlen, -1, -1):
        network = ip_network((address, length), strict=False)
        record = _read(store, attachment_key(segment, network_text(network)))
        if isinstance(record, Attachment):
            return record
    return None


def _exemption(store: Store, owner: UUID) -> Exemption | None:
    record = _read(store, f"exemptions/{owner}")
    return record if isinstance(record, Exemption) else None


def _read(store: Store, key: str) -> Record | None:
    body = store.get(key)
    return None if body is None else decode(key, body)
