"""The changes that an inventory would make in a store. Pure: records in, changes and their descriptions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import UUID

import msgspec

from portward.base.limits import CLOCK_DRIFT
from portward.base.words import utc_as_typed
from portward.config.documents import nearest, network_text
from portward.inventory.records import Inventory
from portward.model import Attachment, Exemption, ExemptionState, Reason, Record, Subscription, Workload
from portward.policy.decide import rule
from portward.policy.preset import Preset
from portward.store.codec import UNREADABLE, decode, readable, shown_key
from portward.store.confirmation import CONFIRMED, confirmed, confirmed_alone, confirmed_hold
from portward.store.values import Put

# How many grants are named.
_NAMED: Final = 5

# Key → the record under it, as JSON.
Find: TypeAlias = Callable[[str], str | None]


class Difference(NamedTuple):
    """The records that an inventory adds and changes (key → JSON from now on), and the keys it takes away."""

    added: dict[str, str]
    changed: dict[str, str]
    removed: tuple[str, ...]

    def puts(self) -> list[Put]:
        """The batch that brings it about."""
        new = [Put(key, body) for part in (self.added, self.changed) for key, body in part.items()]
        return new + [Put(key, None) for key in self.removed]

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {"added": len(self.added), "changed": len(self.changed), "removed": len(self.removed)}


def difference(have: Mapping[str, str], inventory: Inventory, *, prune: bool) -> Difference:
    """The difference between the store's records (key → JSON) and the inventory. With `prune`, records that the
    inventory does not name are removed."""
    want = inventory.records
    return Difference(
        added={key: body for key, body in want.items() if key not in have},
        changed={key: body for key, body in want.items() if _differs(key, have.get(key, body), body)},
        removed=tuple(sorted(have.keys() - want.keys())) if prune else (),
    )


def check_offers(inventory: Inventory, preset: Preset) -> None:
    """Raises InputError for an offer that the preset does not know: it would be denied for ever."""
    for offer, key in inventory.offers.items():
        if preset.offer(offer) is None:
            known = [id_ for entry in preset.offers for id_ in entry.ids]
            problem = f"the preset {preset.name} knows no offer {offer!r}; {nearest(offer, known)}"
            raise inventory.mistake(key, problem, "offer")


def check_starts(inventory: Inventory, now: datetime) -> None:
    """Raises InputError for a machine that is started later than `now`, by a clock that is fast: it would count
    for a grant without having been restarted."""
    if inventory.latest_start is not None and inventory.latest_start[0] > now + CLOCK_DRIFT:
        started, key = inventory.latest_start
        problem = f"{utc_as_typed(started)} lies in the future, this host's clock says {utc_as_typed(now)}"
        raise inventory.mistake(key, problem, "started")


def late_creation(inventory: Inventory, now: datetime) -> str:
    """The warning about a subscription that is created after `now`, with its file and line; empty if there is
    none. A mistyped year makes a customer younger than every rule on age asks for. The inventory is accepted all
    the same, because the host's clock may be wrong."""
    # A day where the customer is may be one that UTC has not begun yet.
    if inventory.latest_creation is None or inventory.latest_creation[0] <= (now + timedelta(days=1)).date():
        return ""
    created, key = inventory.latest_creation
    problem = f"{created} lies in the future, this host's clock says {utc_as_typed(now)}"
    return str(inventory.mistake(key, problem, "created"))


def useless_grants(
    have: Mapping[str, str], inventory: Inventory, change: Difference, preset: Preset, now: datetime
) -> Iterator[str]:
    """A warning for each new grant that has no effect, because the offer can never be exempt; if there are many,
    the first ones. The inventory is accepted all the same, because a record may be older than the offer."""
    found: list[tuple[str, str]] = []
    for key, body in (*change.added.items(), *change.changed.items()):
        if not key.startswith("exemptions/"):
            continue
        record = readable(key, body)
        if isinstance(record, Exemption) and record.state is ExemptionState.GRANTED:
            owner_key = f"subscriptions/{record.subscription}"
            owner = readable(owner_key, inventory.records.get(owner_key, have.get(owner_key)))
            if (
                isinstance(owner, Subscription)
                and rule(preset, owner, record, Workload.VM, now=now).reason is Reason.DENIED_INELIGIBLE
            ):
                found.append((key, owner.offer))
    # To find the line of one the documents are read again, which takes seconds for a million records.
    for key, offer in found[:_NAMED]:
        problem = f"is granted and makes no difference: the offer {offer} can never be exempt"
        yield str(inventory.mistake(key, problem, "state"))
    if len(found) > _NAMED:
        yield f"and {len(found) - _NAMED} more grants like these"


