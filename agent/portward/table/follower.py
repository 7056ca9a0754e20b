"""The policy table follows the store: what was committed there since is taken in, as one change.

A change that would flip too many subscriptions is held, and with it all that comes after: until somebody confirms
it, or until the store's next revisions take it back.

A record that cannot be read is refused by itself: it is named, counted, and what the table holds under its
key stays in force; the rest of the change stands.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import NamedTuple, TypeVar

from portward.model import Record
from portward.store.flips import Flips, HeldError
from portward.store.packed import Packer
from portward.store.protocol import (
    CONFIRMED,
    Change,
    RecordError,
    Store,
    confirmed,
    confirmed_alone,
    decode,
    named,
)
from portward.table.load import Loadable
from portward.table.writer import Committed, GrownError, Writer

_log = logging.getLogger("portward.store")
_T = TypeVar("_T")


class BulkError(Exception):
    """There is more to take in than the follower may; nothing was taken in."""


class Held(NamedTuple):
    """The change up to `revision` is not taken in: what it would flip, and the share that is allowed."""

    revision: int
    flips: Flips
    share: float


class Follower:
    """Brings a table up to the revision of a store. `held` is the change that waits for confirmation, if any."""

    def __init__(self, store: Store, writer: Writer, limit: int | None = None) -> None:
        """A step that would take in more than `limit` changes or records raises BulkError instead; None: any
        number may be."""
        self._store, self._writer, self._limit = store, writer, limit
        self.refused = 0
        self.held: Held | None = None

    def step(self, now: datetime) -> Committed | None:
        """Takes in what is new; None where nothing is, or it is held. Raises StoreError, TableError
        or BulkError, and then the table stands as it stood."""
        revision, share = self._store.revision(), self._writer.max_flip_share
        if self.held is not None and (self.held.revision, self.held.share) == (revision, share):
            return None
        try:
            committed = self._take(revision, now)
        except HeldError as error:
            self.held = Held(revision, error.flips, share)
            _log.error(
                "revision %d %s: it is held, and the policy before stays in force; `portward apply --confirm` "
                "lets it through", revision, error,
            )  # fmt: skip
            return None
        self.held = None
        return committed

    def _take(self, revision: int, now: datetime) -> Committed | None:
        head, identity = self._writer.head(), self._store.identity()
        if head is None or head.store != identity or head.revision > revision:
            return self._replace(identity, now)
        if head.revision == revision:
            return None
        changes = _by_itself(self._within(self._store.changes(head.revision)))
        try:
            return self._apply(changes, head.revision, now)
        except HeldError:
            # What came before the change that flips too many is none of its fault; one revision in each step.
            first = [change for change in changes if change.revision == changes[0].revision]
            if len(first) == len(changes):
                raise
            return self._apply(first, head.revision, now)

    def _replace(self, identity: bytes, now: datetime) -> Committed:
        while True:
            with contextlib.suppress(GrownError):  # else read again: there may be too many to keep
                return self._replace_once(identity, now)

    def _replace_once(self, identity: bytes, now: datetime) -> Committed:
        sure = confirmed(self._store.get(CONFIRMED))
        revision, records = self._store.read_all()
        if self._limit is not None:
            records = iter(self._within(records))
        return self._writer.replace(
            self._quickly(records), revision=revision, store=identity, now=now, confirmed=sure == revision
        )

    def _within(self, items: Iterable[_T]) -> list[_T]:
        """The items, all of them; raises BulkError if they are more than may be taken in."""
        if self._limit is None:
            return list(items)
        found = list(islice(items, self._limit + 1))
        if len(found) > self._limit:
            raise BulkError
        return found

    def _apply(self, changes: list[Change], since: int, now: datetime) -> Committed | None:
        # What came after a confirmation is not confirmed by it: the next step takes it in.
        upto = max((_confirmed(change) for change in changes if change.key == CONFIRMED), default=0)
        sure = upto > since
        newest: dict[str, Change] = {}
        revision = 0
        for change in changes:
            if sure and change.revision > upto:
                break
            newest[change.key] = change
            revision = change.revision
        if not newest:
            return None
        put = self._readable((change.key, change.after) for change in newest.values() if change.after is not None)
        # By its key alone: what the store held there last may be a record that was refused, and then the table
        # holds the one before.
        gone = (named(change.key) for change in newest.values() if change.after is None)
        removed = [record for record in gone if record is not None]
        return self._writer.apply(list(put), removed, revision=revision, now=now, confirmed=sure)

    def _quickly(self, records: Iterable[tuple[str, str]]) -> Iterator[Loadable]:
        """The records that can be read, in their order; attachments as bytes where that can be done."""
        quick = Packer().quick
        for key, body in records:
            found = quick(key, body)
            if found is not None:
                yield found
            else:
                yield from self._readable([(key, body)])

    def _readable(self, records: Iterable[tuple[str, str]]) -> Iterator[Record]:
        """The records that can be read, in their order."""
        for key, body in records:
            if key == CONFIRMED:
                continue
            try:
                yield decode(key, body)
            except RecordError as error:
                self.refused += 1
                _log.error("record refused, the one before stays in force: %s", error)


def _confirmed(change: Change) -> int:
    """The revision that a confirmation confirms; none that came after itself."""
    if confirmed_alone(change.after) == change.revision:
        return change.revision
    return min(confirmed(change.after), change.revision)


def _by_itself(changes: list[Change]) -> list[Change]:
    """Of these changes what may be taken in at once: a revision that is confirmed alone confirms nothing before
    it, so what comes before it is a step of its own, and so is it."""
    confirming = [change for change in changes if change.key == CONFIRMED]
    of_all = max((min(confirmed(change.after), change.revision) for change in confirming), default=0)
    for change in confirming:
        if confirmed_alone(change.after) == change.revision > of_all:
            before = [other for other in changes if other.revision < change.revision]
            return before or [other for other in changes if other.revision == change.revision]
    return changes
