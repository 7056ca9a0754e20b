"""The policy thread's work: it writes the policy table from store, interfaces, time and configuration.

Methods run on the policy thread, one after the other, so two changes of the table never overlap. Slow work happens
here: waiting for another process's lock on the store, a bulk change, a preset that decides everything again. It
delays only later changes. Each commit is handed over to the kernel thread, in order, without waiting for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeVar

from portward.base import clock
from portward.base.clock import Clock
from portward.base.descriptors import Reserve
from portward.config.keys import Config, Refusal
from portward.daemon.bulk import MAX_INLINE_CHANGES, Bulk, Job
from portward.dataplane.desired import SegmentLinks
from portward.dataplane.links import Links, only_ports
from portward.dataplane.pending import PendingChanges
from portward.dataplane.plane import Dataplane
from portward.errors import StoreError
from portward.model import Mode
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.protocol import Store
from portward.table.commits import Answers, Committed, merged
from portward.table.database import TableError
from portward.table.follower import BulkError, Follower, Held
from portward.table.layout import Head
from portward.table.writer import Writer

_log = logging.getLogger("portward")
_T = TypeVar("_T")


class OnKernel(Protocol):
    """Runs work on the kernel thread, in the order of the calls."""

    def __call__(self, work: Callable[[], _T], /) -> Future[_T]:
        """Gives the future result of `work`."""


def at_once(work: Callable[[], _T]) -> Future[_T]:
    """Runs work on the calling thread, for a caller that has only one."""
    done: Future[_T] = Future()
    done.set_result(work())
    return done


def answers(config: Config) -> Answers:
    """The settings of the configuration that apply to every verdict."""
    return Answers(config.mode is Mode.OBSERVE, config.verdicts.refuse_with is Refusal.REJECT)


class First(NamedTuple):
    """The state for the first load of the ruleset: the table's, the segments' interfaces, and all interfaces."""

    committed: Committed
    links: SegmentLinks
    seen: Links


class _HandedOver(NamedTuple):
    """A change on its way to the kernel thread: see `Dataplane.enforce`."""

    committed: Committed
    links: SegmentLinks | None
    settled: int


class _Segments(NamedTuple):
    """The segments of a configuration for these interfaces: index → segment, and segment → indexes."""

    config: Config
    links: Links
    by_index: Mapping[int, str]
    by_segment: SegmentLinks


def _segments(config: Config, links: Links) -> _Segments:
    by_index: dict[int, str] = {}
    found: dict[str, list[int]] = {group.name: [] for group in config.groups}
    for index, name in links.names.items():
        if (segment := config.segment_of(name)) is not None:
            by_index[index] = segment
            found.setdefault(segment, []).append(index)
    by_segment = {segment: tuple(indexes) for segment, indexes in found.items()}
    return _Segments(config, links, by_index, by_segment)


class Intake:
    """Writes changes into the policy table, and hands each over to the kernel thread."""

    def __init__(
        self,
        config: Config,
        writer: Writer,
        clock: Clock,
        dataplane: Dataplane,
        pending_changes: PendingChanges,
        on_kernel: OnKernel,
    ) -> None:
        """Only the policy thread may use `writer`."""
        self._config, self._writer, self._clock, self._dataplane = config, writer, clock, dataplane
        self._pending_changes, self._on_kernel = pending_changes, on_kernel
        self._bulk = Bulk()
        # Descriptors for the store's three files and its change notifier.
        self._reserve = Reserve(6)
        # Commits that the kernel thread has not begun to carry out.
        self._handed_over: deque[_HandedOver] = deque()
        self._store: Store | None = None
        self._follower: Follower | None = None
        # This and the public values below may be read on any thread.
        self.links = Links({}, frozenset())
        self._segments = _segments(config, self.links)
        # Interfaces that changed while the table could not be written, and the number of the newest such event.
        self.links_failed, self._links_due, self._links_number = False, frozenset[int](), 0
        self.changes = self.store_errors = 0
        self.store_error = ""
        # When the store was last read, by `clock.monotonic`.
        self.store_read: float | None = None

    def close(self) -> None:
        """Closes the store."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def stop(self) -> None:
        """Ends a running bulk change. Any thread."""
        self._bulk.stop()

    # --- the start, in this order ---

    def first_policy(self) -> None:
        """Makes sure that there is a policy to enforce. A table of an earlier run is used as it is, and `sync`
        later takes changes of the store. Without a table, the store is read first; raises StoreError if that
        fails."""
        head = self._writer.head()
        if head is None or not any(head.store):
            with self._pending_changes.working("reading the store"):
                self._first_take_in()
        with self._pending_changes.working("deciding what has ended"):
            self._writer.decide_due(now=self._clock.now())

    def _first_take_in(self) -> None:
        try:
            self._take_in()
        except StoreError as error:
            if not self._writer.of_other_format:
                raise
            raise StoreError(
                f"the policy table in {self._config.table} was written by another version of portward, so it has "
                f"to be read from the store again, and that failed: {error}"
            ) from error

    def first_links(self, links: Links) -> First:
        """Writes into the table which interfaces are segments, before the ruleset is loaded."""
        with self._pending_changes.working("writing the interfaces"):
            return First(self._put_links(links), self.by_segment(), links)

    # --- repeatedly after the start ---

    def sync(self) -> bool:
        """Writes changes of the store into the table, and hands them over to the kernel thread. False if there was
        no change, or the store could not be read."""
        with self._pending_changes.working("reading the store"):
            try:
                committed = self._take_in()
            except (StoreError, TableError) as error:
                self.store_errors += 1
                if str(error) != self.store_error and not self._bulk.stopped:
                    _log.error("the last known policy stays in force: %s", error)
                self.store_error = str(error)
                self.close()
                return False
            except Exception as error:
                # The store may be half-read. The table has all of the transaction, or nothing.
                self.store_errors += 1
                self.store_error = f"{type(error).__name__}: {error}"
                self.close()
                raise
            if committed is not None:
                self._hand_over(committed)
            return committed is not None

    def links_changed(self, links: Links, number: int = 0) -> bool:
        """Writes interfaces that were added, removed or got another index into the table; `number` is that of the
        newest change. False if the table could not be written; then `retry_links` retries it."""
        links = links._replace(touched=links.touched | self._links_due)
        with self._pending_changes.working("writing the interfaces"):
            try:
                committed = self._put_links(links)
            except Exception as error:
                # Whatever the error is, `retry_links` retries.
                if not self.links_failed:
                    _log.error("the table lacks new interfaces, so all their packets are dropped: %s", error)
                self.links_failed, self._links_due, self._links_number = True, links.touched, number
                if not isinstance(error, TableError):
                    raise
                return False
            self.links_failed, self._links_due = False, frozenset()
            self._hand_over(committed, self.by_segment(), number)
            return True

    def retry_links(self) -> None:
        """Retries interfaces that could not be written into the table."""
        if self.links_failed:
            self.links_changed(self.links, self._links_number)

    def decide_due(self) -> None:
        """Ends grants whose time is over."""
        with self._pending_changes.working("deciding what has ended"):
            try:
                self._hand_over(self._writer.decide_due(now=self._clock.now()))
            except TableError as error:
                self.store_errors += 1
                _log.error("a grant has ended and still counts, until the table can be written: %s", error)

    def reload(self, config: Config, preset: Preset) -> None:
        """Puts another configuration in force.

        Raises KernelError, TableError, or UnconfirmedError for a preset that would flip too many subscriptions,
        and then nothing has changed. An error after the table was decided again changes nothing back: it is
        logged, and the rest is retried until it succeeds."""
        before = self._config, self._writer.preset
        with self._pending_changes.working("deciding everything for another configuration"):
            try:
                self._take(config, preset)
                self._on_kernel(lambda: self._dataplane.would_take(config, preset)).result()
                # Another preset must not flip more subscriptions than a change of the inventory may.
                same = preset.digest == before[1].digest
                settled = self._decide_again(may_flip=same)
            except Exception:
                self._take(*before)
                raise
            changes: list[tuple[Committed, SegmentLinks | None]] = [(settled, None)]
            try:
                changes.append((self._put_links(self.links), self.by_segment()))
            except Exception as error:  # the table is decided again already, so the rest must follow
                _log.error("the configuration is in force in part, and is tried again: %s", error)
                self.links_failed = True
            self._on_kernel(lambda: self._dataplane.adopt(config, preset, changes)).result()

    # --- any thread ---

    @property
    def refused(self) -> int:
        """Records of the store that could not be read."""
        return 0 if self._follower is None else self._follower.unreadable.total

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The records of the store that cannot be read now, of those that were read since the start: key → what is
        wrong."""
        return {} if self._follower is None else self._follower.unreadable.now

    @property
    def histories(self) -> int:
        """How often the store's history was not the one that the table was read from."""
        return 0 if self._follower is None else self._follower.histories

    @property
    def in_step(self) -> bool:
        """Whether the table stood at the store's newest revision when the store was last read."""
        return self._follower is not None and self._follower.in_step and not self.store_error

    @property
    def held(self) -> Held | None:
        """The change of policy that waits for confirmation; None if none does."""
        return None if self._follower is None else self._follower.held

    @property
    def store_waits(self) -> str:
        """Why reading the store may wait for a process that writes it; empty if it never does."""
        store = self._store
        return "" if store is None else store.waits()

    def store_descriptor(self) -> int | None:
        """A descriptor that can be read when the store has changed; None while there is no store."""
        store = self._store
        return None if store is None else store.fileno()

    def segments(self) -> Mapping[int, str]:
        """The segment behind each tenant-facing interface: index → the segment's name."""
        return self._by_names().by_index

    def by_segment(self) -> SegmentLinks:
        """The interfaces of each segment. A group that has none now is there, too."""
        return self._by_names().by_segment

    def _by_names(self) -> _Segments:
        """Kept until interfaces or configuration change, because metrics and status ask each second."""
        config, links, found = self._config, self.links, self._segments
        if found.config is not config or found.links is not links:
            found = self._segments = _segments(config, links)
        return found

    # --- private ---

    def _take_in(self) -> Committed | None:
        if self._store is None:
            with self._reserve.lent():
                self._store = open_store(self._config.store, agent=True)
            if self._follower is None:
                self._follower = Follower(self._store, self._writer, MAX_INLINE_CHANGES)
            self._follower.reopened(self._store)
        assert self._follower is not None  # noqa: S101 # made with the store
        self._store.drain()
        committed, bulk = None, False
        try:
            committed = self._follower.step(self._clock.now())
        except BulkError:
            bulk = True
        # Only after the handler, because the error's frames keep the records read so far and the store's snapshot.
        if bulk:
            committed = self._take_in_bulk(self._follower)
        self.store_read, self.store_error = clock.monotonic(), ""
        if committed is not None:
            self.changes += 1
        return committed

    def _take_in_bulk(self, follower: Follower) -> Committed | None:
        before = self._writer.head()
        try:
            outcome = self._bulk.run(self._job(store=self._config.store))
        except TableError:
            committed = self._committed_since(before)
            if committed is None:
                raise
            return committed
        follower.take_over(
            outcome.waiting,
            refused=outcome.refused,
            unreadable=outcome.unreadable,
            histories=outcome.histories,
            in_step=outcome.in_step,
        )
        return outcome.committed

    def _decide_again(self, *, may_flip: bool) -> Committed:
        """Decides again what the configuration changes, and grants that have ended. Raises TableError or
        UnconfirmedError, and then nothing has changed."""
        before = self._writer.head()
        try:
            if not self._writer.is_decided_otherwise() or self._writer.attachments() <= MAX_INLINE_CHANGES:
                return self._writer.decide_due(now=self._clock.now(), may_flip=may_flip)
            committed = self._bulk.run(self._job(may_flip=may_flip)).committed
        except TableError:
            committed = self._committed_since(before)
            if committed is None or self._writer.is_decided_otherwise():
                raise
        assert committed is not None  # noqa: S101 # or `run` has raised
        return committed

    def _committed_since(self, before: Head | None) -> Committed | None:
        """The commit after the head `before`; None if there was none. It is read from the table, because a child
        can be killed between its commit and its report."""
        head = self._writer.head()
        if head is None or (before is not None and head.generation == before.generation):
            return None
        _log.warning(
            "a bulk change ended by an error after its commit: it is in force, at revision %d", head.revision
        )
        return Committed(head.revision, head.generation, everything=True)

    def _job(self, *, store: str | None = None, may_flip: bool = True) -> Job:
        writer = self._writer
        share = writer.max_flip_share
        return Job(
            self._config.table,
            writer.preset,
            writer.answers,
            share,
            self._clock.now(),
            store,
            may_flip,
            dict(self.unreadable),
        )

    def _hand_over(self, committed: Committed, links: SegmentLinks | None = None, settled: int = 0) -> None:
        """Makes the kernel thread enforce a change; does not wait for it."""
        self._pending_changes.begin()
        self._handed_over.append(_HandedOver(committed, links, settled))
        self._on_kernel(self._carry_out)

    def _carry_out(self) -> None:
        """Enforces all waiting changes as one, on the kernel thread. Changes may be committed faster than the
        kernel can take each, and neither a revocation nor a repair may wait behind many of them."""
        waiting: list[_HandedOver] = []
        with contextlib.suppress(IndexError):
            while True:
                waiting.append(self._handed_over.popleft())
        if not waiting:  # an earlier call has enforced it together with others
            return
        committed = merged([one.committed for one in waiting])
        links = next((one.links for one in reversed(waiting) if one.links is not None), None)
        try:
            self._dataplane.enforce(committed, links, max(one.settled for one in waiting))
        except Exception:
            # No memory, or a bug. `Dataplane.check` finds that the kernel is behind the table.
            _log.exception("revision %d is not enforced yet: the ruleset is loaded anew", committed.revision)
        finally:
            for _ in waiting:
                self._pending_changes.end()

    def _take(self, config: Config, preset: Preset) -> None:
        self._config = config
        self._writer.preset, self._writer.answers = preset, answers(config)
        self._writer.max_flip_share = config.max_flip_share

    def _put_links(self, links: Links) -> Committed:
        self.links = links
        segments = self.segments()
        want = {index: (name, self._config.observes(name)) for index, name in segments.items()}
        # A worker that gets a packet from the forward guard sees the VRF's index.
        ports = only_ports(links, segments)
        want |= {master: want[port] for master, port in ports.items() if master not in want}
        return self._writer.put_links(want, touched=links.touched, now=self._clock.now())
