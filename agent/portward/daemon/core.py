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
import logging
from collections.abc import Callable
from datetime import datetime

from portward.base.clock import Clock
from portward.base.ownership import users
from portward.config.keys import Config, Owned
from portward.daemon.counting import Counting
from portward.daemon.intake import First, Intake, OnKernel, answers, at_once
from portward.dataplane import templates, xtables
from portward.dataplane.accounting import ExpiringKeys
from portward.dataplane.deletions import Deletions
from portward.dataplane.links import Links
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.pending import PendingChanges, Work
from portward.dataplane.plane import Dataplane
from portward.dataplane.reconciler import hearing, loaded
from portward.dataplane.selfcheck import SelfCheck
from portward.dataplane.tableowner import Ownership, TableOwner, obstacle
from portward.errors import KernelError
from portward.policy.preset import Preset
from portward.table.writer import Writer


_log = logging.getLogger("portward")


class Core:
    """The gateway of one network namespace: its parts, and the steps that need more than one of them."""

    def __init__(self, config: Config, preset: Preset, on_kernel: OnKernel = at_once) -> None:
        """Opens kernel and table; changes nothing in the kernel. `on_kernel` runs work on the kernel thread.
        Raises KernelError or TableError. Kernel thread."""
        self.table_owner = TableOwner(users(config.table))
        self._nft = Nft(self._netlink)
        self._ask_privilege()
        # Why the table can have no owner on this host; empty if it can.
        self._obstacle = obstacle(self._nft, self._netlink)
        if self._obstacle and self.table_owner.has_custodian:
            # libnftables may have to write the table, over sockets of its own.
            self.table_owner.let_go()
            self._nft = Nft(self._netlink)
        self._nft.ownable = not self._obstacle
        templates.read()
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
        self.counting = Counting(
            config.table, NfNetlink(), self._writer.reader(), deletions, lambda: self.intake.changes
        )
        self.selfcheck = SelfCheck()
        self._pending_changes = PendingChanges(lambda: self.generation)
        self.dataplane = Dataplane(
            config,
            preset,
            nft=self._nft,
            netlink=self._netlink,
            native=self.native,
            reader=self._writer.reader(),
            selfcheck=self.selfcheck,
            pending_changes=self._pending_changes,
            deletions=deletions,
            notices=None if self._notices is None else self._notices.read,
        )
        self.intake = Intake(config, self._writer, self.clock, self.dataplane, self._pending_changes, on_kernel)
        self._first: First | None = None

    def close(self) -> None:
        """Closes table and sockets when no thread uses them any more. Ruleset and cached verdicts stay in the
        kernel."""
        self._writer.close()
        self.table_owner.close()
        self.counting.close()
        self._watching.close()
        if self._notices is not None:
            self._notices.close()

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
        if not loaded(self._netlink):
            self.counting.counts.discard_readings()
        self.expect_owner(self.dataplane.config)
        self.dataplane.load(*self._first)
        self.settle_owner()

    # --- kernel thread ---

    def expect_owner(self, config: Config) -> None:
        """Before a load with `config`: starts a custodian if the table will have an owner, so that there is no
        moment in which only this process is the owner. If that fails, `keep_table` tries it again."""
        if self._nft.ownable and config.ruleset.owned is Owned.AUTO:
            self._or_later(self.table_owner.begin)

    def settle_owner(self) -> None:
        """After a load: as `keep_table`, which is tried again if it fails."""
        self._or_later(self.keep_table)

    def keep_table(self) -> None:
        """Sees to it that the table has a custodian if it has an owner, and none otherwise. Raises KernelError or
        OSError."""
        self.table_owner.settle(owned=self._nft.owns)

    @staticmethod
    def _or_later(work: Callable[[], None]) -> None:
        """Does what `custodian_watch` does again if it fails. To enforce comes first."""
        try:
            work()
        except (KernelError, OSError) as error:
            _log.error("the owner of the table: %s", error)

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
            due = self.dataplane.broken or self.dataplane.behind or self.dataplane.unwatched
            return not due and self.dataplane.reconciler.at_rest(self._watching, heard)
        return False

    # --- counting thread ---

    def count(self, pause: float) -> ExpiringKeys | None:
        """Adds what the kernel has counted since the last call; does nothing if no ruleset is loaded. The next
        call is in `pause` seconds; returns the elements that would expire before it, for
        `Dataplane.delete_expiring`. Counting thread."""
        return self.counting.count(self.dataplane, pause)

    def limited(self) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment. Counting thread."""
        return self.counting.limited(self.intake.links.names)

    # --- any thread ---

    @property
    def ownership(self) -> Ownership:
        """Whether only this agent can change portward's table, and why not."""
        owned = self._nft.owns
        wanted = self.dataplane.config.ruleset.owned is Owned.AUTO
        why = self._obstacle or ("the ruleset is not loaded yet" if wanted else '[ruleset] owned = "never"')
        return Ownership(owned, self.table_owner.custodian, "" if owned else why)

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

    @property
    def _netlink(self) -> NfNetlink:
        """The socket that writes the kernel. Kernel thread, except its address."""
        return self.table_owner.netlink

    def _ask_privilege(self) -> None:
        try:
            self._nft.check("", "add table inet portward_probe\n")
        except KernelError as error:
            raise KernelError(
                f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error}"
            ) from None
