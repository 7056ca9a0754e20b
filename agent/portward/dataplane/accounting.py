"""Packets by segment, subscription and verdict: what the kernel's elements have counted, each packet once.

An element's counter starts at nothing when it is made and ends with it. `PacketAccounting` keeps what each element
had counted when it was last read (its reading), and adds up what it has risen by since. `deletions` says what it
had counted when it was deleted. The readings outlive a restart of the agent, with the sums, so that the elements
that are there then are not counted a second time, and what they counted meanwhile is.

Not seen are the packets that an element counts between its last reading and its end if it expires by itself. So
those that are about to expire are deleted (`ExpiringKeys`), which costs the source a question, as its end does.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias

import msgspec

from portward.dataplane.deletions import Deletions, Gone
from portward.dataplane.ruleset import (
    COUNTED_SETS,
    COUNTING_SETS,
    SEGMENT_SETS,
    VERDICT_SETS,
    LimitResult,
    NoVerdict,
    Verdict,
)
from portward.dataplane.setdump import SetRow
from portward.dataplane.verdict_cache import Source
from portward.ipc import mark

_INDEX: Final = struct.Struct("=I")
# Clocks of kernel and process drift, and a reading takes time: seconds.
_SLACK: Final = 0.5
# A reading of no more elements than this fits into one message, and misses none.
_ONE_MESSAGE: Final = 32
# An element is deleted if less than this many seconds are left when the next reading begins.
_MARGIN_S: Final = 1.5
# Elements that are deleted after one reading since they are about to expire: those of 120,000 sources a minute.
_DUE: Final = 2_000
# How long the numbers of a subscription or segment that is gone stay, in seconds: scrapes must see the last ones.
GRACE_S: Final = 900.0

# How verdicts are called in metrics, status and in the file that outlives a restart: none gets another name.
NAMES: Final[dict[Verdict, str]] = {
    mark.Class.ALLOW: "allow",
    mark.Class.DENY: "deny",
    mark.Class.REFUSED: "reject",
    mark.Class.OBSERVED: "would_deny",
    mark.Class.UNKNOWN: "unknown",
    mark.Class.MISS: "deferred",
    LimitResult.WITHIN: "rated",
    LimitResult.OVER: "throttled",
    NoVerdict.DROPPED: "unjudged",
    NoVerdict.PASSED: "unjudged_passed",
}
_OF_SET: Final[dict[str, Verdict]] = {
    **{f"{name}{family}": verdict for verdict, name in COUNTED_SETS.items() for family in "46"},
    **{name: verdict for verdict, name in SEGMENT_SETS.items()},
}
# Only these end by time while packets find them: the others begin anew with each packet.
_ENDING: Final = tuple(
    sorted(COUNTING_SETS & {f"{name}{family}" for name in VERDICT_SETS.values() for family in "46"})
)

# Set → keys of elements that are about to expire.
ExpiringKeys: TypeAlias = dict[str, list[bytes]]


class Owner(NamedTuple):
    """Whose a source is: the segment's name, and the subscription's id as text, empty where unknown."""

    segment: str
    subscription: str


class Kept(msgspec.Struct, array_like=True):
    """What outlives a restart: sums by (segment or subscription, verdict), and readings by set: element's key →
    packets, and its end by the monotonic clock. `kernel` says in which one these elements are: another boot or
    network namespace has others. `since` is when the sums began, in seconds since 1970."""

    kernel: str
    since: float
    segments: list[tuple[str, str, int]]
    subscriptions: list[tuple[str, str, int]]
    readings: dict[str, dict[bytes, tuple[int, float]]]


class PacketAccounting:
    """Sums that only rise, in packets: by segment and verdict, and by subscription and verdict. For one thread."""

    def __init__(self, owner: Callable[[Source], Owner | None], deletions: Deletions) -> None:
        """`owner` gives whose a source is; None for one that nobody knows any more."""
        self._owner, self._deletions = owner, deletions
        self._readings: dict[str, dict[bytes, tuple[int, float]]] = {name: {} for name in COUNTING_SETS}
        # Interface index → segment, for what is left to count when an interface is gone.
        self._names: dict[int, str] = {}
        self.segments: Counter[tuple[str, str]] = Counter()
        self.subscriptions: Counter[tuple[str, str]] = Counter()
        # When each name was last counted for, by the monotonic clock.
        self._last: dict[tuple[bool, str], float] = {}
        self._now = 0.0
        self.since = 0.0
        # Whether there is anything that `kept` has not given yet.
        self.changed = False

    def take_all(self, rows: Callable[[str], list[SetRow]], now: float, pause: float) -> ExpiringKeys | None:
        """Takes a reading of all sets, by `rows`; `now` is the monotonic time, and `pause` how long it takes until
        the next one begins, both in seconds. Gives what would expire before that has ended; None if the kernel
        thread was busy, and then nothing was read. Raises OSError if the sets cannot be read.

        What is deleted meanwhile was counted until its end. Its row may be of the old element or of a new one, so
        it is left out: the next reading finds all that a new one has counted."""
        before = self._deletions.take()
        if before is None:
            return None
        self._now = now
        self._end(before)
        found = {name: rows(name) for name in COUNTING_SETS}
        self._deletions.sizes.update({name: len(part) for name, part in found.items()})
        meanwhile = self._deletions.take()
        if meanwhile is None:
            # The rows are of no use, and what was taken before has been counted.
            return None
        gone: dict[str, set[bytes]] = {}
        for one in meanwhile:
            gone.setdefault(one.set, set()).add(one.key)
        due: ExpiringKeys = {}
        for name, part in found.items():
            left_out = gone.get(name, set())
            if b"" in left_out:
                continue
            self._take(name, part, left_out)
            if name in _ENDING and (ending := self._due(part, left_out, pause + _MARGIN_S)):
                due[name] = ending
        self._end(meanwhile)
        return _some(due)

    def take_deleted(self) -> None:
        """PacketAccounting what was deleted since the last reading, without another one."""
        self._end(self._deletions.take() or ())

    def _take(self, name: str, rows: list[SetRow], left_out: set[bytes]) -> None:
        readings, now = self._readings[name], self._now
        present: dict[bytes, tuple[int, float]] = {}
        for key, packets, expires_ms in rows:
            if key in left_out:
                continue
            # A longer reading may give an element twice, too.
            before = present.get(key) or readings.get(key)
            # An element that should have ended since is another one, made anew; so is one that counts less.
            if before is not None and packets >= before[0] and now < before[1] + _SLACK:
                risen = packets - before[0]
            else:
                risen = packets
            present[key] = packets, now + expires_ms / 1000
            if risen:
                self._add(name, key, risen)
        if len(rows) > _ONE_MESSAGE or left_out:
            # A longer reading may miss elements that are there.
            for key in readings.keys() - present.keys():
                if readings[key][1] > now:
                    present[key] = readings[key]
        self.changed |= present.keys() != readings.keys()
        self._readings[name] = present

    def _due(self, rows: list[SetRow], left_out: set[bytes], seconds: float) -> list[bytes]:
        return [key for key, _, expires_ms in rows if 0 < expires_ms < seconds * 1000 and key not in left_out]

    def _end(self, gone: Iterable[Gone]) -> None:
        """PacketAccounting what deleted elements had counted at their end."""
        for name, key, packets in gone:
            if name not in self._readings:
                continue
            if not key:
                self.changed |= bool(self._readings[name])
                self._readings[name].clear()
                continue
            before = self._readings[name].pop(key, None)
            if packets:
                # One that has counted less is another element, made since.
                risen = packets - before[0] if before is not None and packets >= before[0] else packets
                self._add(name, key, risen)

    def _add(self, name: str, key: bytes, packets: int) -> None:
        """PacketAccounting packets of an element for whom they are."""
        self.changed = True
        if not packets:
            return
        verdict = _OF_SET.get(name)
        if verdict is None:  # the mark that ends the key says it
            verdict, key = _verdict(_INDEX.unpack(key[-4:])[0]), key[:-4]
        owner = self._whose(key)
        self.segments[owner.segment, NAMES[verdict]] += packets
        self.subscriptions[owner.subscription, NAMES[verdict]] += packets
        self._last[True, owner.segment] = self._last[False, owner.subscription] = self._now

    def _whose(self, key: bytes) -> Owner:
        index = _INDEX.unpack_from(key)[0]
        # Where only the segment is asked for, any address does.
        owner = self._owner(Source(index, key[4:] or bytes(4)))
        if owner is None:
            return Owner(self._names.get(index, ""), "")
        self._names[index] = owner.segment
        return owner if len(key) > 4 else Owner(owner.segment, "")

    # --- what outlives a restart ---

    def kept(self, kernel: str) -> bytes:
        """All that the next agent needs to go on."""
        self.changed = False
        return msgspec.msgpack.encode(
            Kept(kernel, self.since, _listed(self.segments), _listed(self.subscriptions), self._readings)
        )

    def go_on(self, data: bytes, kernel: str, now: float) -> None:
        """Goes on from what `kept` gave. Raises msgspec's errors for what is something else."""
        kept = msgspec.msgpack.decode(data, type=Kept)
        self.since = kept.since
        for sums, rows in ((self.segments, kept.segments), (self.subscriptions, kept.subscriptions)):
            sums.update({(name, verdict): packets for name, verdict, packets in rows})
        self._last = {(True, name): now for name, _, _ in kept.segments}
        self._last |= {(False, name): now for name, _, _ in kept.subscriptions}
        if kept.kernel == kernel:
            self._readings |= {name: part for name, part in kept.readings.items() if name in COUNTING_SETS}
            self._deletions.sizes.update({name: len(part) for name, part in self._readings.items()})

    def begin_anew(self) -> None:
        """No element that was read before is there any more."""
        for part in self._readings.values():
            part.clear()

    def prune(self, now: float, segment: Callable[[str], bool], subscription: Callable[[str], bool]) -> None:
        """Lets go of the numbers of segments and subscriptions that are gone, by these, and that nothing was
        counted for since `GRACE_S`."""
        # Each interface that comes has another index: only those of elements that are left are of use.
        left = {_INDEX.unpack_from(key)[0] for part in self._readings.values() for key in part}
        self._names = {index: name for index, name in self._names.items() if index in left}
        for (of_segment, name), last in [*self._last.items()]:
            if now - last < GRACE_S or not name or (segment if of_segment else subscription)(name):
                continue
            sums = self.segments if of_segment else self.subscriptions
            for verdict in NAMES.values():
                sums.pop((name, verdict), None)
            del self._last[of_segment, name]
            self.changed = True


def _some(due: ExpiringKeys) -> ExpiringKeys:
    """At most `_DUE` of these elements."""
    room, some = _DUE, ExpiringKeys()
    for name, keys in due.items():
        if room > 0:
            some[name] = keys[:room]
            room -= len(keys)
    return some


def _verdict(mark_: int) -> Verdict:
    """The verdict that a mark says, as `uncached` has it."""
    try:
        found = mark.Class(mark_ & mark.CLASS)
    except ValueError:
        return NoVerdict.DROPPED
    return found if found in NAMES else NoVerdict.DROPPED


def _listed(sums: Mapping[tuple[str, str], int]) -> list[tuple[str, str, int]]:
    return [(name, verdict, packets) for (name, verdict), packets in sums.items()]
