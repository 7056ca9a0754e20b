"""`portward top`: which remembered sources send how much, from two readings of the kernel's counters."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import NamedTuple

from portward.base.interfaces import shown
from portward.config.keys import Config
from portward.dataplane import reconciler
from portward.dataplane.kernel_elements import KernelElements
from portward.dataplane.names import COUNTED_SETS, LimitResult, Verdict
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.verdict_cache import Element, Source, VerdictCache
from portward.ops import host
from portward.table.reader import Reader


class Talker(NamedTuple):
    """A source: its packets since it was learned and in a second since the last reading, and whose it is."""

    segment: str
    source: str
    verdict: str
    rate: float
    packets: int
    owner: str


class TopTalkers:
    """Sources by their rate."""

    def __init__(self, config: Config) -> None:
        """Raises KernelError where no ruleset is loaded or the kernel may not be asked, TableError where there
        is no policy table."""
        netlink = NfNetlink()
        if not reconciler.loaded(netlink):
            raise host.nothing_loaded(config.table)
        self._elements = KernelElements(netlink)
        self._cache = VerdictCache(self._elements)
        self._reader = Reader.open(config.table)
        self._before: dict[tuple[Verdict, Source], int] = {}
        self._at: float | None = None

    def read(self, now: float) -> list[Talker]:
        """The sources, busiest first; `now` is a monotonic time in seconds. The first reading has no rates."""
        elements = list(self._current())
        elapsed = None if self._at is None else max(now - self._at, 1e-3)
        rows = [self._row(element, elapsed) for element in elements]
        self._before = {(element.verdict, element.source): element.packets for element in elements}
        self._at = now
        return sorted(rows, key=lambda row: (-row.rate, -row.packets))

    def _current(self) -> Iterator[Element]:
        """The sources by the verdict that counts now. What was counted under a limit stays in the kernel for a
        minute after the limit has gone, with a revocation say."""
        limited = RateLimits.sources_in_kernel(self._elements)
        for element in self._cache.elements():
            if not isinstance(element.verdict, LimitResult) or element.source in limited:
                yield element

    def _row(self, element: Element, elapsed: float | None) -> Talker:
        before = self._before.get((element.verdict, element.source), 0)
        risen = element.packets - before if element.packets >= before else element.packets
        found = self._reader.owner(element.source.link, element.source.address)
        segment, owner = str(element.source.link), ""
        if found is not None:
            segment = shown(found[0].name)
            account = None if found[1] is None else self._reader.account(found[1].subscription)
            if account is not None:
                owner = (account.subscription.name if account.subscription else "") or str(account.id)
        return Talker(
            segment,
            str(ip_address(element.source.address)),
            COUNTED_SETS[element.verdict],
            0.0 if elapsed is None else risen / elapsed,
            element.packets,
            owner,
        )
