"""The daemon's side of the policy table: each verb is one transaction, and says which verdicts are new.

After a verb returns, the table is on disk and every reader sees it. What the kernel remembers does not agree
with it until the caller has moved the epoch and forgotten what `Committed` names, in that order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from secrets import randbits
from typing import NamedTuple

from portward.model import Exemption, Record, Subscription, Workload
from portward.policy.decide import Ruling, rule
from portward.policy.preset import Preset
from portward.store.flips import Flips, HeldError
from portward.table import layout
from portward.table.damage import Damage
from portward.table.database import (
    MAP_SIZE,
    DatabaseError,
    MapFullError,
    MapResizedError,
    TableError,
    Transaction,
    drop_other_formats,
    open_for_writing,
)
from portward.table.edit import Edit, Place
from portward.table.load import Loadable
from portward.table.reader import Reader
from portward.table.rows import Rows

_LARGEST_MAP = 1 << 40

_log = logging.getLogger("portward.table")


class Committed(NamedTuple):
    """What a transaction has changed: prefixes, interface indexes, or everything.

    `generation` is that of the table now; it is a new one where any verdict is. If `opens` is False, every prefix
    in `changed` is stopped now, so verdicts cached there that stop packets are not wrong.
    """

    revision: int
    generation: int
    changed: tuple[Place, ...] = ()
    links: frozenset[int] = frozenset()
    everything: bool = False
    opens: bool = True

    @property
    def new(self) -> bool:
        """True where any remembered verdict may be out of date."""
        return bool(self.changed or self.links or self.everything)


class GrownError(TableError):
    """The table was full and is larger now: what was to be written can be given again."""


class Answers(NamedTuple):
    """What holds for every verdict of this gateway: only observed; refused by a reset instead of silence."""

    observe: bool
    reject: bool


class Writer:
    """The policy table, open for writing; there is one in a running gateway."""

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        answers: Answers,
        *,
        max_flip_share: float = 1.0,
        map_size: int = MAP_SIZE,
    ) -> None:
        """Opens or makes the table in `folder`, anew where it is damaged; raises TableError. A change that would
        flip more than `max_flip_share` (0 to 1) of all subscriptions is held, unless it is confirmed."""
        self._folder, self.preset, self.answers, self._map_size = folder, preset, answers, map_size
        self.max_flip_share = max_flip_share
        self._environment, self._parts = open_for_writing(folder, map_size)
        # Rows that cannot be read, found by this writer and its readers.
        self.damage = Damage()
        self._tell_other_format()

    def close(self) -> None:
        """Closes the table."""
        self._environment.close()

    def _tell_other_format(self) -> None:
        with self._environment.begin() as transaction:
            data = transaction.get(layout.HEAD)
        if data is not None and (form := layout.format_of(data)) != layout.FORMAT:
            version = "a newer" if form > layout.FORMAT else "an older"
            _log.warning(
                "%s: the policy table is of format %d, which %s portward wrote; it is not used, and the store is "
                "read anew", self._folder, form, version,
            )  # fmt: skip

    def reader(self) -> Reader:
        """A view of this table for the same process; it ends with the writer."""
        return Reader(self._environment, self._parts, self.damage)

    def head(self) -> layout.Head | None:
        """What the table agrees with; None where it holds no policy yet, or one of another format."""
        with self._reading() as transaction:
            data = transaction.get(layout.HEAD)
            return None if data is None else layout.Head.unpack(data)

    def _reading(self) -> Transaction:
        try:
            return self._environment.begin()
        except MapResizedError:
            # The process of a bulk change has made the map larger: take its size over.
            self._environment.set_mapsize(0)
            return self._environment.begin()

    def next_expiry(self) -> datetime | None:
        """When something next changes by itself: a grant ends, or a start comes that was recorded ahead."""
        with self._reading() as transaction:
            first = Rows(transaction, self._parts[b"expiries"]).first()
            return None if first is None else layout.moment(int.from_bytes(first[:8], "big"))

    def attachments(self) -> int:
        """How many attachments the table holds."""
        with self._reading() as transaction:
            return sum(transaction.stat(self._parts[name])["entries"] for name in layout.ENTRIES.values())

    def is_decided_otherwise(self) -> bool:
        """Whether the table was decided under another preset or other answers than those that hold now, so that
        `settle` decides everything again."""
        head = self.head()
        return head is None or head.preset != self._digest() or Answers(head.observe, head.reject) != self.answers

    def apply(
        self,
        put: Iterable[Record],
        removed: Iterable[Record],
        *,
        revision: int,
        now: datetime,
        confirmed: bool = False,
    ) -> Committed:
        """Takes a change of policy in; the table then stands at `revision`. Raises TableError, and HeldError."""
        put, removed = tuple(put), tuple(removed)
        return self._commit(lambda edit: edit.apply(put, removed), now, revision=revision, may_flip=confirmed)

    def replace(
        self, records: Iterable[Loadable], *, revision: int, store: bytes, now: datetime, confirmed: bool = False
    ) -> Committed:
        """Makes the table hold these records and nothing else, those of the store with the id `store`
        (16 bytes), subscriptions and exemptions before all attachments. Readers see the old table until the new
        one is whole. Raises TableError, HeldError, and GrownError: `records` may be too many to be kept."""

        def work(edit: Edit) -> None:
            edit.replace(records)

        return self._commit(work, now, revision=revision, store=store, whole=True, may_flip=confirmed, anew=True)

    def settle(self, *, now: datetime, may_flip: bool = True) -> Committed:
        """Decides again what has changed by itself: grants that have ended, and, where preset or answers are
        not those that the table was decided under, everything. Raises TableError, and HeldError where `may_flip`
        is not given."""
        head = self.head()

        def work(edit: Edit) -> None:
            ended = edit.expired(layout.microseconds(now))
            if head is None or head.preset != self._digest():
                edit.settle_everything()
            else:
                edit.settle(ended)
            if head is not None and Answers(head.observe, head.reject) != self.answers:
                edit.everything = True

        return self._commit(work, now, whole=True, may_flip=may_flip)

    def put_links(self, want: dict[int, tuple[str, bool]], *, touched: frozenset[int], now: datetime) -> Committed:
        """Says which segment is behind which interface index: index → (name, only observed). The indexes in
        `touched` meanwhile belonged to another interface, and count as changed in any case."""
        moved: set[int] = set()

        def work(edit: Edit) -> None:
            moved.clear()
            moved.update(edit.put_links(want, touched))

        return self._commit(work, now, links=moved)

    def _digest(self) -> bytes:
        return bytes.fromhex(self.preset.digest)

    def _commit(
        self,
        work: Callable[[Edit], None],
        now: datetime,
        *,
        revision: int | None = None,
        store: bytes | None = None,
        links: set[int] | None = None,
        whole: bool = False,
        may_flip: bool = True,
        anew: bool = False,
    ) -> Committed:
        """`whole`: afterwards every entry agrees with this preset, these answers and this time. `may_flip`: any
        number of subscriptions may. `anew`: nothing that another version wrote stays in the file, and `work` can
        be done only once."""

        def ruling(subscription: Subscription | None, exemption: Exemption | None, workload: Workload) -> Ruling:
            return rule(self.preset, subscription, exemption, workload, now=now)

        # Workers that were killed leave their places behind, and there are only so many.
        self._environment.reader_check()
        while True:
            before = self.head()
            try:
                with self._environment.begin(write=True) as transaction:
                    if anew:
                        drop_other_formats(self._environment, transaction)
                    edit = Edit(transaction, self._parts, ruling, now, self.damage)
                    work(edit)
                    if not may_flip:
                        self._check_flips(edit)
                    new = bool(edit.changed or edit.everything or links)
                    head = self._next_head(before, now, new=new, whole=whole)
                    if revision is not None:
                        head = head._replace(revision=revision)
                    if store is not None:
                        head = head._replace(store=store)
                    transaction.put(layout.HEAD, head.pack())
                break
            except MapFullError:
                self._grow()
                if anew:
                    raise GrownError(f"{self._folder}: the policy table was full, and is larger now") from None
            except DatabaseError as error:
                raise TableError(f"{self._folder}: the policy table cannot be written: {error}") from error
        return Committed(
            head.revision,
            head.generation,
            tuple(edit.changed),
            frozenset(links or ()),
            edit.everything,
            edit.opens,
        )

    def _check_flips(self, edit: Edit) -> None:
        """Raises HeldError, and with it the transaction ends and leaves the table as it is."""
        with self._environment.begin() as before:
            subscriptions = before.stat(self._parts[b"accounts"])["entries"]
            flips = Flips(edit.flipped(before), subscriptions)
        if flips.too_many(self.max_flip_share):
            raise HeldError(flips, self.max_flip_share)

    def _next_head(self, before: layout.Head | None, now: datetime, *, new: bool, whole: bool) -> layout.Head:
        if before is None:
            # A table begins at a random generation: what a kernel remembers of an older table is never taken
            # for what it remembers of this one.
            return layout.Head(0, randbits(31), *self.answers, now.timestamp(), self._digest(), bytes(16))
        head = before._replace(generation=(before.generation + new) % 2**32)
        if whole:
            head = head._replace(
                observe=self.answers.observe,
                reject=self.answers.reject,
                decided_at=now.timestamp(),
                preset=self._digest(),
            )
        return head

    def _grow(self) -> None:
        self._map_size *= 2
        if self._map_size > _LARGEST_MAP:
            raise TableError(f"{self._folder}: the policy table is full at {self._map_size // 2} bytes")
        self._environment.set_mapsize(self._map_size)