def check_references(have: Mapping[str, str], inventory: Inventory, *, prune: bool) -> None:
    """Raises InputError for a record whose subscription is not in the inventory, nor in the store or about to
    leave it."""
    for id_, key in inventory.subscriptions.items():
        subscription = f"subscriptions/{id_}"
        if subscription in inventory.records:
            continue
        if subscription not in have:
            problem = f"no subscription {id_} is in the files or in the store"
            raise inventory.mistake(key, problem, "subscription")
        if prune:
            problem = f"subscription {id_} is not in the files, so --prune would remove it: name it, or not this"
            raise inventory.mistake(key, problem, "subscription")


def described(have: Mapping[str, str], inventory: Inventory, change: Difference) -> Iterator[str]:
    """A line for each changed record: `+` added, `~` changed with its fields, `-` removed."""

    def find(key: str) -> str | None:
        return inventory.records.get(key) or have.get(key)

    for key, body in change.added.items():
        yield described_change(key, None, body, find)
    for key, body in change.changed.items():
        yield described_change(key, have[key], body, find)
    for key in change.removed:
        yield described_change(key, have[key], None, find)


def described_change(key: str, before: str | None, after: str | None, find: Find) -> str:
    """A line for a key that held `before` and now holds `after`, which need not be records; None: nothing. `find`
    gives the records of the subscriptions, so that they can be called by their names."""
    owners = _Owners(find)
    if key == CONFIRMED and after is not None:
        alone = confirmed_alone(after)
        if alone:
            return f"! confirmed revision {alone}"
        instead = ", in place of another history" if confirmed_hold(after) else ""
        return f"! confirmed everything up to revision {confirmed(after) or after}{instead}"
    if before is not None and after is not None:
        record = readable(key, after)
        called = shown_key(key) if record is None else _changed(record, owners)
        return f"~ {called}: {_fields(before, after)}"
    record = readable(key, before if after is None else after)
    return f"{'-' if after is None else '+'} {shown_key(key) if record is None else _title(record, owners)}"


class _Owners:
    """Finds the names of subscriptions for output."""

    def __init__(self, find: Find) -> None:
        self._record = find

    def name(self, id_: UUID) -> str:
        found = self._find(id_)
        return found.name if found is not None and found.name else str(id_)

    def name_and_offer(self, id_: UUID) -> str:
        found = self._find(id_)
        return self.name(id_) if found is None else f"{self.name(id_)} ({found.offer})"

    def _find(self, id_: UUID) -> Subscription | None:
        key = f"subscriptions/{id_}"
        record = readable(key, self._record(key))
        return record if isinstance(record, Subscription) else None


def _title(record: Record, owners: _Owners) -> str:
    match record:
        case Subscription():
            called = f"{record.name} {record.id}".strip()
            return f"subscription {called} ({record.offer}, created {record.created}, {record.standing})"
        case Attachment():
            return f"{_place(record)} → {owners.name_and_offer(record.subscription)}"
        case Exemption():
            return f"exemption of {owners.name_and_offer(record.subscription)}: {record.state}"


def _changed(record: Record, owners: _Owners) -> str:
    match record:
        case Subscription():
            return f"subscription {owners.name(record.id)}"
        case Attachment():
            return _place(record)
        case Exemption():
            return f"exemption of {owners.name(record.subscription)}"


def _place(record: Attachment) -> str:
    return f"attachment {record.segment} {network_text(record.address)}"


def _differs(key: str, before: str, after: str) -> bool:
    """Whether two texts hold different records. A record that another version has written otherwise is the
    same; one that cannot be read is not."""
    return before != after and readable(key, before) != decode(key, after)


def _fields(before: str, after: str) -> str:
    old, new = _read(before), _read(after)
    if new is None:
        return "cannot be read"
    if old is None:
        return "could not be read"
    return ", ".join(
        f"{name} {_value(old.get(name))} → {_value(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


def _read(body: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any])
    except UNREADABLE:
        return None
    return found


def _value(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
