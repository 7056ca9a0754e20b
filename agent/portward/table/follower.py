"""Brings the policy table up to the store: takes in what was committed there since, as one change.

A change that would flip too many subscriptions is held until it is confirmed, or until later revisions of the
store take it back. Later revisions wait behind it. Only what they deny is enforced at once. A revocation in a
later revision waits only if its group would also let a source send more freely (`table.denials`), if its revision
denies too many subscriptions and is not confirmed alone, or while a bulk change runs. The table's own revision
stays where it is, so the later revisions are taken in again, whole, together with the held change.

Revisions are compared by the hash of the store's log (`table.history`). If the store does not have the log entry
at which the table stands, it has another history, and everything is read anew.

A record that cannot be read is refused by itself: it is named and counted, the record that the table has under its
key stays in force, and the rest of the change is taken in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from itertools import groupby, islice
from typing import Final, NamedTuple, TypeVar

from portward.base.instance import command
from portward.model import Record
from portward.store.codec import key_only
from portward.store.confirmation import CONFIRMED, confirmed, confirmed_alone, confirmed_hold
from portward.store.flips import Flips, UnconfirmedError
from portward.store.packed import Packer
from portward.store.protocol import Store
from portward.store.unreadable import Unreadable
from portward.store.values import Change
from portward.table.changes import by_itself, confirmed_in, confirms, is_among, records_of
from portward.table.commits import Committed, Point
from portward.table.history import (
    ahead_of,
    hash_at,
    hash_of_other_history,
    held_history,
    is_in_table,
    same_history,
)
from portward.table.layout import Head
from portward.table.load import Loadable
from portward.table.writer import GrownError, Writer

_NO_STORE: Final = bytes(16)

_log = logging.getLogger("portward.store")
_T = TypeVar("_T")


class BulkError(Exception):
    """There is more to take in than this follower may take. Nothing was taken in."""


class Held(NamedTuple):
    """A held change, which became `revision`: the subscriptions that it would flip, and the share that may flip.
    `whole` if it is everything up to `revision`, because the store's history is not the table's (for example after
    a backup was restored)."""

    revision: int
    flips: Flips
    share: float
    whole: bool = False


class Waiting(NamedTuple):
    """A held change as it was derived, together with all later revisions that the store had (`upto`).

    `base` is the point at which the table stood, and `preset` the digest of the preset. `turned` are the
    subscriptions that would have flipped (the table's numbers, sorted), `flips` how many of how many.
    """

    held: Held
    upto: Point
    base: Point
    preset: bytes
    turned: Sequence[int]
    flips: Flips


class Follower:
    """Brings a table up to the newest revision of a store.

    `held` is the change that waits for confirmation. `in_step` says whether the table stood at the store's newest
    revision after the last step. `unreadable` has the records that were refused. `histories` counts how often the
    store's history was not the table's.
    """

    def __init__(
        self,
        store: Store,
        writer: Writer,
        limit: int | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> None:
        """A step that would take in more than `limit` changes or records raises BulkError instead. None: no
        limit."""
        self._store, self._writer, self._reader, self._limit = store, writer, writer.reader(), limit
        self.histories = 0
        self.unreadable = Unreadable(unreadable)
        self.in_step = False
        self._waiting: Waiting | None = None
        # The subscriptions that the held change flips and that a later revision is about.
        self._hit: set[int] = set()
        self._confirmed = False
        # The table's head (revision, hash, store) for which the log has said that the store has another history.
        self._other: tuple[int, bytes, bytes] | None = None

    @property
    def refused(self) -> int:
        """The number of records that could not be read so far."""
        return self.unreadable.total

    @property
    def held(self) -> Held | None:
        """The change that waits for confirmation; None if none does."""
        return None if self._waiting is None else self._waiting.held

    def reopened(self, store: Store) -> None:
        """Follows a store that was opened again. The counters go on."""
        self._store = store

    @property
    def waiting(self) -> Waiting | None:
        """The held change as it was derived; None if none is held."""
        return self._waiting

    def take_over(
        self,
        waiting: Waiting | None,
        *,
        refused: int,
        unreadable: Mapping[str, str],
        histories: int,
        in_step: bool,
    ) -> None:
        """Goes on from a step that a follower in another process made on the same table."""
        self._waiting, self.in_step = waiting, in_step
        self._confirmed = False
        self._hit.clear()
        self.unreadable.total += refused
        self.unreadable.now = dict(unreadable)
        self.histories += histories

    def step(self, now: datetime) -> Committed | None:
        """Takes in what is new. Returns None if nothing is new or it is held. Raises StoreError, TableError or
        BulkError, and then leaves the table as it was."""
        # Hashes and changes must come from one state: another process may write, or restore a backup, in between.
        with self._store.reading():
            committed = self._step(self._store.revision(), now)
            head = self._writer.head()
            self.in_step = (
                head is not None
                and not head.held
                and head.revision == self._store.revision()
                and same_history(head, self._store)
            )
        return committed

    def _step(self, revision: int, now: datetime) -> Committed | None:
        known = self._is_as_derived()
        # Denials come first, because deriving a large change again takes long. The table's head says that a change
        # is held, also after a restart.
        committed = self._deny_behind(revision, now)
        if committed is not None or (known and not self._may_have_changed()):
            return committed
        waited = self._waiting
        found = self._take(revision, now, waited if known else None)
        self._waiting = None
        if not isinstance(found, Waiting):
            return found
        self._hold(found, waited, now)
        # A confirmation that did not release the held change must not delay denials behind it.
        return self._deny_behind(revision, now, up_to_confirmation=False)

    # --- a held change, and what comes behind it ---

    def _is_as_derived(self) -> bool:
        """Whether deriving the held change again would give the same, apart from later revisions."""
        waiting, head = self._waiting, self._writer.head()
        if waiting is None or head is None or head.held != waiting.held.revision:
            return False
        # A restored backup may have the revision from which the change was derived, but not what the table took in
        # since. If a whole history is held, it is the store's if the denials ahead of it are.
        own = ahead_of(head, self._store) > 0 if waiting.held.whole else same_history(head, self._store)
        same = own and (waiting.held.share, waiting.preset, waiting.base) == (
            self._writer.max_flip_share, self._writer.digest, Point(head.revision, head.hash),
        )  # fmt: skip
        return same and waiting.upto.hash == hash_at(self._store, waiting.upto.revision)

    def _may_have_changed(self) -> bool:
        """Whether later revisions may release the held change: by a confirmation, or because they are about enough
        of the subscriptions that it flips, or because there are more subscriptions now, so that more may flip. A
        revision can take back only what it is about."""
        waiting = self._waiting
        if waiting is None or self._confirmed:
            return True
        now = waiting.flips._replace(subscriptions=self._reader.counts()[1])
        return len(self._hit) >= now.excess(waiting.held.share)

    def _hold(self, waiting: Waiting, before: Waiting | None, now: datetime) -> None:
        held, head = waiting.held, self._writer.head()
        if head is None or Point(head.revision, head.hash) != waiting.base:
            return  # another process has changed the table: the next step derives the change again
        ahead = ahead_of(head, self._store)
        # The table may hold denials of the lost history, while `ahead` now counts in the store's. Without a hash
        # of its own the table would pass for one of the store's history as soon as the store reaches the table's
        # revision.
        lost = held.whole and held_history(head) is None
        if lost or head.held != held.revision or ahead < held.revision:
            ahead = max(ahead, held.revision)
            hash_ = hash_of_other_history() if held.whole else None
            point = Point(ahead, hash_at(self._store, ahead))
            self._writer.hold(held.revision, point, now=now, hash_=hash_, since=head)
        # Only now, so that a table that cannot be written makes the next step derive the change and hold it again.
        noted = self._writer.head() or head
        base = Point(noted.revision, noted.hash)
        self._waiting, self._confirmed = waiting._replace(base=base), False
        self._hit.clear()
        if before is not None and before.held == held:
            return
        whole = "all that the store holds up to " if held.whole else ""
        _log.error(
            "%srevision %d %s: it is held, and the policy before stays in force, with later denials; "
            "`%s` lets it through",
            whole, held.revision, held.flips.describe(held.share), command("apply --confirm"),
        )  # fmt: skip

    def _deny_behind(self, revision: int, now: datetime, *, up_to_confirmation: bool = True) -> Committed | None:
        """Takes in what revisions behind the held one deny, up to the first that denies anything or that confirms
        the held one."""
        head = self._writer.head()
        ahead = 0 if head is None or not head.held else ahead_of(head, self._store)
        if head is None or not ahead or ahead >= revision:
            return None
        with closing(self._store.changes(ahead)) as changes:
            for number, behind in groupby(changes, key=lambda change: change.revision):
                batch = self._within(behind)
                if up_to_confirmation and confirmed_in(batch) >= head.held:
                    self._confirmed = True
                    return None
                committed = self._tighten(number, batch, head, now)
                if committed.new:
                    return committed
                head = head._replace(ahead=number, ahead_hash=hash_at(self._store, number))
        return None

    def _tighten(self, number: int, batch: list[Change], since: Head, now: datetime) -> Committed:
        held = since.held
        put, removed = records_of(batch)
        if (waiting := self._waiting) is not None:
            about = {self._reader.number_of(record) for record in (*put, *removed)}
            self._hit.update(one for one in about if one is not None and is_among(one, waiting.turned))
        ahead = Point(number, hash_at(self._store, number))
        alone = any(confirmed_alone(change.after) == number for change in batch if change.key == CONFIRMED)
        try:
            committed = self._writer.tighten(put, removed, ahead=ahead, now=now, confirmed=alone, since=since)
        except UnconfirmedError as error:
            _log.error("revision %d %s: it waits behind the held revision %d", number, error, held)
            head = self._writer.head()
            return Committed(0, 0) if head is None else Committed(head.revision, head.generation)
        if committed.new:
            _log.info("revision %d: what it refuses is enforced ahead of the held revision %d", number, held)
        return committed

    # --- what the store holds, taken in ---

    def _take(self, revision: int, now: datetime, known: Waiting | None) -> Committed | Waiting | None:
        """Takes in what the store has. `known` is the held change as it was derived before, if that is still
        right."""
        head = self._writer.head()
        same = head is not None and same_history(head, self._store)
        if head is not None and same and head.revision == revision:
            return None
        self.in_step = False  # before the work, which may take long
        if head is None or not same:
            return self._take_all(head, now)
        with closing(self._store.changes(head.revision)) as new:
            every = self._within(new)
        changes = by_itself(every)
        try:
            return self._apply(changes, every, head, now)
        except UnconfirmedError as error:
            # Keep the values and not the error, which would keep this frame and all changes in memory.
            of_all, turned = error.flips, error.turned
        # Revisions before the one that flips too many must not wait for it, so take in one revision in each step.
        first = [change for change in changes if change.revision == changes[0].revision]
        flips = of_all
        if known is not None and known.held.revision == first[0].revision:
            flips = known.held.flips
        elif len(first) < len(changes):
            try:
                return self._apply(first, every, head, now)
            except UnconfirmedError as error:
                flips = error.flips
        held = Held(first[0].revision, flips, self._writer.max_flip_share)
        return self._waits(held, of_all, turned, revision, head)

    def _take_all(self, head: Head | None, now: datetime) -> Committed | Waiting:
        """Reads everything anew, because there is no table yet, or the store's history is not the table's."""
        if head is None and (old := self._writer.attachments()):
            # The table is damaged. It gets a new head, and the next step compares the store with what is left.
            if self._limit is not None and old > self._limit:
                raise BulkError
            return self._writer.recover(store=self._store.identity(), hash_=hash_of_other_history(), now=now)
        revision = self._store.revision()
        while True:
            try:
                return self._replace(head, now)
            except GrownError:
                continue  # read the records again, because there may be too many to keep in memory
            except UnconfirmedError as error:
                assert head is not None  # noqa: S101 # a table without a head has nothing that could flip
                # The number stays the same while more is written behind it, so that a confirmation can name it.
                number = head.held if ahead_of(head, self._store) else revision
                held = Held(number, error.flips, self._writer.max_flip_share, whole=True)
                return self._waits(held, error.flips, error.turned, revision, head)

    def _waits(self, held: Held, flips: Flips, turned: Sequence[int], revision: int, head: Head) -> Waiting:
        return Waiting(
            held,
            Point(revision, hash_at(self._store, revision)),
            Point(head.revision, head.hash),
            self._writer.digest,
            turned,
            flips,
        )

    def _log_other_history(self, head: Head) -> None:
        at = (head.revision, head.hash, head.store)
        # A table that was damaged and got a new head is no sign of another history.
        held_already = held_history(head) is not None and (not head.held or ahead_of(head, self._store) > 0)
        if self._other == at or held_already:
            return
        self._other = at
        self.histories += 1
        if head.store != self._store.identity():
            _log.warning("the store is another one than the policy table was read from: everything is read anew")
            return
        _log.warning(
            "the store has another history than the policy table, which was read at revision %d: a backup was "
            "restored, a copy took its place, or its log was sealed; everything is read anew", head.revision,
        )  # fmt: skip

    def _replace(self, head: Head | None, now: datetime) -> Committed:
        identity, revision = self._store.identity(), self._store.revision()
        self.unreadable.now.clear()
        sure = head is None or self._is_confirmed(head)
        hash_ = hash_at(self._store, revision)
        with closing(self._store.read_all()[1]) as read:
            records = read if self._limit is None else iter(self._within(read))
            # Only now: if there is too much, a follower without a limit takes it in and logs this.
            if head is not None and head.store != _NO_STORE:
                self._log_other_history(head)
            return self._writer.replace(
                self._quickly(records), revision=revision, hash_=hash_, store=identity, now=now, confirmed=sure
            )

    def _within(self, items: Iterable[_T]) -> list[_T]:
        """All of the items. Raises BulkError if there are more than this follower may take in."""
        if self._limit is None:
            return list(items)
        found = list(islice(items, self._limit + 1))
        if len(found) > self._limit:
            raise BulkError
        return found

    def _is_confirmed(self, head: Head) -> bool:
        """Whether a confirmation says that the store's history may replace the table's."""
        body = self._store.get(CONFIRMED)
        upto = min(confirmed(body), self._store.revision())
        # A restored backup may hold old confirmations, and neither numbers nor times distinguish them from a new
        # one. The name of the hold does, because it was made when the table began to hold this.
        hold = held_history(head)
        if not upto or hold is None or not ahead_of(head, self._store):
            return False
        if confirmed_hold(body) != hold:
            if upto > head.held:
                _log.warning(
                    "revision %d confirms nothing here: it does not name what this gateway holds; `%s` writes a "
                    "confirmation that does, with this agent's configuration", upto, command("apply --confirm"),
                )  # fmt: skip
            return False
        # Each later change flips at most one subscription.
        later = sum(1 for _ in self._store.changes(upto))
        return not Flips(later, self._reader.counts()[1]).too_many(self._writer.max_flip_share)

    def _apply(self, changes: list[Change], every: list[Change], head: Head, now: datetime) -> Committed | None:
        """Takes in the first of these changes. `every` has all changes since, also those that wait."""
        # A confirmation does not cover later changes: the next step takes them in.
        upto = max((confirms(change) for change in changes if change.key == CONFIRMED), default=0)
        sure = upto > head.revision
        newest: dict[str, Change] = {}
        revision = 0
        for change in changes:
            if sure and change.revision > upto:
                break
            newest[change.key] = change
            revision = change.revision
        if not newest:
            return None
        for key in self._early_keys(newest, every, revision, head):
            del newest[key]
        put = self._readable((change.key, change.after) for change in newest.values() if change.after is not None)
        # By its key alone: the store's last record there may have been refused, and then the table has the one
        # before.
        removed = list(self._gone(change.key for change in newest.values() if change.after is None))
        hash_ = hash_at(self._store, revision)
        return self._writer.apply(
            list(put), removed, revision=revision, hash_=hash_, now=now, confirmed=sure, since=head
        )

    def _early_keys(self, newest: dict[str, Change], every: list[Change], revision: int, head: Head) -> set[str]:
        """The keys under which the table has the record of a later revision than `revision`, because it was taken
        in ahead. The older record must not replace it."""
        ahead = ahead_of(head, self._store)
        later = [change for change in every if revision < change.revision <= ahead and change.key in newest]
        # A record that cannot be read may be one of them. It stays denied until the later revision is taken in.
        return {
            change.key for change in later if is_in_table(self._reader, change.key, change.after, damaged=True)
        }

    def _gone(self, keys: Iterable[str]) -> Iterator[Record]:
        for key in keys:
            self.unreadable.right(key)
            if (record := key_only(key)) is not None:
                yield record

    def _quickly(self, records: Iterable[tuple[str, str]]) -> Iterator[Loadable]:
        """The records that can be read, in their order; attachments as bytes if possible, which is faster."""
        quick = Packer().quick
        for key, body in records:
            found = quick(key, body)
            if found is not None:
                yield found
            else:
                yield from self._readable([(key, body)], anew=True)

    def _readable(self, records: Iterable[tuple[str, str]], *, anew: bool = False) -> Iterator[Record]:
        """The records that can be read, in their order. `anew` as for `Unreadable.read`."""
        for key, body in records:
            if key == CONFIRMED:
                continue
            if (record := self.unreadable.read(key, body, anew=anew)) is not None:
                yield record
