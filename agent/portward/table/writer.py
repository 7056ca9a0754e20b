"""The daemon's access to the policy table: each method is one transaction, and returns which verdicts are new.

When a method returns, the table is on disk and every reader sees it. The kernel's cached verdicts do not agree
with it until the caller has moved the epoch and then deleted what `Committed` names.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from secrets import randbits
from typing import Any

from portward.model import Exemption, Record, Subscription, Workload
from portward.policy.decide import Ruling, rule
from portward.policy.preset import Preset
from portward.store.flips import Flips, UnconfirmedError
from portward.table import layout
from portward.table.commits import Answers, Committed, Point
from portward.table.damage import Damage
from portward.table.database import (
    MAP_SIZE,
    DatabaseError,
    MapFullError,
    Rows,
    TableError,
    Transaction,
    drop_other_formats,
    in_words,
    open_for_writing,
)
from portward.table.denials import Group, groups, weigh
from portward.table.edit import Edit
from portward.table.load import Loadable
from portward.table.reader import Reader

# 1 TiB of address space, not of disk: more than any table needs, and far below what x86-64 and arm64 offer.
_LARGEST_MAP_BYTES = 1 << 40

_log = logging.getLogger("portward.table")


class GrownError(TableError):
    """The table was full and is larger now. The caller can try again."""


class _FreerError(Exception):
    """Some groups of an edit make a source freer and must wait behind the held change; `kept` are the others."""

    def __init__(self, kept: list[Group]) -> None:
        super().__init__()
        self.kept = kept


class Writer:
    """The policy table, open for writing. A running gateway has one."""

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        answers: Answers,
        *,
        max_flip_share: float = 1.0,
        map_size: int = MAP_SIZE,
    ) -> None:
        """Opens the table in `folder`, or creates it if there is none or if it is damaged. Raises TableError. A
        change that would flip more than `max_flip_share` (0 to 1) of all subscriptions is held, unless it is
        confirmed."""
        self._folder, self.preset, self.answers = folder, preset, answers
        self.max_flip_share = max_flip_share
        self._environment, self._parts = open_for_writing(folder, map_size)
        # The rows that this writer and its readers could not read.
        self.damage = Damage()
        self._log_other_format()

    def close(self) -> None:
        """Closes the table."""
        self._environment.close()

    def _log_other_format(self) -> None:
        with self._environment.begin() as transaction:
            data = transaction.get(layout.HEAD)
        # A table with entries of this format is damaged, and not of another version.
        if data is not None and (form := layout.format_of(data)) != layout.FORMAT and not self.attachments():
            version = "a newer" if form > layout.FORMAT else "an older"
            _log.warning(
                "%s: the policy table is of format %d, which %s portward wrote; it is not used, and the store is "
                "read anew", self._folder, form, version,
            )  # fmt: skip

    def reader(self) -> Reader:
        """A reader of this table for the same process. It ends with the writer."""
        return Reader(self._environment, self._parts, self.damage)

    def head(self) -> layout.Head | None:
        """The head of the table; None if it holds no policy yet, or one of another format."""
        with self._environment.begin() as transaction:
            return _head_in(transaction)

    @property
    def of_other_format(self) -> bool:
        """True if the file holds the table of another version of portward, which is never read."""
        with self._environment.begin() as transaction:
            data = transaction.get(layout.HEAD)
        return data is not None and layout.Head.unpack(data) is None

    @property
    def digest(self) -> bytes:
        """The digest of the preset in force."""
        return bytes.fromhex(self.preset.digest)

    def next_expiry(self) -> datetime | None:
        """When a decision next changes by itself: a grant ends, or a start comes that was recorded ahead. None:
        never."""
        with self._environment.begin() as transaction:
            first = Rows(transaction, self._parts[b"expiries"]).first()
            return None if first is None else layout.moment(int.from_bytes(first[:8], "big"))

    def attachments(self) -> int:
        """The number of attachments in the table."""
        with self._environment.begin() as transaction:
            return sum(transaction.stat(self._parts[name])["entries"] for name in layout.ENTRIES.values())

    def is_decided_otherwise(self) -> bool:
        """Whether the table was decided under another preset or other answers than those in force, so that
        `decide_due` would decide everything again."""
        head = self.head()
        return head is None or head.preset != self.digest or Answers(head.observe, head.reject) != self.answers

    def recover(self, *, store: bytes, hash_: bytes, now: datetime) -> Committed:
        """Writes a new head into a table whose head cannot be read: `store` is the store's id (16 bytes), `hash_`
        a hash that no log has. All records that can be read stay in force and are decided again. Raises
        TableError."""

        def work(edit: Edit, head: layout.Head | None) -> None:
            # The lost head held the preset and the answers by which the records were decided.
            edit.decide_everything()
            edit.everything = True

        self.damage.found("its head cannot be read; the records that can be read stay in force")
        return self._commit(work, now, fields={"store": store, "hash": hash_}, whole=True)

    def apply(
        self,
        put: Iterable[Record],
        removed: Iterable[Record],
        *,
        revision: int,
        now: datetime,
        hash_: bytes = layout.NO_HASH,
        confirmed: bool = False,
        since: layout.Head | None = None,
    ) -> Committed:
        """Takes a change of policy in. The table then agrees with `revision` of its store, whose log has `hash_`
        there. `since` is the head from which the change was derived. Raises UnconfirmedError, and TableError, also
        if another process has changed the table since that head."""
        put, removed = tuple(put), tuple(removed)
        fields: dict[str, Any] = {"revision": revision, "hash": hash_, "held": 0}

        def work(edit: Edit, head: layout.Head | None) -> None:
            edit.apply(put, removed)
            if head is None or head.ahead <= revision:
                fields.update(ahead=0, ahead_hash=layout.NO_HASH)
                edit.end_early()

        check = None if confirmed else self._check_change
        return self._commit(work, now, fields=fields, check=check, since=since)

    def replace(
        self,
        records: Iterable[Loadable],
        *,
        revision: int,
        store: bytes,
        now: datetime,
        hash_: bytes = layout.NO_HASH,
        confirmed: bool = False,
    ) -> Committed:
        """Replaces all records by those of the store with the id `store` (16 bytes), whose log has `hash_` at
        `revision`. Subscriptions and exemptions must come before all attachments. Readers see the old table until
        the new one is complete. Raises TableError, UnconfirmedError, and GrownError, after which the caller must
        pass `records` again."""
        fields: dict[str, Any] = {"revision": revision, "store": store, "hash": hash_}
        fields |= {"held": 0, "ahead": 0, "ahead_hash": layout.NO_HASH}
        check = None if confirmed else self._check_change
        return self._commit(
            lambda edit, head: edit.replace(records), now, fields=fields, whole=True, check=check, anew=True
        )

    def hold(
        self,
        revision: int,
        ahead: Point,
        *,
        now: datetime,
        hash_: bytes | None = None,
        since: layout.Head | None = None,
    ) -> None:
        """Records that `revision` of the store is held, and that denials behind it are in force up to `ahead`.
        `hash_` replaces the hash of the table's own revision. `since` as for `apply`. Raises TableError."""
        fields: dict[str, Any] = {"held": revision, "ahead": ahead.revision, "ahead_hash": ahead.hash}
        if hash_ is not None:
            fields["hash"] = hash_
        self._commit(lambda edit, head: None, now, fields=fields, since=since)

    def tighten(
        self,
        put: Iterable[Record],
        removed: Iterable[Record],
        *,
        ahead: Point,
        now: datetime,
        confirmed: bool = False,
        since: layout.Head | None = None,
    ) -> Committed:
        """Takes in what a revision behind the held one makes stricter, and nothing that makes a source freer. The
        table's own revision stays. If it would deny too many subscriptions, nothing is taken in unless it is
        `confirmed`, and UnconfirmedError is raised after `ahead` is recorded. `since` as for `apply`. Raises
        TableError."""
        put, removed = tuple(put), tuple(removed)
        held: UnconfirmedError | None = None
        chosen: list[Group] | None = None

        def work(edit: Edit, head: layout.Head | None) -> None:
            nonlocal chosen
            if chosen is None:
                chosen = groups(put, removed, edit.owner_of)
            edit.apply(
                (record for group in chosen for record in group.put),
                (record for group in chosen for record in group.removed),
            )

        def check(edit: Edit) -> None:
            self._check_stricter(edit, chosen or [], confirmed=confirmed)

        while True:
            try:
                fields = {"ahead": ahead.revision, "ahead_hash": ahead.hash}
                committed = self._commit(work, now, fields=fields, check=check, since=since)
            except _FreerError as error:
                chosen = error.kept
            except UnconfirmedError as error:
                chosen, held = [], error
            else:
                if held is None:
                    return committed
                try:
                    raise held
                finally:
                    del held  # else the error keeps this frame, which keeps the error

    def decide_due(self, *, now: datetime, may_flip: bool = True) -> Committed:
        """Decides again what changes by itself: grants that have ended and recorded starts that have come. If the
        preset or the answers are not those that the table was decided under, decides everything again. Raises
        TableError, and UnconfirmedError unless `may_flip`."""

        def work(edit: Edit, head: layout.Head | None) -> None:
            ended = edit.expired(layout.microseconds(now))
            if head is None or head.preset != self.digest:
                edit.decide_everything()
            else:
                edit.decide(ended)
            if head is not None and Answers(head.observe, head.reject) != self.answers:
                edit.everything = True

        return self._commit(work, now, whole=True, check=None if may_flip else self._check_flips)

    def put_links(self, want: dict[int, tuple[str, bool]], *, touched: frozenset[int], now: datetime) -> Committed:
        """Writes which segment is behind which interface: index → (name, only observed). The indexes in `touched`
        belonged to another interface in between, so they count as changed in any case."""
        moved: set[int] = set()

        def work(edit: Edit, head: layout.Head | None) -> None:
            moved.clear()
            moved.update(edit.put_links(want, touched))

        return self._commit(work, now, links=moved)

    def _commit(
        self,
        work: Callable[[Edit, layout.Head | None], None],
        now: datetime,
        *,
        fields: Mapping[str, Any] | None = None,
        links: set[int] | None = None,
        whole: bool = False,
        check: Callable[[Edit], None] | None = None,
        anew: bool = False,
        since: layout.Head | None = None,
    ) -> Committed:
        """Runs `work` with the edit and the head before it in one transaction, and writes the next head with
        `fields`. `whole`: after `work` every entry agrees with this preset, these answers and this time. `check`
        runs after `work`; what it raises leaves the table as it was. `anew`: drops what another version wrote, and
        `work` can run only once. `since` as for `apply`."""

        def ruling(subscription: Subscription | None, exemption: Exemption | None, workload: Workload) -> Ruling:
            return rule(self.preset, subscription, exemption, workload, now=now)

        # Killed workers leave their reader slots behind, and LMDB has a fixed number of them.
        self._environment.reader_check()
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    # Read inside the transaction: another process may have written while this one waited.
                    before = _head_in(transaction)
                    self._require(since, before)
                    if anew:
                        drop_other_formats(self._environment, transaction)
                    edit = Edit(transaction, self._parts, ruling, now, self.damage)
                    work(edit, before)
                    if check is not None:
                        check(edit)
                    new = bool(edit.changed or edit.everything or links)
                    head = self._next_head(before, now, new=new, whole=whole)._replace(**(fields or {}))
                    transaction.put(layout.HEAD, head.pack())
                break
            except MapFullError:
                self._environment.grow(_LARGEST_MAP_BYTES)
                if anew:
                    raise GrownError(f"{self._folder}: the policy table was full, and is larger now") from None
            except DatabaseError as error:
                why = in_words(error, self._folder)
                raise TableError(f"{self._folder}: the policy table cannot be written: {why}") from error
        return Committed(
            head.revision,
            head.generation,
            tuple(edit.changed),
            frozenset(links or ()),
            edit.everything,
            edit.opens,
            edit.closes,
        )

    def _require(self, since: layout.Head | None, before: layout.Head | None) -> None:
        """Raises TableError if another process has taken in or held a revision after `since`. Changes of
        interfaces and grants that end move the generation, but do not change what a revision means, so they do not
        count."""
        if since is not None and (before is None or _standing(since) != _standing(before)):
            raise TableError(f"{self._folder}: another process has changed the policy table meanwhile")

    def _check_flips(self, edit: Edit) -> None:
        """Raises UnconfirmedError if the edit flips too many subscriptions. The transaction then leaves the table
        as it was."""
        with self._environment.begin() as before:
            closed, opened = edit.turned(before)
            self._limit(closed | opened, before)

    def _check_change(self, edit: Edit) -> None:
        """As `_check_flips`, for a change of the store. Subscriptions that were denied ahead of it count too,
        unless the change allows them again. Otherwise early denials could make a held change small enough to
        pass."""
        with self._environment.begin() as before:
            closed, opened = edit.turned(before)
            early = {int.from_bytes(row, "big") for row in Rows(before, self._parts[b"early"])}
            self._limit(closed | (opened ^ early), before)

    def _check_stricter(self, edit: Edit, chosen: list[Group], *, confirmed: bool) -> None:
        """Raises _FreerError with the groups that may stay if any group makes a source freer, and UnconfirmedError
        if too many subscriptions would be denied."""
        with self._environment.begin() as before:
            old = edit.before(before)
            weighed = [weigh(old, edit, group) for group in chosen]
            if any(found.freer for found in weighed):
                raise _FreerError([group for group, found in zip(chosen, weighed, strict=True) if not found.freer])
            losers = {number for found in weighed for number in found.losers}
            if not confirmed:
                self._limit(losers, before)
                edit.deny_early(losers)

    def _limit(self, turned: set[int], before: Transaction) -> None:
        """Raises UnconfirmedError if this many subscriptions (the table's numbers) must not flip at once."""
        flips = Flips(len(turned), before.stat(self._parts[b"accounts"])["entries"])
        if flips.too_many(self.max_flip_share):
            raise UnconfirmedError(flips, self.max_flip_share, array("I", sorted(turned)))

    def _next_head(self, before: layout.Head | None, now: datetime, *, new: bool, whole: bool) -> layout.Head:
        if before is None:
            # A new table begins at a random generation, so that a kernel's cache from an older table is never
            # taken for this table's.
            return layout.Head(0, randbits(31), *self.answers, now.timestamp(), self.digest, bytes(16))
        head = before._replace(generation=(before.generation + new) % 2**32)
        if whole:
            head = head._replace(
                observe=self.answers.observe,
                reject=self.answers.reject,
                decided_at=now.timestamp(),
                preset=self.digest,
            )
        return head


def _head_in(transaction: Transaction) -> layout.Head | None:
    """The head in a transaction; None if there is none, or one of another format."""
    data = transaction.get(layout.HEAD)
    return None if data is None else layout.Head.unpack(data)


def _standing(head: layout.Head) -> tuple[object, ...]:
    """The fields that say which point in the store's history a table agrees with."""
    return head.store, head.revision, head.hash, head.held, head.ahead, head.ahead_hash
