"""What an inventory would change in a store. Pure: records in, changes and their descriptions out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from portward.documents import enc_hook, network_text
from portward.errors import InputError, StoreError
from portward.model import Attachment, Exemption, Record, Subscription
from portward.policy.preset import Preset
from portward.store.inventory import Inventory
from portward.store.protocol import Put, decode, encode


class Difference(NamedTuple):
    """The records that an inventory adds, changes and takes away, as keys; the JSON of the first two."""

    added: dict[str, str]
    changed: dict[str, str]
    removed: tuple[str, ...]

    def puts(self) -> list[Put]:
        """The batch that brings it about."""
        new = [Put(key, body) for part in (self.added, self.changed) for key, body in part.items()]
        return new + [Put(key, None) for key in self.removed]


def difference(have: Mapping[str, str], inventory: Inventory, *, prune: bool) -> Difference:
    """What differs between the store's records (key → JSON) and the inventory. With `prune`, records that the
    inventory does not name go away."""
    want = {key: encode(record) for key, record in inventory.records.items()}
    return Difference(
        added={key: body for key, body in want.items() if key not in have},
        changed={key: body for key, body in want.items() if key in have and have[key] != body},
        removed=tuple(sorted(have.keys() - want.keys())) if prune else (),
    )


def check_offers(inventory: Inventory, preset: Preset) -> None:
    """Raises InputError for an offer that the preset does not know: it would be denied for ever."""
    for key, record in inventory.records.items():
        if isinstance(record, Subscription) and preset.offer(record.offer) is None:
            raise inventory.mistake(key, _unknown_offer(record.offer, preset), "offer")


def check_references(have: Mapping[str, str], inventory: Inventory, *, prune: bool) -> None:
    """Raises InputError for a record whose subscription is neither in the inventory nor in the store."""
    known = {key for key in inventory.records if key.startswith("subscriptions/")}
    if not prune:
        known |= {key for key in have if key.startswith("subscriptions/")}
    for key, record in inventory.records.items():
        if not isinstance(record, Subscription) and f"subscriptions/{record.subscription}" not in known:
            problem = f"no subscription {record.subscription} is in the files or in the store"
            raise inventory.mistake(key, problem, "subscription")


def described(have: Mapping[str, str], inventory: Inventory, change: Difference) -> Iterator[str]:
    """A line for each changed record: `+` added, `~` changed with its fields, `-` removed."""
    names = _Names(have, inventory)
    for key in change.added:
        yield f"+ {_title(inventory.records[key], names)}{_added(inventory.records[key])}"
    for key in change.changed:
        yield f"~ {_title(inventory.records[key], names)}: {_fields(have[key], change.changed[key])}"
    for key in change.removed:
        yield f"- {_removed(key, have[key], names)}"


class _Names:
    """The names of subscriptions, from the inventory first."""

    def __init__(self, have: Mapping[str, str], inventory: Inventory) -> None:
        self._have, self._inventory = have, inventory

    def of(self, id_: UUID) -> str:
        key = f"subscriptions/{id_}"
        record: Record | None = self._inventory.records.get(key)
        if record is None and key in self._have:
            record = _readable(key, self._have[key])
        return record.name if isinstance(record, Subscription) and record.name else str(id_)


def _title(record: Record, names: _Names) -> str:
    match record:
        case Subscription():
            return f"subscription {record.name or record.id}"
        case Attachment():
            return f"attachment {record.segment} {network_text(record.address)} of {names.of(record.subscription)}"
        case Exemption():
            return f"exemption of {names.of(record.subscription)}"


def _added(record: Record) -> str:
    match record:
        case Subscription():
            return f" ({record.offer}, created {record.created}, {record.standing})"
        case Exemption():
            return f" ({record.state})"
        case Attachment():
            return ""


def _removed(key: str, body: str, names: _Names) -> str:
    record = _readable(key, body)
    return key if record is None else _title(record, names)


def _readable(key: str, body: str) -> Record | None:
    try:
        return decode(key, body)
    except StoreError:
        return None


def _fields(before: str, after: str) -> str:
    old: dict[str, Any] = msgspec.json.decode(before)
    new: dict[str, Any] = msgspec.json.decode(after)
    return ", ".join(
        f"{name} {_value(old.get(name))} → {_value(new.get(name))}"
        for name in new
        if old.get(name) != new.get(name)
    )


def _value(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _unknown_offer(offer: str, preset: Preset) -> str:
    known = [id_ for entry in preset.offers for id_ in entry.ids]
    near = difflib.get_close_matches(offer, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
    return f"the preset {preset.name} knows no offer {offer!r}; {hint}"


def exported(records: Mapping[str, str]) -> dict[str, list[Any]]:
    """The store's records as the document that `portward apply` takes back without any difference."""
    lists: dict[str, list[Any]] = {"subscriptions": [], "attachments": [], "exemptions": []}
    for key, body in sorted(records.items()):
        record = _readable(key, body)
        if record is None:
            raise InputError(f"the store's record {key} cannot be read: {body}")
        lists[key.partition("/")[0]].append(msgspec.to_builtins(record, enc_hook=enc_hook))
    return {kind: found for kind, found in lists.items() if found}
