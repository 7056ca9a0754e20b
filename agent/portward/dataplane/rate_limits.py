"""The rate limits of exempt subscriptions in the kernel: new connections per minute of all sources together. Pure.

A limit is a named object of the ruleset: the token bucket of one subscription. A map holds which sources draw on
it. A packet cannot write that map itself, as it writes its source into a verdict set, because a rule cannot write
the names of objects. So the worker drops the first packet of a source with a limit and asks the daemon. The
daemon looks the source up on the kernel thread, so that no change of policy can come between the lookup and the
write, and writes source and limit. One second later the sender tries again, and its source is in the map.

These elements have no lifetime, and only the agent writes them. So `RateLimits` holds a copy of what is in the
kernel. A change of policy that forgets a source deletes its element.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from errno import EAGAIN
from itertools import islice
from typing import Final, NamedTuple

from portward.dataplane.elements import AddLimit, Change, Delete, DeleteLimit, Draw, Elements
from portward.dataplane.names import RATE_LIMITS
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.verdict_cache import Source
from portward.model import RateLimit

# With one more source of a subscription its oldest source is deleted. So no subscription with a large prefix can
# fill the map.
_MAX_SOURCES_PER_LIMIT: Final = 4_096
# Just below the size of each map in portward.nft (262,144): a new source always finds room.
_MAX_SOURCES: Final = 260_000
_MAX_READINGS: Final = 5
_NAME: Final = re.compile(r"s(\d+)-(\d+)-(\d+)")


class Bucket(NamedTuple):
    """A limit as it is in the kernel: the subscription's number in the policy table, new connections per minute,
    and new connections at once."""

    subscription: int
    per_minute: int
    burst: int

    @classmethod
    def of(cls, subscription: int, limit: RateLimit) -> Bucket:
        """The bucket of a subscription with this limit."""
        return cls(subscription, limit.per_minute, limit.burst)

    @classmethod
    def named(cls, name: str) -> Bucket | None:
        """The bucket with this name; None if another program has chosen the name."""
        found = _NAME.fullmatch(name)
        return cls(*map(int, found.groups())) if found else None

    def __str__(self) -> str:
        return f"s{self.subscription}-{self.per_minute}-{self.burst}"


class RateLimits:
    """The limits of one network namespace, and the sources that draw on them. For one thread."""

    def __init__(self, elements: Elements) -> None:
        self._elements = elements
        # Sources in the order in which they were added.
        self._sources: dict[Bucket, dict[Source, None]] = {}
        self._bucket: dict[Source, Bucket] = {}
        # Digit of the family → key in the kernel → the same sources.
        self._keys: dict[str, dict[bytes, Source]] = {"4": {}, "6": {}}

    def reload(self) -> None:
        """Reads from the kernel what an earlier run has left there, or another program has changed. Raises OSError
        if the table is not loaded."""
        loaded: dict[Bucket, dict[Source, None]] = {
            bucket: {} for name in self._elements.limits() if (bucket := Bucket.named(name)) is not None
        }
        drawing = self._stable_reading()
        for source, bucket in drawing.items():
            loaded.setdefault(bucket, {})[source] = None
        self._sources, self._bucket = loaded, drawing
        self._keys = {family: {s.key: s for s in drawing if s.family == family} for family in "46"}

    def _stable_reading(self) -> dict[Source, Bucket]:
        """The result on which two readings in a row agree. A single reading may miss sources (see `elements`), and
        a change of policy would not delete a source that is in the kernel but not in this object."""
        found = self.sources_in_kernel(self._elements)
        for _ in range(_MAX_READINGS):
            before, found = found, self.sources_in_kernel(self._elements)
            if found == before:
                return found
        raise OSError(EAGAIN, "the limits in the kernel change faster than they can be read")

    @staticmethod
    def sources_in_kernel(elements: Elements) -> dict[Source, Bucket]:
        """The sources in the kernel and their limits. May be called on any thread with its own `elements`. Raises
        OSError."""
        return {
            Source.of(element.key): bucket
            for family in "46"
            for element in elements.elements(RATE_LIMITS + family)
            if (bucket := Bucket.named(element.object)) is not None
        }

    def equals(self, found: dict[Source, Bucket]) -> bool:
        """Whether exactly these sources draw on these limits."""
        return found == self._bucket

    def bucket(self, source: Source) -> Bucket | None:
        """The limit that a source draws on; None if it draws on none."""
        return self._bucket.get(source)

    def add(self, wanted: dict[Source, Bucket]) -> None:
        """Lets these sources draw on these limits. Idempotent. Raises KernelError, and then nothing has
        changed."""
        new = {source: bucket for source, bucket in wanted.items() if self._bucket.get(source) != bucket}
        new = _newest(new)
        if not new:
            return
        crowded = self._crowded(new)
        gone = [source for source in (*new, *crowded) if source in self._bucket]
        changes: list[Change] = [
            AddLimit(str(bucket), bucket.per_minute, bucket.burst) for bucket in self._without_object(new)
        ]
        changes += _deletions(gone)
        for family in "46":
            limits = {source.key: str(bucket) for source, bucket in new.items() if source.family == family}
            if limits:
                changes.append(Draw(RATE_LIMITS + family, limits))
        self._elements.commit(changes)
        for source in gone:
            self._discard(source)
        for source, bucket in new.items():
            self._store(source, bucket)

    def recheck(self, sources: Iterable[Source]) -> None:
        """Checks whether these sources are still in the kernel, and discards those that are not. A worker has met
        them, so another program may have deleted them. Raises OSError."""
        for source in [source for source in sources if source in self._bucket]:
            if self._elements.element(RATE_LIMITS + source.family, source.key) is None:
                self._discard(source)

    def deletions(self, sources: Iterable[Source]) -> list[Change]:
        """The changes that delete these sources, if they draw on a limit. The caller must call `deleted` after the
        transaction."""
        return _deletions([source for source in sources if source in self._bucket])

    def deleted(self, sources: Iterable[Source]) -> None:
        """Takes note that these sources were deleted in the kernel."""
        for source in sources:
            if source in self._bucket:
                self._discard(source)

    def all_deleted(self) -> None:
        """Takes note that all sources were deleted in the kernel. The limits are still there, with their fill
        levels."""
        self._bucket.clear()
        self._keys = {"4": {}, "6": {}}
        for sources in self._sources.values():
            sources.clear()

    def sources(self) -> Iterable[Source]:
        """All sources that draw on a limit."""
        return self._bucket.keys()

    def within(self, prefixes: Prefixes) -> list[Source]:
        """The sources that draw on a limit and are in these prefixes."""
        keys = self._keys
        return [keys[family][key] for family in "46" for key in prefixes.among(family, list(keys[family]))]

    def delete_unused(self, in_force: Callable[[Bucket], bool]) -> None:
        """Deletes the limits on which no source draws and that are not in force any more. Raises KernelError. A
        limit in force stays even without a source, because a new one would begin with a full bucket."""
        idle = [bucket for bucket, sources in self._sources.items() if not sources and not in_force(bucket)]
        if idle:
            self._elements.commit([DeleteLimit(str(bucket)) for bucket in idle])
        for bucket in idle:
            del self._sources[bucket]

    def _without_object(self, new: dict[Source, Bucket]) -> list[Bucket]:
        """The limits that have no object in the kernel yet."""
        return [bucket for bucket in dict.fromkeys(new.values()) if bucket not in self._sources]

    def _crowded(self, new: dict[Source, Bucket]) -> list[Source]:
        """The sources that must go: the oldest of each limit that would have too many, and the oldest of the
        largest limit if all limits together would have too many."""
        more = Counter(new.values())
        crowded: list[Source] = []
        for bucket, count in more.items():
            old = [source for source in self._sources.get(bucket, ()) if source not in new]
            crowded += old[: max(0, len(old) + count - _MAX_SOURCES_PER_LIMIT)]
        excess = len(self._bucket) + len(new) - len(crowded) - _MAX_SOURCES
        if excess > 0:
            largest = max(self._sources, key=lambda bucket: len(self._sources[bucket]))
            gone = set(crowded)
            rest = (source for source in self._sources[largest] if source not in new and source not in gone)
            crowded += islice(rest, excess)
        return crowded

    def _store(self, source: Source, bucket: Bucket) -> None:
        self._bucket[source] = bucket
        self._keys[source.family][source.key] = source
        self._sources.setdefault(bucket, {})[source] = None

    def _discard(self, source: Source) -> None:
        del self._sources[self._bucket.pop(source)][source]
        del self._keys[source.family][source.key]


def _newest(wanted: dict[Source, Bucket]) -> dict[Source, Bucket]:
    """The last sources of each limit, at most as many as it may have, in the order given."""
    taken: Counter[Bucket] = Counter()
    newest = {}
    for source, bucket in reversed(wanted.items()):
        taken[bucket] += 1
        if taken[bucket] <= _MAX_SOURCES_PER_LIMIT:
            newest[source] = bucket
    return dict(reversed(newest.items()))


def _deletions(sources: list[Source]) -> list[Change]:
    changes: list[Change] = []
    for family in "46":
        keys = [source.key for source in sources if source.family == family]
        if keys:
            changes.append(Delete(RATE_LIMITS + family, keys))
    return changes
