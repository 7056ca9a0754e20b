"""All that writes one of portward's tables in the kernel, put together. Everything runs on the kernel thread."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from portward.dataplane.deletions import Deletions
from portward.dataplane.desired import Desired
from portward.dataplane.monitor import RulesetChanges
from portward.dataplane.names import KernelTable
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.selfcheck import SAMPLE_SOURCES
from portward.dataplane.sources import SourcePolicy
from portward.dataplane.sync import KernelSync
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError
from portward.table.reader import Reader

# Differences of one kind that are reported one by one: more would flood the log.
_REPORTED_DIFFERENCES: Final = 10


class TableControl:
    """One table: its ruleset, its cached verdicts and its rate limits."""

    def __init__(
        self,
        nft: Nft,
        netlink: NfNetlink,
        reader: Reader,
        deletions: Deletions,
        *,
        native: bool,
        notices: Callable[[], RulesetChanges] | None = None,
        closed_too: Collection[KernelTable] = (),
    ) -> None:
        """`netlink` is for the table. `reader` belongs to the kernel thread alone. `deletions` takes what deleted
        elements had counted; `notices` and `closed_too` as for `RulesetReconciler`. `native`: the kernel has
        nft_queue."""
        self.table = netlink.table
        elements = KernelElements(netlink, deletions)
        self.cache = VerdictCache(elements)
        self.rate_limits = RateLimits(elements)
        # As the counting thread last read them in the kernel.
        self.rate_limits_seen: dict[Source, Bucket] = {}
        self.reconciler = RulesetReconciler(nft, netlink, self.cache, notices, closed_too)
        self.sources = SourcePolicy(reader, self.cache, self.rate_limits)
        self.sync = KernelSync(
            self.reconciler, self.cache, self.rate_limits, self.sources.limit, native=native, table=self.table
        )

    def part(self, desired: Desired) -> Desired:
        """The part of the desired state that is this table's."""
        return desired if self.table is KernelTable.INET else desired.bridged()

    def correct(self, suspects: Iterable[Source]) -> list[str]:
        """Makes the kernel forget those of these sources whose cached verdict is not the policy table's. Returns a
        sentence for each. Raises OSError or KernelError."""
        if self.sync.broken:  # the ruleset comes first, and with it everything is forgotten
            return []
        cached = [found for source in suspects if (found := self.cache.get(source)) is not None]
        wrong = [element for element in cached if self.sources.is_wrong(element)]
        if wrong:
            self.sync.forget([element.source for element in wrong])
        return [
            f"the kernel had cached {element.verdict.name.lower()} for {ip_address(element.source.address)} "
            f"behind interface {element.source.link}, which is not the table's verdict: forgotten"
            for element in wrong
        ]

    def correct_rate_limits(self) -> list[str]:
        """Makes the kernel forget the rate limits of sources that have another one, or none, and reads again which
        ones are there if another process has changed that. Of what is as it was left a sample is looked at.
        Returns a sentence for each of the first sources. Raises OSError or KernelError."""
        if self.sync.broken:
            return []
        same = self.rate_limits.equals(self.rate_limits_seen)
        if not same:  # a change of policy may have come between, too
            self.rate_limits.reload()
        sources = list(self.rate_limits.sources())
        looked_at = random.sample(sources, min(len(sources), SAMPLE_SOURCES)) if same else sources
        wrong = [source for source in looked_at if self.sources.has_wrong_limit(source)]
        if wrong:
            self.sync.forget(wrong)
        return [
            f"the kernel let {ip_address(source.address)} behind interface {source.link} send within a limit that "
            "is not the table's: forgotten"
            for source in wrong[:_REPORTED_DIFFERENCES]
        ]

    def install_limits(self, sources: Iterable[Source]) -> list[Source]:
        """Writes the rate limits of those of these sources that have one. Returns the sources of interfaces whose
        owner the policy table names: of others nothing is written."""
        met = list(sources)
        with contextlib.suppress(OSError):
            self.rate_limits.recheck(met)
        unsettled = frozenset[int]() if self.sync.in_force is None else self.sync.in_force.unsettled
        met = [source for source in met if source.link not in unsettled]
        self.sources.limit(met)
        return met

    def delete_expiring(self, due: Mapping[str, Sequence[bytes]]) -> None:
        """Deletes cached verdicts (set → keys) that are about to expire, so that all that they have counted is
        known. If the kernel refuses, they expire by themselves."""
        if due and not self.sync.broken:
            with contextlib.suppress(OSError, KernelError):
                self.cache.delete_expiring(due)
