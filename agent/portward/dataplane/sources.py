"""Looks single sources up in the policy table, and writes the results into the kernel.

Packets bring most verdicts into the kernel by themselves. For sources that a worker has met the daemon writes two
kinds: rate limits, because packets cannot write the values of a map, and the verdicts that the forward guard asks
for, because a worker accepts its packets without a mark.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from portward.config.keys import Verdicts
from portward.dataplane.rate_limits import Bucket, RateLimits
from portward.dataplane.verdict_cache import Element, Source, VerdictCache
from portward.errors import KernelError
from portward.ipc import mark
from portward.ipc.mark import PacketOutcome, classify
from portward.model import ExemptionState
from portward.table.reader import Reader

# Verdicts for the forward guard that are cached in one step. There are at most 20 steps a second, so a flood of
# new sources fills neither the sets of denied sources (262,144 in 60 s) nor those of unknown ones (16,384 in
# 10 s).
_GUARD_STEP_SOURCES: Final = 64
# Packets fill a segment's share of a set by themselves. For the guard, this part of the share may be added.
_GUARD_PART: Final = 8

_log = logging.getLogger("portward")


class SourcePolicy:
    """The verdict and the rate limit of each source, by the policy table as it is when a method is called. Belongs
    to the kernel thread. No method takes a source of an unsettled interface: the table finds the policy of whoever
    had the interface before."""

    def __init__(self, reader: Reader, cache: VerdictCache, rate_limits: RateLimits) -> None:
        """`reader` belongs to the kernel thread alone."""
        self._reader, self._cache, self._rate_limits = reader, cache, rate_limits
        self._guard_budget = GuardBudget()

    def limit(self, sources: Iterable[Source]) -> None:
        """Lets those of these sources whose exemption carries a rate limit send within it. If the kernel refuses,
        the source's next packet asks again."""
        found = ((source, self.bucket(source)) for source in sources)
        wanted = {source: bucket for source, bucket in found if bucket is not None}
        try:
            self._rate_limits.add(wanted)
        except KernelError as error:
            _log.warning("sources with a rate limit stay blocked until they are tried again: %s", error)
            with contextlib.suppress(OSError):
                self._rate_limits.reload()

    def cache(self, sources: Sequence[Source], verdicts: Verdicts) -> None:
        """Caches the verdicts of these sources for the forward guard. A change that is committed after the lookup
        is carried out after the write, and forgets what it changes. A source gets no cached verdict if the set is
        full, or if its segment has used up its part of the sets' sizes in `verdicts`. Its next packet is sent to a
        worker again."""
        found = {
            source: verdict
            for source in sources[:_GUARD_STEP_SOURCES]
            if (verdict := self._verdict(source)) is not None and self._guard_budget.take(source.link, verdicts)
        }
        with contextlib.suppress(KernelError):
            self._cache.add(found)

    def is_wrong(self, element: Element) -> bool:
        """Whether a cached verdict is not the one that the table gives now."""
        return differs(self._reader, element)

    def has_wrong_limit(self, source: Source) -> bool:
        """Whether a source draws on another rate limit than the one that the table gives now."""
        return self.bucket(source) != self._rate_limits.bucket(source)

    def bucket(self, source: Source) -> Bucket | None:
        """The rate limit under which a source may send; None if it may not, or without one."""
        found = self._reader.lookup(source.link, source.address)
        if found is None or not found.limited or found.observed:
            return None
        owner = self._reader.owner(source.link, source.address)
        return None if owner is None or owner[1] is None else self._limit_of(owner[1].subscription)

    def delete_unused_limits(self) -> None:
        """Deletes rate limits that no source draws on and that are not in force any more."""
        with contextlib.suppress(KernelError):  # another process has changed the ruleset: `check` repairs it
            self._rate_limits.delete_unused(lambda bucket: self._limit_of(bucket.subscription) == bucket)

    def _verdict(self, source: Source) -> mark.Class | None:
        """The verdict that the kernel may cache; None if the source is unknown, or has a rate limit."""
        found = self._reader.lookup(source.link, source.address)
        if found is None:
            return None
        verdict, outcome = classify(found)
        return None if outcome is PacketOutcome.DEFERRED else verdict

    def _limit_of(self, subscription: int) -> Bucket | None:
        """The rate limit that an exemption grants to a subscription (the table's number)."""
        account = self._reader.account(subscription)
        exemption = None if account is None else account.exemption
        if exemption is None or exemption.state is not ExemptionState.GRANTED or exemption.limit is None:
            return None
        return Bucket.of(subscription, exemption.limit)


def differs(reader: Reader, element: Element) -> bool:
    """Whether a cached verdict is not the one that `reader` finds now."""
    found = reader.lookup(element.source.link, element.source.address)
    if found is None:
        return True
    verdict, outcome = classify(found)
    # A source with a rate limit must not be cached as allowed: it would send without its limit.
    return outcome is PacketOutcome.DEFERRED or verdict is not element.verdict


class GuardBudget:
    """How many verdicts the daemon may write for each interface in the time that a verdict lives, so that no
    segment fills a set."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        # Interface index → when its time began, and what was written since.
        self._written: dict[int, tuple[float, int]] = {}

    def take(self, link: int, verdicts: Verdicts) -> bool:
        """Whether one more verdict may be written for this interface; if so, it is counted."""
        now, most = self._clock(), max(1, verdicts.segment_sources // _GUARD_PART)
        began, written = self._written.get(link, (now, 0))
        if now - began > max(verdicts.allow_seconds, verdicts.deny_seconds):
            began, written = now, 0
        if written >= most:
            return False
        self._written[link] = began, written + 1
        return True
