"""The changes of a later revision that may be enforced while an earlier one is held: those that make no source
freer.

A level says how freely a source may send, now and later by itself. Changes are weighed in groups: the changes of
one subscription, and of all subscriptions that it exchanges attachments with. A group is taken in whole if no
source in it gets a higher level. Otherwise the whole group waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Final, NamedTuple, Protocol
from uuid import UUID

from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.table import layout
from portward.table.account import Account, ByWorkload


class Level(NamedTuple):
    """How freely a source may send: new connections a minute, how many of them at once, until when (microseconds
    since 1970), and from when on. `early` is 0 for now, else the negated microseconds since 1970, so that a later
    begin is less."""

    per_minute: float
    burst: float
    until: float
    early: float = 0

    @property
    def passes(self) -> bool:
        """True if it may send at all, now or at a time that is recorded already."""
        return self.per_minute > 0

    def within(self, other: Level) -> bool:
        """True if `other` allows all that this level allows."""
        return all(mine <= its for mine, its in zip(self, other, strict=True))


BLOCKED: Final = Level(0, 0, 0, -inf)
FREE: Final = Level(inf, inf, inf)


class Group(NamedTuple):
    """Changes of records that are taken in together or not at all, and the subscriptions that they concern."""

    owners: frozenset[UUID]
    put: tuple[Record, ...]
    removed: tuple[Record, ...]


class Weighed(NamedTuple):
    """The effect of a group: `freer` if any source may send more than before; `losers` are the subscriptions (the
    table's numbers) of which a source may no longer send."""

    freer: bool
    losers: frozenset[int] = frozenset()


def level_of(entry: layout.Entry | None, account: Account | None, outcomes: ByWorkload | None) -> Level:
    """The level of a source under the entry that covers it. `account` is the entry's account, and `outcomes` are
    the outcomes for its attachments."""
    if entry is None or account is None or outcomes is None:
        return BLOCKED
    if entry.observed:
        return FREE
    starts = outcomes[entry.paas].later(entry.started)
    if entry.reason.allows and not (entry.by_exemption or starts):
        return FREE
    if entry.reason.allows:
        return _granted(account.exemption)
    granted = _granted(account.exemption) if starts else BLOCKED
    # A source that may send from a later start on must not send before it, under any subscription.
    return granted._replace(early=-entry.started) if granted.passes else granted


def groups(
    put: Iterable[Record], removed: Iterable[Record], owner: Callable[[Attachment], UUID | None]
) -> list[Group]:
    """The changes of a revision in groups. `owner` gives the subscription that has an attachment's prefix now."""
    joined = _Joined()
    changes: list[tuple[Record, bool, UUID]] = []
    for records, keep in ((removed, False), (put, True)):
        for record in records:
            owners = list(_owners(record, owner, keep=keep))
            if owners:  # without an owner there is nothing to remove
                joined.join(owners)
                changes.append((record, keep, owners[0]))
    found: dict[UUID, tuple[list[Record], list[Record]]] = {}
    for record, keep, any_owner in changes:
        found.setdefault(joined.root(any_owner), ([], []))[0 if keep else 1].append(record)
    members = joined.members()
    return [Group(frozenset(members[root]), tuple(kept), tuple(gone)) for root, (kept, gone) in found.items()]


class Levels(Protocol):
    """The methods of a table that weighing a change needs. `Edit` has them."""

    def place_of(self, attachment: Attachment) -> bytes:
        """The place of an attachment's entry, also if there is no such entry."""

    def places_of(self, id_: UUID) -> Iterator[bytes]:
        """The places of all entries of the subscription with this UUID."""

    def level(self, place: bytes) -> tuple[Level, int]:
        """How freely sources at a place may send, and the number of the subscription that covers them."""

    def exemption(self, id_: UUID) -> Exemption | None:
        """The exemption of the subscription with this UUID."""


def weigh(before: Levels, after: Levels, group: Group) -> Weighed:
    """The effect of a group: `before` is the table without it, `after` the edit that took it in."""
    attachments = (record for record in (*group.put, *group.removed) if isinstance(record, Attachment))
    places = {after.place_of(attachment) for attachment in attachments}
    for id_ in group.owners:
        places.update(before.places_of(id_))
        places.update(after.places_of(id_))
    losers, tighter = set(), False
    for place in places:
        (old, number), (new, _) = before.level(place), after.level(place)
        if not new.within(old):
            return Weighed(freer=True)
        tighter = tighter or new != old
        if old.passes and not new.passes:
            losers.add(number)
    # A grant that allows no source yet does so at the next start of a machine. It waits like any other grant.
    grows = any(_grows(before.exemption(id_), after.exemption(id_)) for id_ in group.owners)
    return Weighed(grows and not tighter, frozenset(losers))


def _granted(exemption: Exemption | None) -> Level:
    if exemption is None or exemption.state is not ExemptionState.GRANTED:
        return BLOCKED
    limit, until = exemption.limit, exemption.until
    return Level(
        inf if limit is None else limit.per_minute,
        inf if limit is None else limit.burst,
        inf if until is None else layout.microseconds(until),
    )


def _grows(old: Exemption | None, new: Exemption | None) -> bool:
    """Whether an exemption by itself allows more than the one before."""
    if not _granted(new).within(_granted(old)):
        return True
    if new is None or old is None or new.state is not ExemptionState.GRANTED:
        return False
    # An earlier grant also counts for machines that were started before the later one.
    return layout.microseconds(new.decided) < layout.microseconds(old.decided)


def _owners(record: Record, owner: Callable[[Attachment], UUID | None], *, keep: bool) -> Iterator[UUID]:
    match record:
        case Subscription():
            yield record.id
        case Exemption():
            yield record.subscription
        case Attachment():
            if (has := owner(record)) is not None:
                yield has
            if keep:
                yield record.subscription


class _Joined:
    """Sets of subscriptions that are merged (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[UUID, UUID] = {}

    def join(self, ids: list[UUID]) -> None:
        """Merges the sets of all these subscriptions."""
        first = self.root(ids[0])
        for other in ids[1:]:
            self._parents[self.root(other)] = first

    def root(self, id_: UUID) -> UUID:
        """The subscription that represents its set."""
        parents = self._parents
        parent = parents.setdefault(id_, id_)
        while parent != id_:
            parents[id_] = parents[parent]
            id_, parent = parent, parents[parent]
        return id_

    def members(self) -> dict[UUID, list[UUID]]:
        """Each set, by the subscription that represents it."""
        found: dict[UUID, list[UUID]] = {}
        for id_ in self._parents:
            found.setdefault(self.root(id_), []).append(id_)
        return found
