"""Packets by segment, subscription and verdict: the differences of what the kernel's elements have counted.

An element's counter starts at nothing when its source is learned and ends with it, so what is added up is how
much each has risen since it was last read. Packets that an element counts between its last reading and its
end are not seen; while no element ends, the sums are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from portward.gateway.learned import Element, Source
from portward.gateway.mark import Class

# Clocks of kernel and process drift, and a reading takes time: seconds.
_SLACK: Final = 0.5


class Owner(NamedTuple):
    """Whose a source is: the segment's name, and the subscription's id as text, empty where unknown."""

    segment: str
    subscription: str


class _Reading(NamedTuple):
    packets: int
    ends: float


class Counts:
    """Sums that only rise, in packets: by segment and verdict, and by subscription and verdict."""

    def __init__(self, owner: Callable[[Source], Owner | None]) -> None:
        """`owner` gives whose a source is; None for one that nobody knows any more."""
        self._owner = owner
        self._read: dict[tuple[Class, Source], _Reading] = {}
        self.segments: Counter[tuple[str, Class]] = Counter()
        self.subscriptions: Counter[tuple[str, Class]] = Counter()
        self.remembered: Counter[Class] = Counter()

    def take_all(self, elements: Iterable[Element], now: float) -> None:
        """Takes a reading of all elements; `now` is a monotonic time in seconds."""
        present: dict[tuple[Class, Source], _Reading] = {}
        self.remembered.clear()
        for element in elements:
            present[element.verdict, element.source] = self._take(element, now)
            self.remembered[element.verdict] += 1
        self._read = present

    def take_last(self, elements: Iterable[Element], now: float) -> None:
        """Takes a last reading of elements that are about to be forgotten."""
        for element in elements:
            self._take(element, now)
            self._read.pop((element.verdict, element.source), None)

    def _take(self, element: Element, now: float) -> _Reading:
        before = self._read.get((element.verdict, element.source))
        # An element that should have ended since is another one, learned anew; so is one that counts less.
        same = before is not None and now < before.ends + _SLACK and element.packets >= before.packets
        risen = element.packets - before.packets if same and before is not None else element.packets
        if risen and (owner := self._owner(element.source)) is not None:
            self.segments[owner.segment, element.verdict] += risen
            self.subscriptions[owner.subscription, element.verdict] += risen
        return _Reading(element.packets, now + element.expires)
