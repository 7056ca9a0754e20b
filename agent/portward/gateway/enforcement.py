"""A committed change of the policy table → the kernel: the epoch first, then what must be forgotten.

Until `enforce` returns, the kernel may still act on verdicts of the older policy. If the process dies
between its steps, `synced` in the kernel names an older generation than the table has, and the next start
forgets everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Final

from portward.errors import KernelError
from portward.gateway.keeper import Keeper
from portward.gateway.learned import Element, Learned, Source, covered
from portward.gateway.rates import Rates
from portward.gateway.ruleset import Wanted
from portward.model import Network
from portward.table.edit import Place
from portward.table.writer import Committed

# Up to so many sources are counted a last time before they are forgotten; it costs 50 µs each.
_COUNTED: Final = 64


_log = logging.getLogger("portward.ruleset")


class Enforcement:
    """Brings what the kernel remembers in line with the policy table."""

    def __init__(
        self,
        keeper: Keeper,
        learned: Learned,
        want: Callable[[int], Wanted],
        count: Callable[[list[Element]], None],
        rates: Rates,
        rate: Callable[[Iterable[Source]], None],
    ) -> None:
        """`want` gives the ruleset for a generation of the table; `count` takes elements that are about to be
        forgotten; `rate` writes the limits of sources into the kernel."""
        self._keeper, self._learned, self._want, self._count = keeper, learned, want, count
        self._rates, self._rate = rates, rate
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
        remembered = self._learned.synced()
        self._keeper.load(self._want(generation))
        self._rates.read()
        self.generation = generation
        if remembered == generation:
            return False
        self._forget_everything(generation)
        return remembered is not None

    def enforce(self, committed: Committed) -> None:
        """Carries a change out. Where the kernel does not take it, the ruleset is loaded anew and everything
        forgotten, now or, where that fails too, at the next repair. Does nothing if a repair has brought the
        kernel to this generation or a later one meanwhile: then everything older is forgotten."""
        if not committed.new or not self._is_newer(committed.generation):
            return
        try:
            self._learned.move_epoch(committed.generation)
            if committed.everything:
                self._forget_everything(committed.generation)
            else:
                sources = self._sources(committed)
                if len(sources) <= _COUNTED:
                    self._count([held for source in sources if (held := self._learned.held(source))])
                self.forget(sources, committed.generation)
                # Known beforehand, they need not send twice.
                self._rate(sources)
            self.generation = committed.generation
        except (KernelError, OSError):
            self.repair(committed.generation)

    def forget(self, sources: Iterable[Source], generation: int) -> None:
        """Makes the kernel forget these sources, verdict and limit; raises KernelError."""
        sources = list(sources)
        if self._learned.forget(sources, generation, self._rates.forgetting):
            self._rates.all_forgotten()
        else:
            self._rates.forgotten(sources)

    def unsettle(self, indexes: Iterable[int], number: int) -> None:
        """Drops what these interfaces send and forgets their cached verdicts, until `settle` for event `number`.
        First the drop, which also covers verdicts that are on their way from a worker; then what is cached."""
        if number <= self._settled:
            return
        new = dict.fromkeys(indexes, number)
        self.unsettled |= new
        try:
            self._learned.unsettle(new)
            self.forget(self._behind(new), self.generation or 0)
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
        try:
            self._learned.settle(settled)
        except (KernelError, OSError):
            self.repair(self.generation or 0)

    def intact(self) -> bool:
        """Whether the kernel has the ruleset that was loaded, under the generation that it was brought to."""
        if self.generation is None:
            return True
        with contextlib.suppress(OSError, KernelError):
            return not self.broken and self._keeper.intact() and self._keeper.epoch_is(self.generation)
        return False

    def repair(self, generation: int) -> None:
        """Loads the ruleset anew and forgets everything: whoever changed it may have changed the sets too. What
        the kernel refuses is in `broken` and in the log, and is tried again at the next repair."""
        try:
            self._keeper.repair(self._want(generation))
            self._forget_everything(generation)
            self._rates.read()
            self.generation, self.broken = generation, ""
        except (KernelError, OSError) as error:
            if str(error) != self.broken:
                _log.critical("THE RULESET CANNOT BE PUT BACK, port 25 may be open: %s", error)
            self.broken = str(error)

    def _forget_everything(self, generation: int) -> None:
        self._learned.forget_everything(generation)
        self._rates.all_forgotten()

    def _sources(self, committed: Committed) -> set[Source]:
        sources = self._behind(committed.links) if committed.links else set()
        wide: dict[int, list[Place]] = {}
        for place in committed.changed:
            index = self.links.get(place.segment)
            if index is None:
                continue
            if place.network.prefixlen == place.network.max_prefixlen:
                sources.add(Source(index, place.network.network_address.packed))
            else:
                wide.setdefault(index, []).append(place)
        for index, places in wide.items():
            networks = _networks(places)
            sources |= self._learned.within(index, networks)
            sources |= {
                source for source in self._rates.sources() if source.link == index and covered(source, networks)
            }
        return sources

    def _behind(self, indexes: Iterable[int]) -> set[Source]:
        """The sources behind these interfaces that the kernel has a verdict or a rate limit of."""
        gone = frozenset(indexes)
        return self._learned.behind(gone) | {source for source in self._rates.sources() if source.link in gone}

    def _is_newer(self, generation: int) -> bool:
        """Whether a generation comes after the kernel's. They wrap around at 2**32."""
        return self.generation is None or 0 < (generation - self.generation) % 2**32 < 2**31


def _networks(places: Iterable[Place]) -> list[Network]:
    return [place.network for place in places]
