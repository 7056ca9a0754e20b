"""The parts of a running gateway, each for one of three threads that do not wait for each other.

- The policy thread (`Core.intake`) writes the policy table from store, interfaces, time and configuration. It may
  be slow, because the store may be locked, and a bulk change takes seconds.
- The kernel thread (`Core.dataplane`) writes the kernel, and no other thread does. It never waits for store or
  table.
- The counting thread (`Core.counting`) only reads and counts, because reading the elements of full sets takes half
  a second.

Call a part on its own thread alone, except what it says may be asked on any thread. Each thread has its own view
of the table and its own socket.
"""

from __future__ import annotations

import contextlib
from datetime import datetime

from portward.base.clock import Clock
from portward.config.keys import Config
from portward.daemon.counting import Counting
from portward.daemon.intake import First, Intake, OnKernel, answers, at_once
from portward.dataplane import templates, xtables
from portward.dataplane.accounting import ExpiringKeys
from portward.dataplane.deletions import Deletions
from portward.dataplane.links import Links
from portward.dataplane.monitor import RulesetChanges, RulesetMonitor
from portward.dataplane.names import KernelTable
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.pending import PendingChanges, Work
from portward.dataplane.plane import Dataplane
from portward.dataplane.reconciler import hearing, loaded
from portward.dataplane.selfcheck import SelfCheck
from portward.errors import KernelError
from portward.policy.preset import Preset
from portward.table.writer import Writer


class Core:
    """The gateway of one network namespace: its parts, and the steps that need more than one of them."""

    def __init__(self, config: Config, preset: Preset, on_kernel: OnKernel = at_once) -> None:
        """Opens kernel and table; changes nothing in the kernel. `on_kernel` runs work on the kernel thread.
        Raises KernelError or TableError. Kernel thread."""
        self._netlink = NfNetlink()
        self._nft = Nft(self._netlink)
        self._ask_privilege()
        templates.read()
        self.native = xtables.has_native_queue(self._nft)
        if not self.native:
            xtables.require(self._netlink)
        bridged = xtables.has_native_queue(self._nft, KernelTable.BRIDGE)
        tables = tuple(KernelTable) if bridged else (KernelTable.INET,)
        self._writer = Writer(config.table, preset, answers(config), max_flip_share=config.max_flip_share)
        head = self._writer.head()
        self.clock = Clock(None if head is None else head.decided())
        self._watching = NfNetlink()
        # The kernel thread reads them when it checks the ruleset. They wake no thread.
        self._notices = self._hear(tables) if self._nft.compiles else {}
        deletions = Deletions()
        self.counting = Counting(
            config.table, NfNetlink(), self._writer.reader(), deletions, lambda: self.intake.changes, tables
        )
        self.selfcheck = SelfCheck()
        self._pending_changes = PendingChanges(lambda: self.generation)
        self.dataplane = Dataplane(
            config,
            preset,
            nft=self._nft,
            netlink=self._netlink,
            native=self.native,
            bridged=bridged,
            reader=self._writer.reader(),
            selfcheck=self.selfcheck,
            pending_changes=self._pending_changes,
            deletions=deletions,
            notices={one: notices.read for one, notices in self._notices.items()},
        )
        self.intake = Intake(config, self._writer, self.clock, self.dataplane, self._pending_changes, on_kernel)
        self._first: First | None = None

    def close(self) -> None:
        """Closes table and sockets when no thread uses them any more. Ruleset and cached verdicts stay in the
        kernel."""
        self._writer.close()
        self._netlink.close()
        self.counting.close()
        self._watching.close()
        for notices in self._notices.values():
            notices.close()

    # --- the start, in this order ---

    def first_links(self, links: Links) -> None:
        """Writes into the table which interfaces are segments, before the ruleset is loaded. Policy thread."""
        self._first = self.intake.first_links(links)

    def prepare(self) -> None:
        """Compiles the ruleset for `load`, while the workers load their libraries. Changes nothing. Kernel
        thread."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        self.dataplane.prepare(self._first[-1])

    def load(self) -> None:
        """Loads the ruleset. From now on the gateway enforces the state of the table after `first_links`, and
        later changes. Raises KernelError. Kernel thread."""
        assert self._first is not None  # noqa: S101 # by `first_links`
        for one in self.dataplane.tables:
            if not loaded(self._netlink.of(one.table)):
                self.counting.counts.discard_readings(one.table)
        self.dataplane.load(*self._first)

    # --- event loop ---

    def own_ports(self) -> tuple[int, ...]:
        """The netlink port numbers of the sockets that write for this agent. If libnftables loads by itself (not
        `Nft.compiles`), its writes count as another program's and lead to a check."""
        return (self._netlink.port,)

    def at_rest(self, heard: RulesetChanges | None = None) -> bool:
        """Whether `Dataplane.check` has nothing to do, given the changes `heard` since the last call. It is called
        on the event loop, so that the kernel thread wakes only for a reason; without `heard`, on the kernel
        thread."""
        with contextlib.suppress(OSError, KernelError):
            return self.dataplane.at_rest(self._watching, heard)
        return False

    # --- counting thread ---

    def count(self, pause: float) -> ExpiringKeys | None:
        """Adds what the kernel has counted since the last call; does nothing if no ruleset is loaded. The next
        call is in `pause` seconds; returns the elements that would expire before it, for
        `Dataplane.delete_expiring`. Counting thread."""
        return self.counting.count(self.dataplane, pause)

    def limited(self) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment. Counting thread."""
        return self.counting.limited({**self.intake.links.names, **self.intake.segments()})

    # --- any thread ---

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
    def work(self) -> Work | None:
        """The present work of the policy thread; None while it waits."""
        return self._pending_changes.work

    @property
    def unreadable(self) -> list[str]:
        """A sentence for each record of the store that cannot be read now."""
        return list(dict(self.intake.unreadable).values())

    @property
    def damaged_rows(self) -> list[str]:
        """A sentence for each of the first rows of the policy table that were found damaged."""
        return list(self._writer.damage.first)

    @property
    def damaged(self) -> int:
        """The number of rows of the policy table that could not be read."""
        return self._writer.damage.rows

    @property
    def ahead(self) -> int:
        """The revision up to which denials behind a held change are enforced; 0 if none is held."""
        head = self._writer.head()
        return 0 if head is None or not head.held else head.ahead

    def next_expiry(self) -> datetime | None:
        """When `Intake.decide_due` is next due."""
        return self._writer.next_expiry()

    # --- private ---

    def _hear(self, tables: tuple[KernelTable, ...]) -> dict[KernelTable, RulesetMonitor]:
        """The notices about each of the tables that are loaded. Those about a table that is not go with the first
        one, whose load lifts what stands in for it."""
        others = tuple(table for table in KernelTable if table not in tables)
        return {
            table: hearing(self.own_ports, (table, *(others if table is tables[0] else ()))) for table in tables
        }

    def _ask_privilege(self) -> None:
        try:
            self._nft.check("", f"add table {KernelTable.INET}\n")
        except KernelError as error:
            raise KernelError(
                f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error}"
            ) from None
