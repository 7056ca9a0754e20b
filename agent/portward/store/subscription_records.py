"""What a store holds of one subscription, found by its UUID or by its name."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import msgspec

from portward.model import Attachment, Exemption, Subscription
from portward.store.protocol import Store, decode, readable


class SubscriptionRecords(NamedTuple):
    """A subscription, its exemption and its attachments; None for a record that is not there."""

    id: UUID
    subscription: Subscription | None
    exemption: Exemption | None
    attachments: tuple[Attachment, ...]


def records_of(store: Store, wanted: str) -> tuple[int, list[SubscriptionRecords]]:
    """The store's revision, and what it holds of the subscription with this UUID or, where there is none, of all
    that have exactly this name. Looks at every record, since attachments are kept by segment and address."""
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
    """The UUID that a text writes; None where it is none."""
    try:
        return UUID(text)
    except ValueError:
        return None


class _Search:
    """Goes through all records, subscriptions before attachments, and reads as few as it can."""

    def __init__(self, wanted: str) -> None:
        self.id = uuid_of(wanted)
        self.subscriptions: dict[UUID, Subscription] = {}
        self.owners: dict[UUID, list[Attachment]] = {} if self.id is None else {self.id: []}
        self._key, self._wanted = f"subscriptions/{self.id}", wanted
        self._name = msgspec.json.encode(wanted).decode()
        self._ids: tuple[str, ...] | None = None

    def look_at(self, key: str, body: str) -> None:
        """Keeps the record if it belongs to what is wanted; one that cannot be read belongs to nobody."""
        if key.startswith("attachments/"):
            # They come last, so all owners are known.
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


def _exemption(store: Store, owner: UUID) -> Exemption | None:
    key = f"exemptions/{owner}"
    body = store.get(key)
    record = None if body is None else decode(key, body)
    return record if isinstance(record, Exemption) else None
