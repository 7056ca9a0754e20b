"""The work of a gateway, in steps on three threads that do not wait for each other.

- The policy thread (`intake`) writes the policy table from store, interfaces, time and configuration. It may be
  slow, because the store may be locked, and a bulk change takes seconds.
- The kernel thread (`dataplane`) writes the kernel, and no other thread does. It never waits for store or table.
- The counting thread only reads and counts, because reading the elements of full sets takes half a second.

Each public method says on which thread it runs. Each thread has its own view of the table and its own socket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import datetime
from typing import TypeVar

from portward.base.clock import Clock
from portward.base.descriptors import Reserve
from portward.config.keys import Config
from portward.daemon.counting import Counting
from portward.daemon.intake import First, Intake, OnKernel, answers
from portward.dataplane import templates, xtables
from portward.dataplane.accounting import ExpiringKeys
from portward.dataplane.around import SurroundingsMonitor
from portward.dataplane.deletions import Deletions
from portward.dataplane.desired import Surroundings
from portward.dataplane.links import Links
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import FAMILY_TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import Others
from portward.dataplane.plane import Dataplane
from portward.dataplane.reconciler import RulesetReconciler, hearing, loaded
from portward.dataplane.selfcheck import SelfCheck
from portward.dataplane.underway import UnderWay, Work
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.policy.preset import Preset
from portward.table.follower import Held
from portward.table.writer import Writer

_T = TypeVar("_T")


def at_once(work: Callable[[], _T]) -> Future[_T]:
    """Runs work on the calling thread, for a caller that has only one."""
    done: Future[_T] = Future()
    done.set_result(work())
    return done


class Core:
    """The gateway of one network namespace."""

    def __init__(self, config: Config, preset: Preset, on_kernel: OnKernel = at_once) -> None:
        """Opens kernel and table; changes nothing in the kernel. `on_kernel` runs work on the kernel thread.
        Raises KernelError or TableError. Kernel thread."""
        self._netlink = NfNetlink()
        self._nft = Nft(self._netlink.generation, self._netlink.transact)
        self._ask_privilege()
        templates.read()
        # Spare descriptors for a repair, so that it does not fail for lack of one.
        self._reserve = Reserve(4)
        self.native = xtables.has_native_queue(self._nft)
        if not self.native:
            xtables.require(self._netlink)
        self._writer = Writer(config.table, preset, answers(config), max_flip_share=config.max_flip_share)
        head = self._writer.head()
        self.clock = Clock(None if head is None else head.decided())
        self._watching = NfNetlink()
        # The kernel thread reads it when it checks the ruleset. It wakes no thread.
        self._notices = hearing(self.own_ports) if self._nft.compiles else None
        deletions = Deletions()
        self.counting = Counting(config.table, NfNetlink(), self._writer.reader(), deletions, lambda: self.changes)
        self.selfcheck = SelfCheck()
        self._under_way = UnderWay(lambda: self.generation)
        self._dataplane = Dataplane(
            config,
            preset,
            nft=self._nft,
            netlink=self._netlink,
            native=self.native,
            reader=self._writer.reader(),
            selfcheck=self.selfcheck,
            under_way=self._under_way,
            deletions=deletions,
            notices=None if self._notices is None else self._notices.read,
        )
        self._intake = Intake(config, self._writer, self.clock, self._dataplane, self._under_way, on_kernel)
        self._first: First | None = None

    def stop(self) -> None:
        """Ends a running bulk change. The table then has all of it or nothing. Any thread."""
        self._intake.stop()

    def close_store(self) -> None:
        """Closes the store. Policy thread."""
        self._intake.close()

    def close_counts(self) -> None:
        """Saves the counts, including elements deleted since the last reading. Counting thread."""
        self.counting.end()

    def close(self) -> None:
        """Closes table and sockets when no thread uses them any more. Ruleset and cached verdicts stay in the
        kernel."""
        self._writer.close()
        self._netlink.close()
        self.counting.close()
        self._watching.close()
        if self._notices is not None:
            self._notices.close()

    # --- the start, in this order ---

    def first_policy(self) -> None:
        """Makes sure that there is a policy to enforce. A table of an earlier run is used as it is, and `sync`
        later takes changes of the store. Without a table, the store is read first; raises StoreError if that
        fails. Policy thread."""
        self._intake.first_policy()

    def first_links(self, links: Links) -> None:
        """Writes into the table which interfaces are segments, before the ruleset is loaded. Policy thread."""
        self._first = self._intake.first_links(links)

    def prepare(self) -> None:
        """Compiles the ruleset for `load`, while the workers load their libraries. Changes nothing. Kernel
        thread."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        self._dataplane.prepare(self._first[-1])

    def load(self) -> None:
        """Loads the ruleset. From now on the gateway enforces the state of the table after `first_links`, and
        later changes. Raises KernelError. Kernel thread."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        if not loaded(self._netlink):
            self.counting.counts.discard_readings()
        self._dataplane.load(*self._first)

    # --- policy thread, repeatedly after the start ---

    def sync(self) -> bool:
        """Writes changes of the store into the table, and hands them over to the kernel thread. False if there was
        no change, or the store could not be read. Policy thread."""
        return self._intake.sync()

    def links_changed(self, links: Links, number: int = 0) -> bool:
        """Writes interfaces that were added, removed or got another index into the table; `number` is that of the
        newest change. False if the table could not be written; then `retry_links` retries it. Policy thread."""
        return self._intake.links_changed(links, number)

    def retry_links(self) -> None:
        """Retries interfaces that could not be written into the table. Policy thread."""
        self._intake.retry_links()

    def settle(self) -> None:
        """Ends grants whose time is over. Policy thread."""
        self._intake.settle()

    def reload(self, config: Config, preset: Preset) -> None:
        """Puts another configuration in force.

        Raises KernelError, TableError, or UnconfirmedError for a preset that would flip too many subscriptions,
        and then nothing has changed. An error after the table was decided again changes nothing back: it is
        logged, and the rest is retried until it succeeds. Policy thread.
        """
        self._intake.reload(config, preset)

    # --- kernel thread ---

    def links_seen(self, links: Links) -> None:
        """Records the present interfaces, however busy the policy thread is. Loads the ruleset again if other
        tunnels end here or other devices are stacked on segments, because a stacked device lets the segment's
        packets pass until then. Kernel thread."""
        self._dataplane.links_seen(links)

    def unsettle(self, indexes: frozenset[int], number: int) -> None:
        """Drops packets of interfaces with these indexes until `links_changed` with at least this `number` is
        enforced, because the table still has the interfaces that had these indexes before. Kernel thread."""
        self._dataplane.unsettle(indexes, number)

    def surround(self, surroundings: Surroundings) -> None:
        """Loads the ruleset again if its surroundings have changed. Cached verdicts stay. If the kernel refuses
        it, `check` repairs that. Kernel thread."""
        self._dataplane.surround(surroundings)

    def check(self) -> None:
        """Repairs the ruleset if another process has changed it, and reads its surroundings. Kernel thread."""
        with self._reserve.lent():
            self._dataplane.check()

    def correct(self, suspects: list[Source]) -> None:
        """Deletes the cached verdicts of these sources that differ from the table. Kernel thread."""
        self._dataplane.correct(suspects)

    def delete_expiring(self, due: ExpiringKeys) -> None:
        """Deletes cached verdicts that are about to expire, because the kernel reports the last count of an
        element only on a deletion. Kernel thread."""
        self._dataplane.end(due)

    def sync_rate_limits(self) -> None:
        """Brings the rate limits in the kernel in line with the table. Kernel thread."""
        self._dataplane.keep_rates()

    def install_limits(self, sources: Iterable[Source]) -> None:
        """Installs the rate limits of sources for which workers have asked. Kernel thread."""
        self._dataplane.asked(sources)

    # --- event loop ---

    def own_ports(self) -> tuple[int, ...]:
        """The netlink port numbers of the sockets that write for this agent. If libnftables loads by itself (not
        `Nft.compiles`), its writes count as another program's and lead to a check."""
        return (self._netlink.port,)

    def at_rest(self, heard: RulesetChanges | None = None) -> bool:
        """Whether `check` has nothing to do, given the changes `heard` since the last call. It is called on the
        event loop, so that the kernel thread wakes only for a reason; without `heard`, on the kernel thread."""
        with contextlib.suppress(OSError, KernelError):
            due = self.broken or self._dataplane.behind or self._dataplane.unwatched
            return not due and self.reconciler.at_rest(self._watching, heard)
        return False

    @property
    def has_links_to_retry(self) -> bool:
        """Whether `retry_links` has work to do."""
        return self._intake.links_failed

    # --- counting thread ---

    def count(self, pause: float) -> ExpiringKeys | None:
        """Adds what the kernel has counted since the last call; does nothing if no ruleset is loaded. The next
        call is in `pause` seconds; returns the elements that would expire before it, for `end`. Counting
        thread."""
        return self.counting.count(self._dataplane, pause)

    def suspects(self) -> list[Source]:
        """The sources, of a sample of those that `count` read last, whose cached verdict is not the table's now. A
        change of policy under way makes suspects too: `correct` looks again. Counting thread."""
        return self.counting.look()

    def limited(self) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment. Counting thread."""
        return self.counting.limited(self._intake.links.names)

    def screen(self) -> dict[str, int]:
        """The named counters of the ruleset. Counting thread."""
        return self.counting.screen()

    def sizes(self) -> tuple[int, int]:
        """The numbers of attachments and subscriptions in the table. Counting thread."""
        return self.counting.sizes()

    # --- any thread ---

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._dataplane.config

    @property
    def preset(self) -> Preset:
        """The preset in force."""
        return self._dataplane.preset

    @property
    def reconciler(self) -> RulesetReconciler:
        """Owner of the ruleset."""
        return self._dataplane.reconciler

    @property
    def generation(self) -> int:
        """The generation of the policy table."""
        head = self._writer.head()
        return 0 if head is None else head.generation

    @property
    def revision(self) -> int:
        """The revision of the store that the table has."""
        head = self._writer.head()
        return 0 if head is None else head.revision

    @property
    def enforced(self) -> int:
        """The revision that the kernel enforces: the table's, when no older verdict is cached any more."""
        return self._dataplane.enforced

    @property
    def broken(self) -> str:
        """Why the kernel does not have the wanted ruleset; empty if it has."""
        return self._dataplane.broken

    @property
    def guarded(self) -> bool:
        """Whether the loaded ruleset has the forward guard."""
        return self._dataplane.guarded

    @property
    def lookout(self) -> SurroundingsMonitor:
        """The devices that take packets of segments before portward sees them, as last found."""
        return self._dataplane.lookout

    @property
    def others(self) -> Others:
        """Rules of other programs that may translate packets, as last found."""
        return self._dataplane.watch.found

    @property
    def work(self) -> Work | None:
        """The present work of the policy thread; None while it waits."""
        return self._under_way.work

    @property
    def changes(self) -> int:
        """The number of changes of policy written to the table."""
        return self._intake.changes

    @property
    def store_errors(self) -> int:
        """The number of failed readings of the store."""
        return self._intake.store_errors

    @property
    def store_error(self) -> str:
        """Why the last reading of the store failed; empty if it did not."""
        return self._intake.store_error

    @property
    def store_read(self) -> float | None:
        """When the store was last read, by `clock.monotonic`; None if it was not read yet."""
        return self._intake.store_read

    @property
    def store_waits(self) -> str:
        """Why reading the store may wait for a writer; empty if it never does."""
        return self._intake.store_waits

    @property
    def refused(self) -> int:
        """The number of records of the store that could not be read."""
        return self._intake.refused

    @property
    def unreadable(self) -> list[str]:
        """A sentence for each record of the store that cannot be read now."""
        return list(dict(self._intake.unreadable).values())

    @property
    def damaged_rows(self) -> list[str]:
        """A sentence for each of the first rows of the policy table that were found damaged."""
        return list(self._writer.damage.first)

    @property
    def damaged(self) -> int:
        """The number of rows of the policy table that could not be read."""
        return self._writer.damage.rows

    @property
    def histories(self) -> int:
        """How often the store's history was not the one that the table was read from."""
        return self._intake.histories

    @property
    def in_step(self) -> bool:
        """Whether the table had the store's newest revision when the store was last read."""
        return self._intake.in_step

    @property
    def ahead(self) -> int:
        """The revision up to which denials behind a held change are enforced; 0 if none is held."""
        head = self._writer.head()
        return 0 if head is None or not head.held else head.ahead

    @property
    def held(self) -> Held | None:
        """The change of policy that waits for confirmation; None if there is none."""
        return self._intake.held

    def next_expiry(self) -> datetime | None:
        """When `settle` is next due."""
        return self._writer.next_expiry()

    def store_descriptor(self) -> int | None:
        """A descriptor that is readable after a change of the store; None while there is no store."""
        return self._intake.store_descriptor()

    def segments(self) -> dict[int, str]:
        """The interfaces that are segments: index → name."""
        return self._intake.segments()

    # --- private ---

    def _ask_privilege(self) -> None:
        try:
            self._nft.check("", f"add table {FAMILY_TABLE}\n")
        except KernelError as error:
            raise KernelError(
                f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error}"
            ) from None
