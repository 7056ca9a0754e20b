"""A committed change of the policy table → the kernel: the epoch first, then what must be forgotten.

Until `enforce` returns, the kernel may still act on verdicts of the older policy. If there is much to search,
the gate (module `gate`) stops them before. If the process dies between the steps, `synced` in the kernel names an
older generation than the table has, and the next start loads the ruleset, without a gate, and forgets everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from portward.dataplane.prefixes import Prefixes
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.ruleset import Wanted
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError
from portward.table.commits import Committed

# Up to this many single sources are forgotten without reading the sets, by writing each into all of them: see
# `VerdictCache.forget`.
_UNREAD: Final = 4_096
# Up to this many sources found in changed prefixes get their limits at once; each is looked up in the policy table
# (10 µs), the others ask when they send.
_RATED: Final = 4_096


_log = logging.getLogger("portward.ruleset")


class VerdictSync:
    """Brings what the kernel remembers in line with the policy table."""

    def __init__(
        self,
        reconciler: RulesetReconciler,
        cache: VerdictCache,
        want: Callable[[int], Wanted],
        rates: RateLimits,
        rate: Callable[[Iterable[Source]], None],
    ) -> None:
        """`want` gives the ruleset for a generation of the table; `rate` writes the limits of sources into the
        kernel."""
        self._reconciler, self._cache, self._want = reconciler, cache, want
        self._rate_limits, self._rate = rates, rate
        self.links: dict[str, int] = {}
        self.broken = ""
        # The generation of the policy table that the kernel was last brought in line with.
        self.generation: int | None = None
        # Interfaces whose index belonged to another one before, and the table does not say so yet: index →
        # number of the event that said so.
        self.unsettled: dict[int, int] = {}
        self._settled = 0

    def start(self, generation: int) -> bool:
        """Loads the ruleset. What the kernel remembers from an earlier run is kept where it agrees with the
        table, and forgotten else; True where something was there to forget. Raises KernelError."""
        remembered = self._cache.synced()
        self._reconciler.load(self._want(generation))
        self._rate_limits.reload()
        self.generation = generation
        if remembered == generation:
            return False
        self._forget_everything(generation)
        return remembered is not None

    def enforce(self, committed: Committed) -> None:
        """Carries a change out. Where the kernel does not take it, the ruleset is loaded anew and everything
        forgotten, now or, where that fails too, at the next repair. Does nothing if a repair has brought the
        kernel to this generation or a later one meanwhile: then everything older is forgotten.

        If a change before this one was not carried out, nobody knows what it reaches: everything is forgotten."""
        if not committed.new:
            return
        if not self._is_newer(committed.generation):
            self._renew(committed.links)
            return
        if self.broken:
            self.repair(committed.generation)
            self._renew(committed.links)
            return
        try:
            self._cache.move_epoch(committed.generation, committed.links)
            if committed.everything or not self._follows(committed):
                self._forget_everything(committed.generation)
            else:
                self._forget_changed(committed)
            self.generation = committed.generation
        except (KernelError, OSError):
            self.repair(committed.generation)
            self._renew(committed.links)

    def _renew(self, links: Iterable[int]) -> None:
        """The part of a change of interfaces that a repair does not do. If the kernel refuses it, the ruleset is
        not there, and with its chains went the packets that waited for a verdict."""
        with contextlib.suppress(KernelError, OSError):
            self._cache.renew(links)

    def forget(
        self, sources: Iterable[Source], generation: int, *, opens: bool = True, closes: bool = True
    ) -> None:
        """Makes the kernel forget these sources, verdict and limit; `opens` and `closes` as `Committed` has them.
        Raises KernelError or OSError."""
        sources = list(sources)
        if len(sources) <= _UNREAD:
            self._cache.forget(sources, generation, self._rate_limits.deletions(sources))
        else:
            prefixes = Prefixes()
            for source in sources:
                prefixes.add_source(source.key)
            rates = self._rate_limits.deletions(sources)
            self._cache.forget_within(prefixes, generation, rates, opens=opens, closes=closes)
        self._rate_limits.deleted(sources)

    def _forget_changed(self, committed: Committed) -> None:
        """Makes the kernel forget what a change reaches, and tells it the limits that now hold there: sources with
        a limit need not send twice then."""
        sources, prefixes = self._sources(committed), self._prefixes(committed)
        if not len(prefixes):
            self.forget(sources, committed.generation, opens=committed.opens, closes=committed.closes)
            self._rate(sources)
            return
        for source in sources:
            prefixes.add_source(source.key)
        rated = self._rate_limits.within(prefixes)
        found = self._cache.forget_within(
            prefixes,
            committed.generation,
            self._rate_limits.deletions(rated),
            opens=committed.opens or bool(committed.links),
            closes=committed.closes or bool(committed.links),
        )
        self._rate_limits.deleted(rated)
        self._rate({*sources, *rated, *islice(found, _RATED)})

    def unsettle(self, indexes: Iterable[int], number: int) -> None:
        """Drops what these interfaces send and forgets their cached verdicts, until `settle` for event `number`.
        First the drop, which also covers verdicts that are on their way from a worker; then what is cached."""
        if number <= self._settled:
            return
        new = dict.fromkeys(indexes, number)
        self.unsettled |= new
        try:
            self._cache.unsettle(new)
            self._forget_links(new)
        except (KernelError, OSError):
            self.repair(self.generation or 0)

    def settle(self, number: int) -> None:
        """The table says to which segments interfaces belong, as of event `number`: packets of those that were
        unsettled up to then are judged again."""
        self._settled = max(self._settled, number)
        settled = [index for index, since in self.unsettled.items() if since <= number]
        if not settled:
            return
        for index in settled:
            del self.unsettled[index]
        if self.broken:
            # The kernel may still stand at the epoch before, under which verdicts of the owner before count. The
            # repair writes the set together with the epoch.
            return
        try:
            self._cache.settle(settled)
        except (KernelError, OSError):
            self.repair(self.generation or 0)

    def intact(self) -> bool:
        """Whether the kernel has the ruleset that was loaded, under the generation that it was brought to."""
        if self.generation is None:
            return True
        with contextlib.suppress(OSError, KernelError):
            return not self.broken and self._reconciler.intact() and self._reconciler.epoch_is(self.generation)
        return False

    def repair(self, generation: int) -> None:
        """Loads the ruleset anew and forgets everything: whoever changed it may have changed the sets too. What
        the kernel refuses is in `broken` and in the log, and is tried again at the next repair."""
        try:
            self._reconciler.repair(self._want(generation))
            self._forget_everything(generation)
            self._rate_limits.reload()
            self.generation, self.broken = generation, ""
        except (KernelError, OSError) as error:
            if str(error) != self.broken:
                _log.critical("THE RULESET CANNOT BE PUT BACK, port 25 may be open: %s", error)
            self.broken = str(error)

    def _forget_everything(self, generation: int) -> None:
        self._cache.forget_everything(generation)
        self._rate_limits.all_deleted()

    def _forget_links(self, indexes: Iterable[int]) -> None:
        """Makes the kernel forget the cached verdicts and rate limits behind these interfaces."""
        prefixes = Prefixes()
        for index in indexes:
            prefixes.add_link(index)
        rated = self._rate_limits.within(prefixes)
        self._cache.forget_within(prefixes, self.generation or 0, self._rate_limits.deletions(rated))
        self._rate_limits.deleted(rated)

    def _follows(self, committed: Committed) -> bool:
        """Whether the kernel stands at the generation from which a change began, or within the change."""
        return self.generation is None or (committed.generation - self.generation) % 2**32 <= committed.steps

    def _is_newer(self, generation: int) -> bool:
        """Whether a generation comes after the kernel's. They wrap around at 2**32."""
        return self.generation is None or 0 < (generation - self.generation) % 2**32 < 2**31

    def _sources(self, committed: Committed) -> list[Source]:
        """The single addresses that have changed."""
        return [
            Source(self.links[place.segment], place.network.network_address.packed)
            for place in committed.changed
            if place.network.prefixlen == place.network.max_prefixlen and place.segment in self.links
        ]

    def _prefixes(self, committed: Committed) -> Prefixes:
        """The wider prefixes and the interfaces that have changed."""
        prefixes = Prefixes()
        for link in committed.links:
            prefixes.add_link(link)
        for place in committed.changed:
            index = self.links.get(place.segment)
            if index is not None and place.network.prefixlen != place.network.max_prefixlen:
                prefixes.add(index, place.network)
        return prefixes
