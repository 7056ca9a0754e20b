"""The kernel's side of a running gateway: what the kernel should hold, and when it is brought in line.

Each method takes what has happened (a change of the policy table, other interfaces, another configuration, the
periodic check) into one desired state and applies it: see `KernelSync.apply`. Both tables of the kernel get the
same state, one after the other. Each keeps by itself which state it has, so if the process dies in between, or the
kernel refuses one of them, the other is as good as alone, and the next `apply` brings both in line.

Every method runs on the kernel thread, one after the other, so no two of them write the kernel at once. Only the
properties under "may be asked on any thread" are for others, too. None of
them reads the store or waits for a write transaction of the policy table: nothing slow stands before a repair.

Changes of the table arrive in the order of their commits (`enforce`). A repair may run between a commit and its
`enforce`. It takes the newest generation of the table and forgets everything, so the late `enforce` has nothing
left to do.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping

from portward.base.descriptors import Reserve
from portward.config.keys import Config
from portward.dataplane.accounting import ExpiringKeys
from portward.dataplane.deletions import Deletions
from portward.dataplane.desired import Desired, SegmentLinks, Surroundings, Unsettled
from portward.dataplane.links import Links, only_ports
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import KernelTable, unqualified
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import Others, OthersMonitor
from portward.dataplane.pending import PendingChanges
from portward.dataplane.selfcheck import DifferenceKind, SelfCheck
from portward.dataplane.surroundings import SurroundingsMonitor
from portward.dataplane.sync import Found
from portward.dataplane.table_control import TableControl
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.policy.preset import Preset
from portward.table.commits import Committed, merged
from portward.table.reader import Reader

_log = logging.getLogger("portward")


class Dataplane:
    """The state of portward in the kernel of one network namespace, and every change of it."""

    def __init__(
        self,
        config: Config,
        preset: Preset,
        *,
        nft: Nft,
        netlink: NfNetlink,
        native: bool,
        bridged: bool,
        reader: Reader,
        selfcheck: SelfCheck,
        pending_changes: PendingChanges,
        deletions: Deletions,
        notices: Mapping[KernelTable, Callable[[], RulesetChanges]] | None = None,
    ) -> None:
        """`config` and `preset` are those in force. `native`: the kernel has nft_queue. `bridged`: it takes the
        table `bridge`, too. `reader` belongs to the kernel thread alone. `deletions` takes what deleted elements
        had counted; `notices` as for `RulesetReconciler`, for each table."""
        self._nft, self._reader = nft, reader
        # Spare descriptors for a repair, so that it does not fail for lack of one.
        self._reserve = Reserve(4)
        self._selfcheck, self._pending_changes = selfcheck, pending_changes
        tables = tuple(KernelTable) if bridged else (KernelTable.INET,)
        closed_too = () if bridged else (KernelTable.BRIDGE,)
        self.tables = tuple(
            TableControl(
                nft, netlink.of(table), reader, deletions,
                native=native, notices=(notices or {}).get(table), closed_too=closed_too,
            )
            for table in tables
        )  # fmt: skip
        # The table `inet` is there in any case.
        self.inet = self.tables[0]
        self._desired = Desired(config, preset)
        self._unsettled = Unsettled()
        # The devices that take packets of segments before portward sees them, as last found.
        self.lookout = SurroundingsMonitor(bridged=bridged)
        # The rules of other programs decide whether the forward guard is loaded.
        self.watch = OthersMonitor(netlink)
        self._links = Links({}, frozenset())
        # VRFs with one segment as a port: index of the VRF → index of the port.
        self._ports: dict[int, int] = {}
        # Changes that were committed before the ruleset was loaded.
        self._early: list[tuple[Committed, SegmentLinks | None, int]] = []

    # --- may be asked on any thread ---

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._desired.config

    @property
    def preset(self) -> Preset:
        """The preset in force."""
        return self._desired.preset

    @property
    def bridged(self) -> bool:
        """Whether bridged frames get verdicts: the table `bridge` is one of the tables."""
        return len(self.tables) > 1

    @property
    def broken(self) -> str:
        """Why the kernel does not have the ruleset that it should have; empty if it has."""
        return "; ".join(dict.fromkeys(one.sync.broken for one in self.tables if one.sync.broken))

    @property
    def loaded(self) -> bool:
        """Whether `load` has loaded the ruleset."""
        return all(one.sync.in_force is not None for one in self.tables)

    @property
    def enforced(self) -> int:
        """The newest revision of the store that the kernel acts on: everything older is forgotten."""
        return min(0 if one.sync.in_force is None else one.sync.in_force.revision for one in self.tables)

    @property
    def behind(self) -> bool:
        """Whether the kernel stands at an older generation than the table although no change is under way."""
        # In this order: a change counts as under way from before its commit until it was carried out.
        table = self._pending_changes.generation()
        return any(one.sync.generation != table for one in self.tables) and not self._pending_changes.any

    @property
    def loaded_at(self) -> float:
        """When a ruleset was last put in place, by the monotonic clock."""
        return max(one.reconciler.loaded_at for one in self.tables)

    @property
    def repairs(self) -> int:
        """How often a ruleset was loaded again because it was not as it should be."""
        return sum(one.reconciler.repairs for one in self.tables)

    @property
    def repair_tries(self) -> int:
        """How often that was tried."""
        return sum(one.reconciler.repair_tries for one in self.tables)

    @property
    def others(self) -> Others:
        """Rules of other programs that may translate packets, as last found."""
        return self.watch.found

    @property
    def guarded(self) -> bool:
        """Whether the forward guard belongs to the ruleset in the kernel."""
        return self._desired.surroundings.guard and not self.inet.sync.broken

    @property
    def unwatched(self) -> bool:
        """Whether a ruleset of ours was loaded since others were last looked at: what others loaded meanwhile does
        not show in the reconciler's numbers."""
        return self.watch.looked_at <= self.loaded_at

    def at_rest(self, netlink: NfNetlink, heard: RulesetChanges | None = None) -> bool:
        """Whether `check` has nothing to do. `netlink` and `heard` as for `RulesetReconciler.at_rest`."""
        due = self.broken or self.behind or self.unwatched
        return not due and all(one.reconciler.at_rest(netlink, heard) for one in self.tables)

    # --- the start ---

    def prepare(self, seen: Links) -> None:
        """Compiles the ruleset that `load` is expected to load for interfaces as they were `seen`. Errors are
        left to `load`, which meets them again."""
        self._take_links(seen)
        surroundings = self._surroundings(look=True)
        desired = self._desired._replace(surroundings=surroundings)
        with contextlib.suppress(KernelError, OSError):
            for one in self.tables:
                self._nft.prepare(one.sync.wanted(one.part(desired)))

    def load(self, committed: Committed, links: SegmentLinks, seen: Links) -> None:
        """Loads the ruleset for the table as it was after `committed`, with `links` as the interfaces of the
        segments, and for what stands around it, among it the interfaces as they were `seen`; then carries out what
        was committed since. From here on the gateway enforces. Raises KernelError."""
        self._take_links(seen)
        self._desired = self._desired._replace(
            generation=committed.generation,
            revision=committed.revision,
            links=links,
            surroundings=self._surroundings(look=True),
        )
        # If the kernel refuses the second table, nothing must be loaded. If it refuses only the load, which is no
        # reason of its own, the first one stays: without an agent it opens nothing.
        for one in self.tables[1:]:
            one.reconciler.check(one.sync.wanted(one.part(self._desired)))
        if Found.STALE in [one.sync.apply(one.part(self._desired)) for one in self.tables]:
            _log.info("the kernel had cached verdicts of another policy: they are forgotten")
        for change in self._early:
            self._change(*change)
        self._early.clear()
        self._look_again()

    # --- what happens ---

    def enforce(self, committed: Committed, links: SegmentLinks | None, settled: int) -> None:
        """Carries out a change of the table. With `links` the interfaces of segments have changed, and the table
        names their owners up to event number `settled`."""
        if not self.loaded:
            self._early.append((committed, links, settled))
            return
        self._change(committed, links, settled)
        self._look_again()

    def _change(self, committed: Committed, links: SegmentLinks | None, settled: int) -> None:
        if links is not None:
            self._unsettled.settle(settled)
            self._desired = self._desired._replace(links=links, unsettled=self._unsettled.indexes)
        self._apply(committed)
        if self.broken and committed.revision != self.enforced:
            _log.error(
                "revision %d is NOT enforced, the kernel acts on revision %d: %s",
                committed.revision, self.enforced, self.broken,
            )  # fmt: skip

    def unsettle(self, indexes: frozenset[int], event: int) -> None:
        """Drops what interfaces with these indexes send, unless `enforce` has settled event number `event`
        already: each index belonged to another interface before, and the table does not say so yet."""
        self._unsettled.add(indexes, event)
        self._desired = self._desired._replace(unsettled=self._unsettled.indexes)
        self._apply_if_loaded()

    def links_seen(self, links: Links) -> None:
        """Takes in the present interfaces, however busy the policy thread is. Loads the ruleset again if other
        tunnels end here or other devices are stacked on segments, because a stacked device lets the segment's
        packets pass until then."""
        self._take_links(links)
        self.surround(self._surroundings(look=False))

    def surround(self, surroundings: Surroundings) -> None:
        """Loads the ruleset again if its surroundings have changed. Cached verdicts stay. If the kernel refuses
        it, `check` repairs that."""
        self._surround(surroundings)
        self._look_again()

    def adopt(self, config: Config, preset: Preset, changes: list[tuple[Committed, SegmentLinks | None]]) -> None:
        """Puts another configuration in force, whose `changes` of the table (one or more, each with the
        segments' interfaces if these have changed) are committed. If the kernel refuses its ruleset, `check`
        tries it until it works."""
        self._desired = self._desired._replace(config=config, preset=preset)
        self._take_links(self._links)
        self._desired = self._desired._replace(surroundings=self._surroundings(look=False))
        links = next((links for _, links in reversed(changes) if links is not None), None)
        try:
            self._change(merged([committed for committed, _ in changes]), links, 0)
        except Exception:  # the table is decided anew already: the ruleset must follow, and `check` sees to it
            _log.exception("the configuration is in force in part, and is tried again")
            return
        if self.broken:
            _log.error("the configuration is in force in part, and is tried again: %s", self.broken)
        self._look_again()

    def check(self) -> None:
        """Compares the kernel with what it should hold, and what stands around it with what was last seen. Repairs
        what differs."""
        with self._reserve.lent():
            self._apply()
            # Not before: to look around is slow, and a repair comes first. And by now the reconciler has noted the
            # kernel's number, so what others change from here on shows. FOU, L2TP, WireGuard and legacy iptables
            # announce nothing.
            self._surround(self._surroundings(look=True))
            self._look_again()

    def would_take(self, config: Config, preset: Preset) -> None:
        """Asks the kernel if it would load the ruleset of another configuration; raises KernelError."""
        around = self.lookout.with_devices(self._links.devices, config, self._desired.surroundings)
        desired = self._desired._replace(config=config, preset=preset, surroundings=around)
        for one in self.tables:
            wanted = one.part(desired)._replace(generation=one.sync.generation or 0)
            one.reconciler.check(one.sync.wanted(wanted))

    # --- what they are made of ---

    def _apply(self, change: Committed | None = None) -> None:
        """Brings the kernel in line with the desired state, at the newest generation of the table."""
        head = self._reader.head()
        if head is not None:
            self._desired = self._desired._replace(generation=head.generation, revision=head.revision)
        # Asked after the generation, see `behind`.
        pending = self._pending_changes.any
        failed: list[Exception] = []
        for one in self.tables:
            try:
                self._apply_to(one, change, pending=pending)
            except Exception as error:  # the other table must not wait for this one
                failed.append(error)
        if failed:
            raise failed[0]

    def _apply_to(self, one: TableControl, change: Committed | None, *, pending: bool) -> None:
        found = one.sync.apply(one.part(self._desired), change, pending=pending)
        if found is Found.CHANGED and not one.sync.broken:  # else the log says so already
            self._selfcheck.differs(
                DifferenceKind.RULESET, "the ruleset was not the one that was loaded: it is put back"
            )

    def _apply_if_loaded(self) -> None:
        if self.loaded:  # else `load` takes it in
            self._apply()

    def _surround(self, surroundings: Surroundings) -> None:
        if surroundings != self._desired.surroundings:
            self._desired = self._desired._replace(surroundings=surroundings)
            self._apply_if_loaded()

    def _look_again(self) -> None:
        """Loads or removes the forward guard if others began or ended to translate packets."""
        if self.unwatched:
            self._surround(self._desired.surroundings._replace(guard=self.watch.look()))

    def _surroundings(self, *, look: bool) -> Surroundings:
        """The surroundings with the tunnels that end here now, and with the devices on top of segments. `look`:
        also with what others have in the kernel, which takes longer."""
        found = self.lookout.look(self._links.devices, self.config, self._desired.surroundings)
        return found._replace(guard=self.watch.look()) if look else found

    def _take_links(self, links: Links) -> None:
        self._links = links
        segments = [index for index, name in links.names.items() if self.config.segment(name)]
        self._ports = only_ports(links, segments)

    # --- single sources ---

    def correct(self, suspects: list[Source]) -> None:
        """Makes the kernel forget those of these sources whose cached verdict is not the table's. A change that is
        committed but not carried out makes differences too: they are forgotten all the same, and not reported."""
        for one in self.tables:
            with contextlib.suppress(OSError, KernelError):
                self._report(one.correct(suspects))

    def sync_rate_limits(self) -> None:
        """Brings the rate limits in the kernel in line with the table, and removes those that are not used."""
        for one in self.tables:
            with contextlib.suppress(OSError, KernelError):
                self._report(one.correct_rate_limits())
            one.sources.delete_unused_limits()

    def _report(self, differences: Iterable[str]) -> None:
        """Reports cached verdicts or rate limits that were not the table's, unless a change is under way."""
        if not self._pending_changes.any:
            for what in differences:
                self._selfcheck.differs(DifferenceKind.CACHED, what)

    def install_limits(self, sources: Iterable[Source]) -> None:
        """Writes what the kernel cannot cache from a verdict mark, for sources that a worker has reported: their
        rate limits, and the verdicts that the forward guard asked for. A report does not say which of the tables
        the packet was in, and an interface may move from one to the other, so both get the limits."""
        # The sets know the port, not the VRF that the guard's question names.
        met = [source._replace(link=self._ports.get(source.link, source.link)) for source in sources]
        met = [source for source in met if source.link not in self._desired.unsettled]
        for one in self.tables:
            settled = one.install_limits(met)
            if self.guarded and one is self.inet:
                one.sources.cache(settled, self.config.verdicts)

    def delete_expiring(self, due: ExpiringKeys) -> None:
        """Deletes cached verdicts that are about to expire, so that all that they have counted is known. If
        the kernel refuses, they expire by themselves."""
        for one in self.tables:
            named = ((unqualified(name), keys) for name, keys in due.items())
            one.delete_expiring({set_: keys for (table, set_), keys in named if table is one.table})
