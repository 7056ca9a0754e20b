"""The block of counters that a worker shares with the daemon: written by one, read by the other, no locks.

It is a memory file whose descriptor the worker inherits. Each number is 8 bytes, aligned and written by one
process only, so a reader sees the old or the new value, never half of one. Numbers only rise.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from portward.model import Reason

REASONS: Final = tuple(Reason)


class Outcome(IntEnum):
    """What became of a judged packet."""

    PASSED = 0
    DROPPED = 1
    RESET = 2
    OBSERVED = 3  # would have been dropped
    DEFERRED = 4  # dropped until the kernel knows the limit of its source


class Event(IntEnum):
    """What a worker meets besides verdicts."""

    MALFORMED = 0  # no TCP segment to a judged port could be read: dropped
    NO_SEGMENT = 1  # the table knows no segment behind the interface yet: dropped, not remembered
    RESET_FAILED = 2  # the reset could not be sent: dropped
    ERROR = 3  # the verdict could not be worked out: dropped, and the reason is in the log
    PROBED = 4  # a query of the self-check, answered


_OUTCOMES: Final = len(REASONS) * len(Outcome)
_SIZE: Final = (2 * _OUTCOMES + len(Event)) * 8


class Tally:
    """The counters of one worker: packets and connection attempts by reason and outcome, and events."""

    def __init__(self, descriptor: int) -> None:
        """Maps the block behind a descriptor that `create` gave."""
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")

    @staticmethod
    def create() -> int:
        """A descriptor of a new block of zeros."""
        descriptor = os.memfd_create("portward-tally")
        os.ftruncate(descriptor, _SIZE)
        return descriptor

    def verdict(self, reason: int, outcome: Outcome, *, attempt: bool) -> None:
        """Counts a judged packet; `reason` is the place of the reason in `REASONS`."""
        self.add(reason, outcome, packets=1, attempts=int(attempt))

    def add(self, reason: int, outcome: Outcome, *, packets: int, attempts: int) -> None:
        """Counts many packets with the same verdict, some of them attempts to connect."""
        place = reason * len(Outcome) + outcome
        self._numbers[place] += packets
        if attempts:
            self._numbers[_OUTCOMES + place] += attempts

    def event(self, event: Event) -> None:
        """Counts an event."""
        self._numbers[2 * _OUTCOMES + event] += 1

    def verdicts(self) -> Iterator[tuple[Reason, Outcome, int, int]]:
        """(reason, outcome, packets, connection attempts), only those that occurred."""
        for place in range(_OUTCOMES):
            if packets := self._numbers[place]:
                reason, outcome = divmod(place, len(Outcome))
                yield REASONS[reason], Outcome(outcome), packets, self._numbers[_OUTCOMES + place]

    def handled(self) -> int:
        """Packets handled so far, of whatever kind."""
        packets = sum(self._numbers[:_OUTCOMES])
        return packets + sum(self._numbers[2 * _OUTCOMES :])

    def events(self) -> dict[Event, int]:
        """How often each event has happened."""
        return {event: self._numbers[2 * _OUTCOMES + event] for event in Event}
