"""Packets by segment, subscription and verdict: the differences of what the kernel's elements have counted.

An element's counter starts at nothing when its source is learned and ends with it, so what is added up is how
much each has risen since it was last read. Packets that an element counts between its last reading and its
end are not seen; while no element ends, the sums are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Final, NamedTuple

from portward.gateway.learned import Element, Source
from portward.gateway.ruleset import Verdict

# Clocks of kernel and process drift, and a reading takes time: seconds.
_SLACK: Final = 0.5
# How long a change of policy waits for counting, in seconds.
_PATIENCE: Final = 0.002


class Owner(NamedTuple):
    """Whose a source is: the segment's name, and the subscription's id as text, empty where unknown."""

    segment: str
    subscription: str


class _Reading(NamedTuple):
    packets: int
    ends: float


class Counts:
    """Sums that only rise, in packets: by segment and verdict, and by subscription and verdict.

    One thread reads everything now and then, another one takes last readings of what it is about to forget.
    """

    def __init__(self, owner: Callable[[Source], Owner | None]) -> None:
        """`owner` gives whose a source is; None for one that nobody knows any more."""
        self._owner = owner
        self._lock = Lock()
        self._read: dict[tuple[Verdict, Source], _Reading] = {}
        self._forgotten: set[tuple[Verdict, Source]] = set()
        self.segments: Counter[tuple[str, Verdict]] = Counter()
        self.subscriptions: Counter[tuple[str, Verdict]] = Counter()
        self.remembered: Counter[Verdict] = Counter()

    def take_all(
        self,
        elements: Callable[[], Iterable[Element]],
        clock: Callable[[], float],
        counts_now: Callable[[Element], bool] = lambda _: True,
    ) -> None:
        """Takes a reading of all `elements`; `clock` gives a monotonic time in seconds. Those are remembered for
        which `counts_now` is true: an element may outlive what it was made by.

        An element that was read here and forgotten before it is added up was added up by `take_last`; should its
        source have been learned again since, the next reading finds all that the new element counted.
        """
        with self._lock:
            self._forgotten.clear()
        now, found = clock(), list(elements())
        with self._lock:
            present = {}
            for element in found:
                if (element.verdict, element.source) not in self._forgotten:
                    present[element.verdict, element.source] = self._take(element, now)
            self.remembered = Counter(element.verdict for element in found if counts_now(element))
            self._read = present

    def take_last(self, elements: Iterable[Element], now: float) -> None:
        """Takes a last reading of elements that are about to be forgotten; none where `take_all` is at work: what
        they counted since their last reading is missing then, and a revocation does not wait."""
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        try:
            for element in elements:
                self._take(element, now)
                self._read.pop((element.verdict, element.source), None)
                self._forgotten.add((element.verdict, element.source))
        finally:
            self._lock.release()

    def totals(self) -> tuple[Counter[tuple[str, Verdict]], Counter[tuple[str, Verdict]], Counter[Verdict]]:
        """Copies of the sums by segment and by subscription, and of how many sources are remembered."""
        with self._lock:
            return self.segments.copy(), self.subscriptions.copy(), self.remembered.copy()

    def _take(self, element: Element, now: float) -> _Reading:
        before = self._read.get((element.verdict, element.source))
        # An element that should have ended since is another one, learned anew; so is one that counts less.
        same = before is not None and now < before.ends + _SLACK and element.packets >= before.packets
        risen = element.packets - before.packets if same and before is not None else element.packets
        if risen and (owner := self._owner(element.source)) is not None:
            self.segments[owner.segment, element.verdict] += risen
            self.subscriptions[owner.subscription, element.verdict] += risen
        return _Reading(element.packets, now + element.expires)
