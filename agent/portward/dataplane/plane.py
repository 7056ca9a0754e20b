"""The kernel's side of a running gateway: its ruleset, its cached verdicts, its rate limits.

Every method runs on the kernel thread, one after the other, so no two of them write the kernel at once. None of
them reads the store or waits for a write transaction of the policy table: nothing slow stands before a repair.

Changes of the table arrive in the order of their commits (`enforce`). A repair may run between a commit and its
`enforce`. It takes the newest generation of the table and forgets everything, so the late `enforce` has nothing
left to do.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Final

from portward.config.keys import Config
from portward.dataplane import around, ruleset, templates
from portward.dataplane.accounting import ExpiringKeys
from portward.dataplane.around import SurroundingsMonitor
from portward.dataplane.deletions import Deletions
from portward.dataplane.kernel_elements import KernelElements
from portward.dataplane.lessons import GuardBudget
from portward.dataplane.links import Links, only_ports
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import OthersMonitor
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.selfcheck import SAMPLE_SOURCES, DifferenceKind, SelfCheck
from portward.dataplane.surroundings import NOTHING, Surroundings
from portward.dataplane.sync import VerdictSync
from portward.dataplane.underway import UnderWay
from portward.dataplane.verdict_cache import Element, Source, VerdictCache
from portward.errors import KernelError
from portward.ipc import mark
from portward.ipc.mark import PacketOutcome, classify
from portward.model import ExemptionState
from portward.policy.preset import Preset
from portward.table.commits import Committed
from portward.table.reader import Reader

# Verdicts of the forward guard that are cached in one step, at most 20 steps a second: a flood of new sources
# fills neither the sets of denied sources (262,144 in 60 s) nor those of unknown ones (16,384 in 10 s).
_TAUGHT: Final = 64
# Differences of one kind that are logged one by one.
_TOLD: Final = 10

_log = logging.getLogger("portward")


class Dataplane:
    """What the kernel of one network namespace holds of portward."""

    def __init__(
        self,
        config: Config,
        preset: Preset,
        *,
        nft: Nft,
        netlink: NfNetlink,
        native: bool,
        reader: Reader,
        selfcheck: SelfCheck,
        under_way: UnderWay,
        deletions: Deletions,
        notices: Callable[[], RulesetChanges] | None = None,
    ) -> None:
        """`config` and `preset` are those in force. `native`: the kernel has nft_queue. `reader` belongs to the
        kernel thread alone. `deletions` takes what deleted elements had counted; `notices` as for
        `RulesetReconciler`."""
        self.config, self.preset, self.native = config, preset, native
        self._nft, self._netlink, self._reader = nft, netlink, reader
        self._selfcheck, self._under_way = selfcheck, under_way
        elements = KernelElements(netlink, nft.committing, deletions)
        self.cache = VerdictCache(elements)
        self.reconciler = RulesetReconciler(nft, netlink, self.cache, notices)
        self.rate_limits_seen: dict[Source, Bucket] = {}
        self.rate_limits = RateLimits(elements)
        self.sync = VerdictSync(self.reconciler, self.cache, self.want, self.rate_limits, self.rate)
        self._surroundings = NOTHING
        self.lookout = SurroundingsMonitor()
        # What others have in the kernel decides whether the forward guard is loaded.
        self.watch = OthersMonitor(netlink)
        self._links = Links({}, frozenset())
        # VRFs with one segment as a port: index of the VRF → index of the port.
        self._ports: dict[int, int] = {}
        self._guard_budget = GuardBudget()
        # Changes that were committed before the ruleset was loaded.
        self._early: list[tuple[Committed, dict[str, int] | None, int]] | None = []
        # The newest revision of the store that the kernel acts on: everything older is forgotten.
        self.enforced = 0

    @property
    def broken(self) -> str:
        """Why the kernel does not have the ruleset that it should have; empty if it has."""
        return self.sync.broken

    def prepare(self, seen: Links) -> None:
        """Compiles the ruleset that `load` is expected to load for interfaces as they were `seen`. What goes
        wrong shows when it is loaded."""
        self._take_links(seen)
        surroundings = self._around()._replace(guard=self.watch.look())
        with contextlib.suppress(KernelError, OSError):
            self._nft.prepare(self._wanted(self.config, self.preset, 0, surroundings))

    def load(self, committed: Committed, links: dict[str, int], seen: Links) -> None:
        """Loads the ruleset for the table as it was after `committed`, with `links` (segment → interface index),
        and for what stands around it, among it the interfaces as they were `seen`; then carries out what was
        committed since. From here on the gateway enforces. Raises KernelError."""
        self.sync.links = links
        self._take_links(seen)
        self._surroundings = self._around()._replace(guard=self.watch.look())
        if self.sync.start(committed.generation):
            _log.info("the kernel remembered verdicts of another policy: they are forgotten")
        self.enforced = committed.revision
        early, self._early = self._early or [], None
        for change in early:
            self._carry_out(*change)
        self._look_again()

    def enforce(self, committed: Committed, links: dict[str, int] | None, settled: int) -> None:
        """Carries out a change of the table. With `links` the interfaces have changed, and interfaces that were
        unsettled up to the number `settled` no longer are."""
        if self._early is not None:
            self._early.append((committed, links, settled))
            return
        self._carry_out(committed, links, settled)

    def _carry_out(self, committed: Committed, links: dict[str, int] | None, settled: int) -> None:
        if links is not None:
            self.sync.links = links
        try:
            self.sync.enforce(committed)
        except Exception as error:
            # How far it got is not known: the next repair begins anew.
            self.sync.broken = self.sync.broken or f"{type(error).__name__}: {error}"
            raise
        finally:
            # Also then, or these interfaces would be dropped for ever.
            if links is not None:
                self.sync.settle(settled)
        # Else an earlier change is still to be carried out, or a repair has gone further.
        if not self.broken and self.sync.generation == committed.generation:
            self.enforced = committed.revision
        elif self.broken and committed.revision != self.enforced:
            _log.error(
                "revision %d is NOT enforced, the kernel acts on revision %d: %s",
                committed.revision, self.enforced, self.broken,
            )  # fmt: skip
        self._look_again()

    def unsettle(self, indexes: frozenset[int], number: int) -> None:
        """Drops what interfaces with these indexes send, unless `enforce` has settled event `number` already: each
        index belonged to another interface before, and the table does not say so yet."""
        self.sync.unsettle(indexes, number)

    def surround(self, surroundings: Surroundings) -> None:
        """See `Core.surround`."""
        self._surround(surroundings)
        self._look_again()

    def _surround(self, surroundings: Surroundings) -> None:
        if surroundings == self._surroundings:
            return
        before, self._surroundings = self._surroundings, surroundings
        if self._early is not None:  # `load` takes it in
            return
        if surroundings == before._replace(known=surroundings.known):
            self._know()
            return
        new = surroundings.stacked - before.stacked
        intact = self.sync.intact()
        if new:
            with contextlib.suppress(KernelError):  # without a ruleset there is nothing to add to
                self.reconciler.add(
                    ruleset.stacked_alone(templates.read(), self.config, self.preset, surroundings)
                )
        # To load would put a ruleset back that another program has changed, uncounted, and keep what it cached.
        if not intact:
            self._put_back()
            return
        try:
            self.reconciler.load(self.want(self._kernel_generation()))
        except (KernelError, OSError):
            self._repair()

    def _know(self) -> bool:
        """Writes the set of known interfaces alone: containers come and go, and each would load the ruleset. False
        if the kernel had it already."""
        try:
            return self.cache.set_known_interfaces(self._surroundings.known)
        except KernelError:  # there is no ruleset
            self._put_back()
            return True

    def links_seen(self, links: Links) -> None:
        """See `Core.links_seen`."""
        self._take_links(links)
        self._surround(self._around())
        self._look_again()

    def _around(self) -> Surroundings:
        """The surroundings with the tunnels that end here now, and with the devices on top of segments."""
        return self.lookout.look(self._links.devices, self.config, self._surroundings)

    def _take_links(self, links: Links) -> None:
        self._links = links
        segments = [index for index, name in links.names.items() if self.config.segment(name)]
        self._ports = only_ports(links, segments)

    def watch_others(self) -> None:
        """Loads or removes the forward guard if others began or ended to translate packets."""
        self._surround(self._surroundings._replace(guard=self.watch.look()))

    def _look_again(self) -> None:
        """What others loaded while a ruleset of ours was loaded does not show in the reconciler's numbers."""
        if self.unwatched:
            self.watch_others()

    @property
    def guarded(self) -> bool:
        """Whether the forward guard belongs to the ruleset in the kernel. May be asked on any thread."""
        return self._surroundings.guard and not self.broken

    @property
    def unwatched(self) -> bool:
        """Whether a ruleset of ours was loaded since others were last looked at. May be asked on any thread."""
        return self.watch.looked_at <= self.reconciler.loaded_at

    def would_take(self, config: Config, preset: Preset) -> None:
        """Asks the kernel if it would load the ruleset of another configuration; raises KernelError."""
        devices = self._links.devices
        surroundings = self._surroundings._replace(
            stacked=around.stacked(devices, config), known=around.known(devices, config)
        )
        self.reconciler.check(self._wanted(config, preset, self._kernel_generation(), surroundings))

    def adopt(
        self, config: Config, preset: Preset, changes: list[tuple[Committed, dict[str, int] | None]]
    ) -> bool:
        """Puts another configuration in force, whose `changes` of the table are committed. False if the kernel
        refuses its ruleset; then `check` tries it until it works."""
        self.config, self.preset = config, preset
        self._take_links(self._links)
        self._surroundings = self._around()
        for _, links in changes:
            if links is not None:
                self.sync.links = links
        try:
            self.reconciler.load(self.want(changes[-1][0].generation if changes else self._kernel_generation()))
            self.rate_limits.reload()
        except Exception as error:  # the table is decided anew already: the ruleset must follow
            _log.error("the configuration is in force in part, and is tried again: %s", error)
            self._repair()
            return False
        for committed, links in changes:
            self._carry_out(committed, links, 0)
        self._look_again()
        return True

    def check(self) -> None:
        """Puts the ruleset back if another process has changed it, and forgets everything if a change of the table
        was not carried out."""
        if self.behind or not self.sync.intact():
            self._put_back()
        # Not before: see `_surround`. And by now the reconciler has noted the kernel's number, so what others
        # change from here on shows. FOU, L2TP, WireGuard and legacy iptables announce nothing.
        self._surround(self._around()._replace(guard=self.watch.look()))
        # The reconciler does not look into this set. What is missing there costs others their mail.
        if not self.broken and self._know():
            _log.warning("the set of known interfaces was changed by another program: it is put back")
        self._look_again()

    def _put_back(self) -> None:
        """Repairs, and reports it if the ruleset was not the one that was loaded."""
        self._repair()
        if not self.broken:  # else the log says so already
            self._selfcheck.differs(
                DifferenceKind.RULESET, "the ruleset was not the one that was loaded: it is put back"
            )

    @property
    def behind(self) -> bool:
        """Whether the kernel stands at an older generation than the table although no change is under way. May be
        asked on any thread."""
        # In this order: a change counts as under way from before its commit until it was carried out.
        table = self._under_way.generation()
        return self.sync.generation != table and not self._under_way.any

    def _repair(self) -> None:
        """Loads the ruleset for the newest state of the table and forgets everything."""
        head = self._reader.head()
        self.sync.repair(0 if head is None else head.generation)
        if head is not None and not self.broken:
            self.enforced = head.revision

    def correct(self, suspects: list[Source]) -> None:
        """Makes the kernel forget those of these sources whose cached verdict is not the table's. A change that is
        committed but not carried out makes differences too: they are forgotten all the same, and not reported."""
        if self.broken:  # the ruleset comes first, and with it everything is forgotten
            return
        with contextlib.suppress(OSError, KernelError):
            held = [found for source in suspects if (found := self.cache.get(source)) is not None]
            wrong = [element for element in held if self.differs(self._reader, element)]
            if not wrong:
                return
            self.sync.forget([element.source for element in wrong], self._kernel_generation())
            if self._under_way.any:
                return
            for element in wrong:
                address = ip_address(element.source.address)
                self._selfcheck.differs(
                    DifferenceKind.CACHED,
                    f"the kernel remembered {element.verdict.name.lower()} for {address} behind interface "
                    f"{element.source.link}, which is not the table's verdict: forgotten",
                )

    def end(self, due: ExpiringKeys) -> None:
        """Deletes cached verdicts that are about to expire, so that all that they have counted is known. What the
        kernel refuses expires by itself."""
        if not self.broken:
            with contextlib.suppress(OSError, KernelError):
                self.cache.delete_expiring(due)

    def keep_rates(self) -> None:
        """Brings the rate limits in the kernel in line with the table, and removes those that nobody needs."""
        self._correct_rates()
        self._collect_rates()

    def _correct_rates(self) -> None:
        """Makes the kernel forget the rate limits of sources that have another one, or none, and reads again which
        ones are there if another process has changed that. Of what is as it was left a sample is looked at."""
        if self.broken:
            return
        with contextlib.suppress(OSError, KernelError):
            same = self.rate_limits.equals(self.rate_limits_seen)
            if not same:  # a change of policy may have come between, too
                self.rate_limits.reload()
            sources = list(self.rate_limits.sources())
            looked_at = random.sample(sources, min(len(sources), SAMPLE_SOURCES)) if same else sources
            wrong = [source for source in looked_at if self._bucket(source) != self.rate_limits.bucket(source)]
            if not wrong:
                return
            self.sync.forget(wrong, self._kernel_generation())
            if self._under_way.any:  # see `correct`
                return
            for source in wrong[:_TOLD]:
                self._selfcheck.differs(
                    DifferenceKind.CACHED,
                    f"the kernel let {ip_address(source.address)} behind interface {source.link} send within a "
                    "limit that is not the table's: forgotten",
                )

    def asked(self, sources: Iterable[Source]) -> None:
        """Takes in sources that a worker has met and that the kernel cannot learn from a mark: those with a rate
        limit, and those that the forward guard asked about."""
        # The sets know the port, not the VRF that the guard's question names.
        sources = [source._replace(link=self._ports.get(source.link, source.link)) for source in sources]
        with contextlib.suppress(OSError):
            self.rate_limits.recheck(sources)
        self.rate(sources)
        if self.guarded:
            self._teach(sources)

    def _teach(self, sources: list[Source]) -> None:
        """Writes the verdicts of these sources into the kernel. A change that is committed after the lookup is
        carried out after the write, and forgets what it changes. What the kernel refuses, because a set is full,
        and what is beyond the segment's part, is asked again by the source's next packet."""
        known = {
            source: found
            for source in sources[:_TAUGHT]
            if (found := self._verdict(source)) is not None
            and self._guard_budget.take(source.link, self.config.verdicts)
        }
        with contextlib.suppress(KernelError):
            self.cache.add(known)

    def _verdict(self, source: Source) -> mark.Class | None:
        """What the table says of a source, for the kernel to cache; None: nothing, or it has a rate limit."""
        # Behind an unsettled interface the table finds the verdict of whoever had it before.
        if source.link in self.sync.unsettled:
            return None
        finding = self._reader.lookup(source.link, source.address)
        if finding is None:
            return None
        verdict, outcome = classify(finding)
        return None if outcome is PacketOutcome.DEFERRED else verdict

    def rate(self, sources: Iterable[Source]) -> None:
        """Lets those of these sources whose exemption carries a rate limit send within it. If the kernel refuses,
        the source's next packet asks again."""
        # Behind an unsettled interface the table finds the limit of whoever had it before.
        sources = [source for source in sources if source.link not in self.sync.unsettled]
        found = ((source, self._bucket(source)) for source in sources)
        wanted = {source: bucket for source, bucket in found if bucket is not None}
        try:
            self.rate_limits.add(wanted)
        except KernelError as error:
            _log.warning("sources with a limit stay blocked until they are tried again: %s", error)
            with contextlib.suppress(OSError):
                self.rate_limits.reload()

    def _collect_rates(self) -> None:
        """Takes rate limits out of the kernel that are not in force any more."""
        with contextlib.suppress(KernelError):  # another process has changed the ruleset: `check` puts it right
            self.rate_limits.delete_unused(lambda bucket: self._limit(bucket.subscription) == bucket)

    def _bucket(self, source: Source) -> Bucket | None:
        """The rate limit under which a source may send; None if it may not, or without one."""
        finding = self._reader.lookup(source.link, source.address)
        if finding is None or not finding.limited or finding.observed:
            return None
        owner = self._reader.owner(source.link, source.address)
        return None if owner is None or owner[1] is None else self._limit(owner[1].subscription)

    def _limit(self, subscription: int) -> Bucket | None:
        """The rate limit of a subscription (the table's number) that an exemption grants."""
        account = self._reader.account(subscription)
        exemption = None if account is None else account.exemption
        if exemption is None or exemption.state is not ExemptionState.GRANTED or exemption.limit is None:
            return None
        return Bucket.of(subscription, exemption.limit)

    @staticmethod
    def differs(reader: Reader, element: Element) -> bool:
        """Whether a cached verdict is not the one that `reader` finds now."""
        finding = reader.lookup(element.source.link, element.source.address)
        if finding is None:
            return True
        verdict, outcome = classify(finding)
        # One with a rate limit must not be cached as allowed: that would be without it.
        return outcome is PacketOutcome.DEFERRED or verdict is not element.verdict

    def _kernel_generation(self) -> int:
        """The generation that the cached verdicts agree with."""
        return self.sync.generation or 0

    def want(self, generation: int) -> ruleset.Wanted:
        """The ruleset that should be loaded, for the table at this generation."""
        return self._wanted(self.config, self.preset, generation, self._surroundings)

    def _wanted(
        self, config: Config, preset: Preset, generation: int, surroundings: Surroundings
    ) -> ruleset.Wanted:
        state = ruleset.State(
            generation,
            synced=self.cache.synced() == generation,
            unsettled=frozenset(self.sync.unsettled),
        )
        return ruleset.wanted(
            templates.read(), config, preset, native=self.native, state=state, surroundings=surroundings
        )
