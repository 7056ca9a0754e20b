"""A gateway's work, step by step, on three threads that do not wait for each other.

- The policy thread (`intake`) takes what store, interfaces, time and configuration say into the policy table. It
  may be slow: the store may be locked, and a bulk change takes seconds.
- The kernel thread (`dataplane`) writes the kernel, and nothing else does. It never waits for store or table.
- The counting thread only reads and counts: to read the elements of full sets takes half a second.

Each public method says on which thread it runs. Each thread has a view of the table and a socket of its own.
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
from portward.dataplane.links import Links
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import FAMILY_TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import Others
from portward.dataplane.plane import Dataplane
from portward.dataplane.reconciler import RulesetReconciler, hearing, loaded
from portward.dataplane.selfcheck import SelfCheck
from portward.dataplane.surroundings import Surroundings
from portward.dataplane.underway import UnderWay, Work
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.policy.preset import Preset
from portward.table.follower import Held
from portward.table.writer import Writer

_T = TypeVar("_T")


def at_once(work: Callable[[], _T]) -> Future[_T]:
    """Runs work on the calling thread: for a caller that does everything on one."""
    done: Future[_T] = Future()
    done.set_result(work())
    return done


class Core:
    """The gateway of one network namespace."""

    def __init__(self, config: Config, preset: Preset, on_kernel: OnKernel = at_once) -> None:
        """Opens kernel and table; changes nothing in the kernel. `on_kernel` runs work on the kernel thread.
        Runs on that thread itself. Raises KernelError or TableError."""
        self._netlink = NfNetlink()
        self._nft = Nft(self._netlink.generation, self._netlink.transact)
        self._ask_privilege()
        templates.read()
        # For what a repair opens that nobody has thought of.
        self._reserve = Reserve(4)
        self.native = xtables.has_native_queue(self._nft)
        if not self.native:
            xtables.require(self._netlink)
        self._writer = Writer(config.table, preset, answers(config), max_flip_share=config.max_flip_share)
        head = self._writer.head()
        self.clock = Clock(None if head is None else head.decided())
        self._watching = NfNetlink()
        # For the kernel thread, which reads it when it looks: nothing wakes for it.
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
        """Ends a bulk change that is being made; its table stays as it was. Any thread."""
        self._intake.stop()

    def close_store(self) -> None:
        """Closes the store. Policy thread."""
        self._intake.close()

    def close_counts(self) -> None:
        """Saves what is counted, with what was deleted since the last reading. Counting thread."""
        self.counting.end()

    def close(self) -> None:
        """Closes table and sockets, once no thread uses them; ruleset and cached verdicts stay in the kernel."""
        self._writer.close()
        self._netlink.close()
        self.counting.close()
        self._watching.close()
        if self._notices is not None:
            self._notices.close()

    # --- the start, in this order ---

    def first_policy(self) -> None:
        """Sees to it that there is a policy to enforce. A table of an earlier run serves as it is, and `sync`
        takes in what the store has changed since. Without one the store is read first; raises StoreError if that
        fails too. Policy thread."""
        self._intake.first_policy()

    def first_links(self, links: Links) -> None:
        """Says which interfaces are segments, before the ruleset is there. Policy thread."""
        self._first = self._intake.first_links(links)

    def prepare(self) -> None:
        """Compiles the ruleset that `load` is going to load, while the workers load their libraries; changes
        nothing. Kernel thread."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        self._dataplane.prepare(self._first[-1])

    def load(self) -> None:
        """Loads the ruleset; from here on the gateway enforces what `first_links` left and what was committed
        since. Kernel thread. Raises KernelError."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        if not loaded(self._netlink):
            self.counting.counts.discard_readings()
        self._dataplane.load(*self._first)

    # --- and then, again and again: policy thread ---

    def sync(self) -> bool:
        """Takes in what is new in the store and hands it to the kernel thread; False if nothing was, or it could
        not be read. Policy thread."""
        return self._intake.sync()

    def links_changed(self, links: Links, number: int = 0) -> bool:
        """Follows interfaces that came, went or changed their index, up to event `number`. False if the table
        could not be written; then `retry_links` tries it again. Policy thread."""
        return self._intake.links_changed(links, number)

    def retry_links(self) -> None:
        """Writes interfaces again that the table did not take. Policy thread."""
        self._intake.retry_links()

    def settle(self) -> None:
        """Enforces what changes by itself: grants that end. Policy thread."""
        self._intake.settle()

    def reload(self, config: Config, preset: Preset) -> None:
        """Takes another configuration and enforces it; raises KernelError, TableError, or UnconfirmedError for a
        preset that would flip too many subscriptions, and then nothing has changed. What fails once the table was
        decided anew does not take it back: it is logged, and tried again until it works. Policy thread."""
        self._intake.reload(config, preset)

    # --- kernel thread ---

    def links_seen(self, links: Links) -> None:
        """Takes note of interfaces as they are now, however busy the policy thread is, and loads the ruleset again
        if other tunnels end here or other devices stand on top of segments: what stands there lets the segment's
        packets pass until then. Kernel thread."""
        self._dataplane.links_seen(links)

    def unsettle(self, indexes: frozenset[int], number: int) -> None:
        """Drops what interfaces with these indexes send until `links_changed` up to event `number` is carried out:
        the table still takes them for the interfaces that had the indexes before. Kernel thread."""
        self._dataplane.unsettle(indexes, number)

    def surround(self, surroundings: Surroundings) -> None:
        """Loads the ruleset again if what stands around it has changed. Cached verdicts stay. What the kernel
        refuses is repaired by `check`. Kernel thread."""
        self._dataplane.surround(surroundings)

    def check(self) -> None:
        """Puts the ruleset back if another process has changed it, and looks what stands around it. Kernel
        thread."""
        with self._reserve.lent():
            self._dataplane.check()

    def correct(self, suspects: list[Source]) -> None:
        """Makes the kernel forget those of these sources whose cached verdict is not the table's. Kernel
        thread."""
        self._dataplane.correct(suspects)

    def end(self, due: ExpiringKeys) -> None:
        """Deletes cached verdicts that are about to expire, so that all that they have counted is known. Kernel
        thread."""
        self._dataplane.end(due)

    def keep_rates(self) -> None:
        """Brings the rate limits in the kernel in line with the table. Kernel thread."""
        self._dataplane.keep_rates()

    def asked(self, sources: Iterable[Source]) -> None:
        """Lets sources send within their rate limit that a worker has met. Kernel thread."""
        self._dataplane.asked(sources)

    # --- the thread that waits ---

    def own_ports(self) -> tuple[int, ...]:
        """The addresses of the sockets whose transactions are ours. What libnftables loads by itself, without
        `Nft.compiles`, counts as another program's, and leads to a look."""
        return (self._netlink.port,)

    def at_rest(self, heard: RulesetChanges | None = None) -> bool:
        """Whether `check` has nothing to do, by what was `heard` since the last time. It is asked on the thread
        that waits, so that the kernel thread is woken for a reason only. Without `heard` it is
        asked on the kernel thread."""
        with contextlib.suppress(OSError, KernelError):
            due = self.broken or self._dataplane.behind or self._dataplane.unwatched
            return not due and self.reconciler.at_rest(self._watching, heard)
        return False

    @property
    def links_due(self) -> bool:
        """Whether `retry_links` has something to do."""
        return self._intake.links_failed

    # --- counting thread ---

    def count(self, pause: float) -> ExpiringKeys | None:
        """Adds up what the kernel has counted since the last time; nothing if the ruleset is not there. The next
        reading begins in `pause` seconds; gives what would expire until then, for `end`. Counting thread."""
        return self.counting.count(self._dataplane, pause)

    def suspects(self) -> list[Source]:
        """The sources, of a sample of those that `count` read last, whose cached verdict is not the table's now. A
        change of policy under way makes suspects too: `correct` looks again. Counting thread."""
        return self.counting.look(self._dataplane)

    def limited(self) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment. Counting thread."""
        return self.counting.limited(self._intake.links.names)

    def screen(self) -> dict[str, int]:
        """The named counters of the ruleset. Counting thread."""
        return self.counting.screen()

    def sizes(self) -> tuple[int, int]:
        """Attachments and subscriptions in the table. Counting thread."""
        return self.counting.sizes()

    # --- what may be asked on any thread ---

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
        """The revision of the store that the table stands at."""
        head = self._writer.head()
        return 0 if head is None else head.revision

    @property
    def enforced(self) -> int:
        """The revision that the kernel acts on: the table's, once everything older is forgotten."""
        return self._dataplane.enforced

    @property
    def broken(self) -> str:
        """Why the kernel does not have the ruleset that it should have; empty if it has."""
        return self._dataplane.broken

    @property
    def guarded(self) -> bool:
        """Whether the forward guard belongs to the ruleset in the kernel."""
        return self._dataplane.guarded

    @property
    def lookout(self) -> SurroundingsMonitor:
        """The devices that take the packets of segments, as they were last found."""
        return self._dataplane.lookout

    @property
    def others(self) -> Others:
        """What others have in the kernel that can turn a packet into another one, as it was last found."""
        return self._dataplane.watch.found

    @property
    def work(self) -> Work | None:
        """What the policy thread does now; None while it waits."""
        return self._under_way.work

    @property
    def changes(self) -> int:
        """Changes of policy taken into the table."""
        return self._intake.changes

    @property
    def store_errors(self) -> int:
        """Failed readings of the store."""
        return self._intake.store_errors

    @property
    def store_error(self) -> str:
        """Why the store could not be read the last time; empty if it could."""
        return self._intake.store_error

    @property
    def store_read(self) -> float | None:
        """When the store was last read, by `clock.monotonic`; None: not yet."""
        return self._intake.store_read

    @property
    def store_waits(self) -> str:
        """Why reading the store may wait for who writes it; empty if it never does."""
        return self._intake.store_waits

    @property
    def refused(self) -> int:
        """Records of the store that could not be read."""
        return self._intake.refused

    @property
    def unreadable(self) -> list[str]:
        """What is wrong with records of the store that cannot be read now, a sentence for each."""
        return list(dict(self._intake.unreadable).values())

    @property
    def damaged_rows(self) -> list[str]:
        """The first rows of the policy table that were found damaged, a sentence for each."""
        return list(self._writer.damage.first)

    @property
    def damaged(self) -> int:
        """Rows of the policy table that could not be read."""
        return self._writer.damage.rows

    @property
    def histories(self) -> int:
        """How often the store's history was not the one that the table was read from."""
        return self._intake.histories

    @property
    def in_step(self) -> bool:
        """True if the table stood at the store's newest revision when the store was last read."""
        return self._intake.in_step

    @property
    def ahead(self) -> int:
        """The revision up to which denials behind a held change are enforced; 0 if none is held."""
        head = self._writer.head()
        return 0 if head is None or not head.held else head.ahead

    @property
    def held(self) -> Held | None:
        """The change of policy that waits for confirmation; None if none does."""
        return self._intake.held

    def next_expiry(self) -> datetime | None:
        """When `settle` is next due."""
        return self._writer.next_expiry()

    def bell(self) -> int | None:
        """A descriptor that can be read when the store has changed; None while there is no store."""
        return self._intake.bell()

    def segments(self) -> dict[int, str]:
        """The interfaces that are segments: index → name."""
        return self._intake.segments()

    # --- what they are made of ---

    def _ask_privilege(self) -> None:
        try:
            self._nft.check("", f"add table {FAMILY_TABLE}\n")
        except KernelError as error:
            raise KernelError(
                f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error}"
            ) from None
