"""The counting thread's work: it reads the kernel's counters for metrics and status.

It never writes the kernel. It returns the elements that are about to expire with their counters, and the kernel
thread deletes them (`Dataplane.delete_expiring`), because the kernel reports the last count of an element only on
a deletion.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec

from portward.base import clock
from portward.base.interfaces import shown
from portward.daemon.countsfile import CountsFile
from portward.dataplane.accounting import ExpiringKeys, LimitedPackets, PacketAccounting, SourceOwner
from portward.dataplane.deletions import Deletions
from portward.dataplane.names import (
    COUNTED_SETS,
    TABLE,
    VERDICT_SETS,
    KernelTable,
    LimitResult,
    Verdict,
    unqualified,
)
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.plane import Dataplane
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.selfcheck import SAMPLE_SOURCES
from portward.dataplane.setdump import SetRow
from portward.dataplane.sources import differs
from portward.dataplane.verdict_cache import Source, VerdictCache, element_of
from portward.ipc import mark
from portward.table.reader import Reader

_NETWORK: Final = Path("/proc/thread-self/ns/net")
# How often the sums of removed subscriptions and interfaces are dropped. They change rarely.
_PRUNE_S: Final = 60.0

_log = logging.getLogger("portward")


class Counting:
    """The counts of one gateway. Methods run on the counting thread, unless they say otherwise."""

    def __init__(
        self,
        folder: Path,
        netlink: NfNetlink,
        reader: Reader,
        deletions: Deletions,
        changes: Callable[[], int],
        tables: Collection[KernelTable] = (KernelTable.INET,),
    ) -> None:
        """Continues the counts of the agent before, from the file in `folder`.

        From now on only this thread may use `netlink` and `reader`. `changes` returns how many changes of policy
        the table has taken, because a change may give a subscription's number to another one. `tables` are those
        that the agent loads. Any thread.
        """
        self._netlink = netlink
        self._tables = {table: netlink.of(table) for table in tables}
        self._elements = {table: KernelElements(one) for table, one in self._tables.items()}
        self._reader, self._changes = reader, changes
        self._file, self._kernel = CountsFile(folder), _this_kernel()
        self._unsaved = ""
        self.counts = PacketAccounting(self._owner, deletions, tables)
        self.cached_sources: Counter[Verdict] = Counter()
        # When the elements were last read (monotonic, s); None: not yet.
        self.read: float | None = None
        self._latest: dict[str, list[SetRow]] = {}
        self._sample: list[tuple[str, SetRow]] = []
        self._subscriptions: tuple[int, dict[int, str]] = 0, {}
        self._pruned = time.monotonic()
        self._limited = LimitedPackets()
        self._continue()

    def close(self) -> None:
        """Closes the socket. To be called when the thread has ended."""
        self._netlink.close()

    def end(self) -> None:
        """Counts and saves what was deleted since the last reading; to be called when nothing is deleted any more.
        The kernel reports a deletion only once, so the next agent could not count it."""
        try:
            self.counts.take_deleted()
            self._save()
        except Exception:  # no error here may keep the agent from ending in order
            _log.exception("the elements deleted last are not counted")

    def _continue(self) -> None:
        self.counts.since = clock.utc_now().timestamp()
        data = self._file.load()
        if data is not None:
            try:
                self.counts.restore(data, self._kernel, time.monotonic())
            except (msgspec.MsgspecError, ValueError) as error:
                _log.warning("the counters of the last run cannot be read, and begin anew: %s", error)

    def count(self, dataplane: Dataplane, pause: float) -> ExpiringKeys | None:
        """Adds what the kernel has counted since the last call; does nothing if no ruleset is loaded. The next
        call is in `pause` seconds; returns the elements that would expire before it."""
        due = None
        with contextlib.suppress(OSError):
            now = time.monotonic()
            due = self.counts.take_all(self._rows, now, pause)
            if due is not None:
                self.read = now
                self._take_sizes(dataplane)
        if time.monotonic() - self._pruned > _PRUNE_S:
            self._prune()
        self._save()
        return due

    def suspects(self) -> list[Source]:
        """The sources in the sample whose cached verdict differs from the table's. A change of policy that is on
        its way to the kernel causes differences, too, so `Dataplane.correct` checks them again."""
        sample = [element_of(unqualified(name)[1], row) for name, row in self._sample]
        return [element.source for element in sample if differs(self._reader, element)]

    def _rows(self, name: str) -> list[SetRow]:
        table, set_ = unqualified(name)
        rows = self._latest[name] = self._elements[table].rows(set_)
        return rows

    def _take_sizes(self, dataplane: Dataplane) -> None:
        """Counts the cached verdicts, and takes a sample of them. A verdict that wrongly lets packets pass is the
        worse error, and such verdicts are fewer. So half of the sample are verdicts that let packets pass."""
        sources, sample = Counter[Verdict](), list[tuple[str, SetRow]]()
        for one in dataplane.tables:
            # An element that counts under a limit stays for a minute after the limit was removed.
            limited = one.rate_limits_seen = RateLimits.sources_in_kernel(self._elements[one.table])
            found = {
                one.table.qualified(f"{name}{family}"): verdict
                for verdict, name in COUNTED_SETS.items()
                for family in "46"
            }
            rows = {name: self._latest[name] if name in self._latest else self._rows(name) for name in found}
            one.cache.sizes.update({unqualified(name)[1]: len(part) for name, part in rows.items()})
            for name, part in rows.items():
                rated = isinstance(found[name], LimitResult)
                number = sum(Source.of(key) in limited for key, _, _ in part) if rated else len(part)
                sources[found[name]] += number
            passing = [name for name in rows if found[name] in mark.PASSING]
            stopping = [name for name in rows if found[name] in VERDICT_SETS and found[name] not in mark.PASSING]
            sample += [*_some(rows, passing), *_some(rows, stopping)]
        self._latest, self.cached_sources, self._sample = {}, sources, sample

    def _prune(self) -> None:
        self._pruned = time.monotonic()
        segments = {shown(link.name) for link in self._reader.links().values()}
        self.counts.prune(self._pruned, segments.__contains__, self._has)

    def _has(self, id_: str) -> bool:
        return self._reader.account_of(UUID(id_)) is not None

    def _save(self) -> None:
        if not self.counts.changed:
            return
        try:
            self._file.save(self.counts.saved(self._kernel))
            self._unsaved = ""
        except OSError as error:
            if str(error) != self._unsaved:
                _log.warning("the counters cannot be saved, and a restart will miss some packets: %s", error)
            self._unsaved = str(error)
            self.counts.changed = True  # so that it is retried even if nothing is counted meanwhile

    def age(self) -> float:
        """Seconds since the kernel's counters were last read."""
        return float("inf") if self.read is None else time.monotonic() - self.read

    def limited(self, names: dict[int, str]) -> dict[str, int]:
        """Packets refused beyond a segment's rate, by segment. `names`: interface index → the segment's name, or
        that of an interface that is no segment any more."""
        with contextlib.suppress(OSError):
            counts: Counter[int] = Counter()
            for elements in self._elements.values():
                counts.update(VerdictCache(elements).over_miss_limit())
            self._limited.take(counts, names)
        return {shown(name): packets for name, packets in self._limited.segments.items()}

    def screen(self) -> dict[str, int]:
        """The named counters of the ruleset: packets in both tables together. Empty if a table is missing, because
        those of the other one would look like counters that fall."""
        found: Counter[str] = Counter()
        with contextlib.suppress(OSError):
            for netlink in self._tables.values():
                if not (counters := netlink.counters(TABLE)):
                    return {}
                found.update(counters)
            return dict(found)
        return {}

    def sizes(self) -> tuple[int, int]:
        """The numbers of attachments and of subscriptions in the table."""
        return self._reader.counts()

    def _owner(self, source: Source) -> SourceOwner | None:
        found = self._reader.owner(source.link, source.address)
        if found is None:
            return None
        link, entry = found
        return SourceOwner(shown(link.name), "" if entry is None else self._subscription(entry.subscription))

    def _subscription(self, number: int) -> str:
        changes, names = self._subscriptions
        if changes != self._changes():
            self._subscriptions = self._changes(), (names := {})
        name = names.get(number)
        if name is None:
            account = self._reader.account(number)
            name = names[number] = "" if account is None else str(account.id)
        return name


def _some(rows: dict[str, list[SetRow]], names: list[str]) -> list[tuple[str, SetRow]]:
    """A random sample of the rows of these sets."""
    every = [(name, row) for name in names for row in rows[name]]
    return random.sample(every, min(len(every), SAMPLE_SOURCES))


def _this_kernel() -> str:
    """A text that identifies this boot and this network namespace. Counters of another one are not continued."""
    return f"{clock.boot()} {_NETWORK.stat().st_ino}"
