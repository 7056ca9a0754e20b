"""`portward top`: the sources with a cached verdict by their packet rate, from two readings of the kernel's
counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from portward.base.interfaces import shown
from portward.config.keys import Config
from portward.dataplane import reconciler
from portward.dataplane.names import COUNTED_SETS, KernelTable, LimitResult, Verdict
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.verdict_cache import Element, Source, VerdictCache
from portward.ops import host
from portward.table.reader import Reader


class Talker(NamedTuple):
    """A source: packets since its verdict was cached, packets a second since the last reading, and its owner."""

    segment: str
    source: str
    verdict: str
    rate: float
    packets: int
    owner: str


class TopTalkers:
    """Sources by their rate."""

    def __init__(self, config: Config) -> None:
        """Raises KernelError if no ruleset is loaded or this user may not read the kernel, TableError if there is
        no policy table."""
        netlink = NfNetlink()
        loaded = [one for table in KernelTable if reconciler.loaded(one := netlink.of(table))]
        if not loaded:
            raise host.nothing_loaded(config.table)
        self._tables = [KernelElements(one) for one in loaded]
        self._reader = Reader.open(config.table)
        self._before: dict[tuple[Verdict, Source], int] = {}
        self._at: float | None = None

    def read(self, now: float) -> list[Talker]:
        """The sources, those with the highest rate first. `now` is the monotonic time in seconds. In the first
        reading all rates are 0."""
        elements = list(_in_both(element for one in self._tables for element in _current(one)))
        elapsed = None if self._at is None else max(now - self._at, 1e-3)
        rows = _merged(self._row(element, elapsed) for element in elements)
        self._before = {(element.verdict, element.source): element.packets for element in elements}
        self._at = now
        return sorted(rows, key=lambda row: (-row.rate, -row.packets))

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


def _current(elements: KernelElements) -> Iterator[Element]:
    """The sources of a table with the verdict that is in force. An element that counts under a rate limit stays in
    the kernel for a minute after the limit was removed, for example by a revocation."""
    limited = RateLimits.sources_in_kernel(elements)
    for element in VerdictCache(elements).elements():
        if not isinstance(element.verdict, LimitResult) or element.source in limited:
            yield element


def _in_both(elements: Iterable[Element]) -> Iterable[Element]:
    """The elements, one for each source and verdict: both tables have one if the interface was taken into a bridge
    a moment ago, or out of one."""
    found: dict[tuple[Verdict, Source], Element] = {}
    for element in elements:
        key = element.verdict, element.source
        before = found[key].packets if key in found else 0
        found[key] = element._replace(packets=before + element.packets)
    return found.values()


def _merged(rows: Iterable[Talker]) -> list[Talker]:
    """The rows with one for each source: the kernel has a verdict of a group's source for each interface."""
    found: dict[tuple[str, str, str], Talker] = {}
    for row in rows:
        first = found.setdefault((row.segment, row.source, row.verdict), row)
        if first is not row:
            both = first._replace(rate=first.rate + row.rate, packets=first.packets + row.packets)
            found[row.segment, row.source, row.verdict] = both
    return list(found.values())
