"""The limits of exempt subscriptions in the kernel: so many new connections a minute, for all sources together.

A limit is a named object of the ruleset, the token bucket of one subscription; a map says which sources draw on
it. Packets cannot learn that by themselves, as they learn verdicts: the map's values are not theirs to write. So
the worker drops the first packet of a source with a limit and asks the daemon, which looks it up in the table as
it is then, on the thread on which no change of policy can come between, and writes source and limit. Until the
sender has tried again, a second later, its source is known.

Elements have no lifetime and nobody else writes them: what is in the kernel is what is held here. They are taken
away where a change of policy forgets the source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from errno import EAGAIN
from itertools import islice
from typing import Final, NamedTuple

from portward.dataplane.elements import AddLimit, Change, Delete, DeleteLimit, Draw, Elements
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.ruleset import RATE_LIMITS
from portward.dataplane.verdict_cache import Source
from portward.model import RateLimit

# Sources of one subscription, and of all: with another one, the oldest goes. So nobody with a large prefix fills
# the map, and who comes last finds room.
_SOURCES: Final = 4_096
_ALL_SOURCES: Final = 260_000
_READINGS: Final = 5
_NAME: Final = re.compile(r"s(\d+)-(\d+)-(\d+)")


class Bucket(NamedTuple):
    """A limit as the kernel holds it: of a subscription (the table's number), new connections a minute and at
    once."""

    subscription: int
    per_minute: int
    burst: int

    @classmethod
    def of(cls, subscription: int, limit: RateLimit) -> Bucket:
        """The bucket of a subscription with this limit."""
        return cls(subscription, limit.per_minute, limit.burst)

    @classmethod
    def named(cls, name: str) -> Bucket | None:
        """The bucket with this name; None where it is none of ours."""
        found = _NAME.fullmatch(name)
        return cls(*map(int, found.groups())) if found else None

    def __str__(self) -> str:
        return f"s{self.subscription}-{self.per_minute}-{self.burst}"


class RateLimits:
    """The limits and their sources in the table of this network namespace."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        # In the order in which they were added.
        self._sources: dict[Bucket, dict[Source, None]] = {}
        self._bucket: dict[Source, Bucket] = {}
        # By the digit of the family: the same sources by their keys in the kernel.
        self._keys: dict[str, dict[bytes, Source]] = {"4": {}, "6": {}}

    def reload(self) -> None:
        """Holds from now on what the kernel has: an earlier run left it there, or somebody has changed it. Raises
        OSError where the table is not loaded."""
        loaded: dict[Bucket, dict[Source, None]] = {
            bucket: {} for name in self._elements.limits() if (bucket := Bucket.named(name)) is not None
        }
        held = self._settled()
        for source, bucket in held.items():
            loaded.setdefault(bucket, {})[source] = None
        self._sources, self._bucket = loaded, held
        self._keys = {family: {s.key: s for s in held if s.family == family} for family in "46"}

    def _settled(self) -> dict[Source, Bucket]:
        """What two readings in a row agree on. A single one may miss sources (see `elements`), and one that is in
        the kernel and not held here would not be taken away by a change of policy."""
        held = self.sources_in_kernel(self._elements)
        for _ in range(_READINGS):
            before, held = held, self.sources_in_kernel(self._elements)
            if held == before:
                return held
        raise OSError(EAGAIN, "the limits in the kernel change faster than they can be read")

    @staticmethod
    def sources_in_kernel(elements: Elements) -> dict[Source, Bucket]:
        """What the kernel has, over a socket of the calling thread's own; raises OSError."""
        return {
            Source.of(element.key): bucket
            for family in "46"
            for element in elements.elements(RATE_LIMITS + family)
            if (bucket := Bucket.named(element.object)) is not None
        }

    def equals(self, found: dict[Source, Bucket]) -> bool:
        """Whether just these sources are held, with these limits."""
        return found == self._bucket

    def bucket(self, source: Source) -> Bucket | None:
        """The limit that a source draws on."""
        return self._bucket.get(source)

    def add(self, wanted: dict[Source, Bucket]) -> None:
        """Lets these sources draw on these limits; raises KernelError, and then nothing has changed.
        Idempotent."""
        new = {source: bucket for source, bucket in wanted.items() if self._bucket.get(source) != bucket}
        new = _few(new)
        if not new:
            return
        crowded = self._crowded(new)
        gone = [source for source in (*new, *crowded) if source in self._bucket]
        changes: list[Change] = [
            AddLimit(str(bucket), bucket.per_minute, bucket.burst) for bucket in self._unknown(new)
        ]
        changes += _deletions(gone)
        for family in "46":
            limits = {source.key: str(bucket) for source, bucket in new.items() if source.family == family}
            if limits:
                changes.append(Draw(RATE_LIMITS + family, limits))
        self._elements.commit(changes)
        for source in gone:
            self._let_go(source)
        for source, bucket in new.items():
            self._hold(source, bucket)

    def recheck(self, sources: Iterable[Source]) -> None:
        """Looks in the kernel for those of these sources that are held: a worker has met them, so they may not be
        there any more, and then they are held no longer. Raises OSError."""
        for source in [source for source in sources if source in self._bucket]:
            if self._elements.element(RATE_LIMITS + source.family, source.key) is None:
                self._let_go(source)

    def deletions(self, sources: Iterable[Source]) -> list[Change]:
        """What takes those of these sources away that are held; `deleted` is to follow it."""
        return _deletions([source for source in sources if source in self._bucket])

    def deleted(self, sources: Iterable[Source]) -> None:
        """These sources were taken away."""
        for source in sources:
            if source in self._bucket:
                self._let_go(source)

    def all_deleted(self) -> None:
        """All sources were taken away; the limits are there still, with what was used of them."""
        self._bucket.clear()
        self._keys = {"4": {}, "6": {}}
        for sources in self._sources.values():
            sources.clear()

    def sources(self) -> Iterable[Source]:
        """All that draw on some limit."""
        return self._bucket.keys()

    def within(self, prefixes: Prefixes) -> list[Source]:
        """All of them that lie in these prefixes."""
        keys = self._keys
        return [keys[family][key] for family in "46" for key in prefixes.among(family, list(keys[family]))]

    def delete_unused(self, in_force: Callable[[Bucket], bool]) -> None:
        """Takes away limits on which no source draws and that are not in force any more; raises KernelError.
        Others stay: a new one would begin full."""
        idle = [bucket for bucket, sources in self._sources.items() if not sources and not in_force(bucket)]
        if idle:
            self._elements.commit([DeleteLimit(str(bucket)) for bucket in idle])
        for bucket in idle:
            del self._sources[bucket]

    def _unknown(self, new: dict[Source, Bucket]) -> list[Bucket]:
        return [bucket for bucket in dict.fromkeys(new.values()) if bucket not in self._sources]

    def _crowded(self, new: dict[Source, Bucket]) -> list[Source]:
        """The oldest sources of limits that would have too many, and the oldest of the largest where all would."""
        more = Counter(new.values())
        crowded: list[Source] = []
        for bucket, count in more.items():
            held = [source for source in self._sources.get(bucket, ()) if source not in new]
            crowded += held[: max(0, len(held) + count - _SOURCES)]
        excess = len(self._bucket) + len(new) - len(crowded) - _ALL_SOURCES
        if excess > 0:
            largest = max(self._sources, key=lambda bucket: len(self._sources[bucket]))
            gone = set(crowded)
            rest = (source for source in self._sources[largest] if source not in new and source not in gone)
            crowded += islice(rest, excess)
        return crowded

    def _hold(self, source: Source, bucket: Bucket) -> None:
        self._bucket[source] = bucket
        self._keys[source.family][source.key] = source
        self._sources.setdefault(bucket, {})[source] = None

    def _let_go(self, source: Source) -> None:
        del self._sources[self._bucket.pop(source)][source]
        del self._keys[source.family][source.key]


def _few(wanted: dict[Source, Bucket]) -> dict[Source, Bucket]:
    """The last sources of each limit, as many as it may have."""
    left: Counter[Bucket] = Counter()
    few = {}
    for source, bucket in reversed(wanted.items()):
        left[bucket] += 1
        if left[bucket] <= _SOURCES:
            few[source] = bucket
    return dict(reversed(few.items()))  # in the order given: the first one is the oldest


def _deletions(sources: list[Source]) -> list[Change]:
    changes: list[Change] = []
    for family in "46":
        keys = [source.key for source in sources if source.family == family]
        if keys:
            changes.append(Delete(RATE_LIMITS + family, keys))
    return changes
