"""Packets by segment, subscription and verdict: what the kernel's elements have counted, each packet once. Pure.

The counter of an element starts at 0 when the element is made, and ends with it. `PacketAccounting` keeps what
each element had counted at its last reading, and adds the difference at the next one. `Deletions` reports what an
element had counted when it was deleted. Sums and readings outlive a restart of the agent, so that elements that
exist by then are not counted twice, and what they counted in between is not lost.

If an element expires by itself, the packets between its last reading and its end are lost. So the elements that
are about to expire are deleted (`ExpiringKeys`). Like its expiry, that costs the source one question to a worker.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple, Protocol, TypeAlias

import msgspec

from portward.dataplane.names import (
    COUNTED_SETS,
    COUNTING_SETS,
    SEGMENT_SETS,
    VERDICT_SETS,
    KernelTable,
    LimitResult,
    NoVerdict,
    Verdict,
    unqualified,
)
from portward.dataplane.setdump import DeletedElement, SetRow
from portward.dataplane.verdict_cache import Source
from portward.ipc import mark

# An interface index or a mark in a key, in the byte order of the host.
_NUMBER: Final = struct.Struct("=I")
# The clocks of kernel and process drift, and a reading takes time.
_CLOCK_SLACK_S: Final = 0.5
# A reading of this many elements or fewer fits into one message, and misses none.
_SNAPSHOT_ELEMENTS: Final = 32
# An element is deleted if less than this much time is left when the next reading begins.
_EXPIRY_MARGIN_S: Final = 1.5
# Expiring elements that are deleted after one reading. With a reading each second that is enough for 120,000
# sources per minute.
_MAX_EXPIRING: Final = 2_000
# How long the sums of a deleted subscription or segment stay, so that a scrape sees the last ones.
GRACE_S: Final = 900.0

# The names of verdicts in metrics, in `status` and in the saved file. They never change.
NAMES: Final[dict[Verdict, str]] = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.REFUSED: "reject",
    mark.Class.OBSERVED: "would_deny",
    mark.Class.UNKNOWN: "unknown",
    mark.Class.ANSWER: "deferred",
    LimitResult.WITHIN: "rated",
    LimitResult.OVER: "throttled",
    NoVerdict.DROPPED: "unjudged",
    NoVerdict.PASSED: "unjudged_passed",
}
_VERDICT_OF_SET: Final[dict[str, Verdict]] = {
    table.qualified(name): verdict
    for table in KernelTable
    for name, verdict in (
        *((f"{name}{family}", verdict) for verdict, name in COUNTED_SETS.items() for family in "46"),
        *((name, verdict) for verdict, name in SEGMENT_SETS.items()),
    )
}
# Elements of these sets expire while packets still find them. A packet extends the time of all other elements.
_EXPIRING_SETS: Final = frozenset(
    table.qualified(name)
    for table in KernelTable
    for name in COUNTING_SETS & {f"{name}{family}" for name in VERDICT_SETS.values() for family in "46"}
)

# The packets of an element at its last reading, and its expiry by the monotonic clock in seconds. A plain tuple,
# because each reading makes up to 262,144 of them for each set.
_Reading: TypeAlias = tuple[int, float]
# Qualified name of a set → keys of elements that are about to expire.
ExpiringKeys: TypeAlias = dict[str, list[bytes]]


class DeletionLog(Protocol):
    """The part of `Deletions` that `PacketAccounting` uses."""

    # Set → number of elements at the last reading.
    sizes: dict[str, int]

    def take(self) -> list[DeletedElement] | None:
        """The elements that were deleted since the last call; None if the kernel thread is busy."""


class SourceOwner(NamedTuple):
    """The segment's name, and the subscription's id as text (empty: unknown)."""

    segment: str
    subscription: str


class SavedCounts(msgspec.Struct, array_like=True):
    """The content of the file that outlives a restart. A sum is (segment or subscription, verdict, packets).
    `readings` is qualified name of a set → key of the element → (packets, expiry by the monotonic clock in
    seconds). `kernel` names the boot and the network namespace: in any other one the elements are different ones.
    `since` is the beginning of the sums in seconds since 1970."""

    kernel: str
    since: float
    segments: list[tuple[str, str, int]]
    subscriptions: list[tuple[str, str, int]]
    readings: dict[str, dict[bytes, _Reading]]


class PacketAccounting:
    """Sums of packets, by segment and verdict, and by subscription and verdict. They never fall. For one
    thread."""

    def __init__(
        self,
        owner: Callable[[Source], SourceOwner | None],
        deletions: DeletionLog,
        tables: Collection[KernelTable] = (KernelTable.INET,),
    ) -> None:
        """`owner` returns the owner of a source; None if it is not in the policy table any more. `tables` are
        those that are loaded: a packet is counted in one of them."""
        self._owner, self._deletions = owner, deletions
        self._readings: dict[str, dict[bytes, _Reading]] = {
            table.qualified(name): {} for table in tables for name in COUNTING_SETS
        }
        # Interface index → segment, for packets that are counted when the interface is gone.
        self._segment_names: dict[int, str] = {}
        self.segments: Counter[tuple[str, str]] = Counter()
        self.subscriptions: Counter[tuple[str, str]] = Counter()
        # (whether it is a segment, name) → when packets were last added, by the monotonic clock.
        self._last_added: dict[tuple[bool, str], float] = {}
        self._now = 0.0
        self.since = 0.0
        # Whether anything has changed since the last `saved`.
        self.changed = False

    def take_all(self, rows: Callable[[str], list[SetRow]], now: float, pause: float) -> ExpiringKeys | None:
        """Reads all sets with `rows`, which takes qualified names, and adds what they have counted. `now` is the
        monotonic time in seconds, and `pause` the seconds until the next reading begins. Returns the elements that
        expire before its end. Returns None if the kernel thread was busy: then nothing was read. Raises OSError if
        the sets cannot be read.

        An element that is deleted during the reading was counted until its deletion. Its row may be of the old
        element or of a new one, so it is skipped; the next reading has all that the new one has counted."""
        before = self._deletions.take()
        if before is None:
            return None
        self._now = now
        self._add_deleted(before)
        found = {name: rows(name) for name in self._readings}
        self._deletions.sizes.update({name: len(part) for name, part in found.items()})
        meanwhile = self._deletions.take()
        if meanwhile is None:
            # Some rows may be of deleted elements, so none can be used. The deletions before are added already.
            return None
        deleted: dict[str, set[bytes]] = {}
        for one in meanwhile:
            deleted.setdefault(one.set, set()).add(one.key)
        expiring: ExpiringKeys = {}
        for name, part in found.items():
            skipped = deleted.get(name, set())
            if b"" in skipped:
                continue
            self._add_reading(name, part, skipped)
            if name in _EXPIRING_SETS and (keys := _expiring(part, skipped, pause + _EXPIRY_MARGIN_S)):
                expiring[name] = keys
        self._add_deleted(meanwhile)
        return _at_most(_MAX_EXPIRING, expiring)

    def take_deleted(self) -> None:
        """Adds what was deleted since the last reading, without a new reading."""
        self._add_deleted(self._deletions.take() or ())

    def _add_reading(self, name: str, rows: list[SetRow], skipped: set[bytes]) -> None:
        readings, now = self._readings[name], self._now
        present: dict[bytes, _Reading] = {}
        for key, packets, expires_ms in rows:
            if key in skipped:
                continue
            # A reading of more than one message may have an element twice.
            before = present.get(key) or readings.get(key)
            # If the element should have expired, or counts less than before, it is a new one with the same key.
            if before is not None and packets >= before[0] and now < before[1] + _CLOCK_SLACK_S:
                added = packets - before[0]
            else:
                added = packets
            present[key] = packets, now + expires_ms / 1000
            if added:
                self._add(name, key, added)
        if len(rows) > _SNAPSHOT_ELEMENTS or skipped:
            # A reading of more than one message may miss elements that still exist.
            for key in readings.keys() - present.keys():
                if readings[key][1] > now:
                    present[key] = readings[key]
        self.changed |= present.keys() != readings.keys()
        self._readings[name] = present

    def _add_deleted(self, deleted: Iterable[DeletedElement]) -> None:
        for name, key, packets in deleted:
            if name not in self._readings:
                continue
            if not key:
                self.changed |= bool(self._readings[name])
                self._readings[name].clear()
                continue
            before = self._readings[name].pop(key, None)
            if packets:
                # An element that has counted less than at the last reading is a new one with the same key.
                known = before[0] if before is not None and packets >= before[0] else 0
                self._add(name, key, packets - known)

    def _add(self, name: str, key: bytes, packets: int) -> None:
        """Adds packets of an element to the sums of its segment and its subscription."""
        self.changed = True
        if not packets:
            return
        verdict = _VERDICT_OF_SET.get(name)
        if verdict is None:  # a set of uncached verdicts: the key ends with the mark
            verdict, key = _verdict_of(_NUMBER.unpack(key[-_NUMBER.size :])[0]), key[: -_NUMBER.size]
        owner = self._owner_of(key)
        self.segments[owner.segment, NAMES[verdict]] += packets
        self.subscriptions[owner.subscription, NAMES[verdict]] += packets
        self._last_added[True, owner.segment] = self._last_added[False, owner.subscription] = self._now

    def _owner_of(self, key: bytes) -> SourceOwner:
        """The owner of a key: an interface index, and an address unless the set counts by segment."""
        index, address = _NUMBER.unpack_from(key)[0], key[_NUMBER.size :]
        # Without an address only the segment counts, so any address does.
        owner = self._owner(Source(index, address or bytes(4)))
        if owner is None:
            return SourceOwner(self._segment_names.get(index, ""), "")
        self._segment_names[index] = owner.segment
        return owner if address else SourceOwner(owner.segment, "")

    # --- what outlives a restart ---

    def saved(self, kernel: str) -> bytes:
        """Sums and readings for the next agent, as `restore` reads them."""
        self.changed = False
        return msgspec.msgpack.encode(
            SavedCounts(kernel, self.since, _listed(self.segments), _listed(self.subscriptions), self._readings)
        )

    def restore(self, data: bytes, kernel: str, now: float) -> None:
        """Continues from the result of `saved`. Raises msgspec.MsgspecError if `data` is something else."""
        saved = msgspec.msgpack.decode(data, type=SavedCounts)
        self.since = saved.since
        for sums, rows in ((self.segments, saved.segments), (self.subscriptions, saved.subscriptions)):
            sums.update({(name, verdict): packets for name, verdict, packets in rows})
        self._last_added = {(True, name): now for name, _, _ in saved.segments}
        self._last_added |= {(False, name): now for name, _, _ in saved.subscriptions}
        if saved.kernel == kernel:
            self._readings |= {name: part for name, part in saved.readings.items() if name in self._readings}
            self._deletions.sizes.update({name: len(part) for name, part in self._readings.items()})

    def discard_readings(self, table: KernelTable = KernelTable.INET) -> None:
        """Takes note that no element that the last reading found in a table exists any more."""
        for name, part in self._readings.items():
            if unqualified(name)[0] is table:
                part.clear()

    def prune(self, now: float, segment: Callable[[str], bool], subscription: Callable[[str], bool]) -> None:
        """Deletes the sums of segments and subscriptions to which nothing was added for `GRACE_S`, and that do not
        exist any more. `segment` and `subscription` return whether one exists."""
        # A new interface has a new index, so only the indexes of elements that still exist are needed.
        needed = {_NUMBER.unpack_from(key)[0] for part in self._readings.values() for key in part}
        self._segment_names = {index: name for index, name in self._segment_names.items() if index in needed}
        for (of_segment, name), last in [*self._last_added.items()]:
            if now - last < GRACE_S or not name or (segment if of_segment else subscription)(name):
                continue
            sums = self.segments if of_segment else self.subscriptions
            for verdict in NAMES.values():
                sums.pop((name, verdict), None)
            del self._last_added[of_segment, name]
            self.changed = True


class LimitedPackets:
    """Packets over a miss limit, by segment. The kernel counts them for an interface, and forgets a count after an
    hour without such a packet. A sum never falls while an interface of its segment has a count."""

    def __init__(self) -> None:
        self.segments: Counter[str] = Counter()
        # Interface index → its count at the last reading, and the segment to which it was added.
        self._counts: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def take(self, counts: dict[int, int], names: Mapping[int, str]) -> None:
        """Adds a reading (interface index → packets). `names`: index → segment. Packets of an interface that is
        gone stay with the segment that it belonged to; if that is not known, they have its index as the name."""
        self._names = {index: names.get(index) or self._names.get(index) or str(index) for index in counts}
        for index, packets in counts.items():
            risen = packets - self._counts.get(index, 0)
            # An element that counts less than before is a new one.
            self.segments[self._names[index]] += risen if risen >= 0 else packets
        self._counts = counts
        for name in self.segments.keys() - set(self._names.values()):
            del self.segments[name]


def _expiring(rows: list[SetRow], skipped: set[bytes], seconds: float) -> list[bytes]:
    """The keys of rows that expire within this time; 0 milliseconds means never."""
    return [key for key, _, expires_ms in rows if 0 < expires_ms < seconds * 1000 and key not in skipped]


def _at_most(limit: int, expiring: ExpiringKeys) -> ExpiringKeys:
    room, some = limit, ExpiringKeys()
    for name, keys in expiring.items():
        if room > 0:
            some[name] = keys[:room]
            room -= len(keys)
    return some


def _verdict_of(mark_: int) -> Verdict:
    """The verdict of a mark as chain `uncached` writes it into a key."""
    try:
        found = mark.Class(mark_ & mark.CLASS)
    except ValueError:
        return NoVerdict.DROPPED
    return found if found in NAMES else NoVerdict.DROPPED


def _listed(sums: Mapping[tuple[str, str], int]) -> list[tuple[str, str, int]]:
    return [(name, verdict, packets) for (name, verdict), packets in sums.items()]
