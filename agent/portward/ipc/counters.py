"""The block of counters that a worker shares with the daemon: written by one, read by the other, no locks.

It is a memory file whose descriptor the worker inherits. Each number is 8 bytes, aligned and written by one
process only, so a reader sees the old or the new value, never half of one. Numbers only rise.

The block begins with a header: what it is, the version of its layout, and how much room it has for reasons,
outcomes and events. Daemon and worker may come from different versions of portward: an upgrade replaces the
program while the daemon runs, and a worker that it starts then is the new one. A worker whose header would be
another one refuses the block. Every number in it has its place by an explicit code, never by the order of an enum.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from portward.base.codes import REASON_NUMBERS, REASON_OF
from portward.errors import PortwardError
from portward.model import Reason


class PacketOutcome(IntEnum):
    """What became of a judged packet. The numbers are places in the shared block: none is ever given again."""

    PASSED = 0
    DROPPED = 1
    RESET = 2
    OBSERVED = 3  # would have been dropped
    DEFERRED = 4  # dropped until the kernel knows the limit of its source


class WorkerEvent(IntEnum):
    """What a worker meets besides verdicts. The numbers are places in the shared block: none is given again."""

    MALFORMED = 0  # no TCP segment to a judged port could be read: dropped
    NO_SEGMENT = 1  # the table knows no segment behind the interface yet: dropped, not remembered
    RESET_FAILED = 2  # the reset could not be sent: dropped
    ERROR = 3  # the verdict could not be worked out: dropped, and the reason is in the log
    PROBED = 4  # a query of the self-check, answered
    DAMAGED = 5  # the source's entry in the table cannot be read: denied


class CountersError(PortwardError):
    """The block of counters was made by another version of portward."""


# Raised with every change of the layout or of what a number means.
VERSION: Final = 1
# Room for outcomes and events, so that a new one moves no other.
_OUTCOMES: Final = 8
_EVENTS: Final = 16
_HEADER: Final = struct.pack("<8s4H", b"portward", VERSION, REASON_NUMBERS, _OUTCOMES, _EVENTS)
# Where the numbers begin, in numbers of 8 bytes: packets, then connection attempts, then events.
_PACKETS: Final = len(_HEADER) // 8
_ATTEMPTS: Final = _PACKETS + REASON_NUMBERS * _OUTCOMES
_HAPPENED: Final = _ATTEMPTS + REASON_NUMBERS * _OUTCOMES
_SIZE: Final = (_HAPPENED + _EVENTS) * 8


class WorkerCounters:
    """The counters of one worker: packets and connection attempts by reason and outcome, and events."""

    def __init__(self, descriptor: int) -> None:
        """Maps the block behind a descriptor that `create` gave; raises CountersError if another version made
        it."""
        header = os.pread(descriptor, len(_HEADER), 0)
        if header != _HEADER or os.fstat(descriptor).st_size != _SIZE:
            raise CountersError(
                "the agent that started this worker is of another version of portward: its counters have other "
                "places; restart the agent"
            )
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._numbers = memoryview(self._memory).cast("Q")

    @staticmethod
    def create() -> int:
        """A descriptor of a new block of zeros."""
        descriptor = os.memfd_create("portward-counters")
        os.ftruncate(descriptor, _SIZE)
        os.pwrite(descriptor, _HEADER, 0)
        return descriptor

    def verdict(self, reason: int, outcome: PacketOutcome, *, attempt: bool) -> None:
        """Counts a judged packet; `reason` is a number of `codes.REASON_NUMBER`."""
        self.add(reason, outcome, packets=1, attempts=int(attempt))

    def add(self, reason: int, outcome: PacketOutcome, *, packets: int, attempts: int) -> None:
        """Counts many packets with the same verdict, some of them attempts to connect."""
        place = reason * _OUTCOMES + outcome
        self._numbers[_PACKETS + place] += packets
        if attempts:
            self._numbers[_ATTEMPTS + place] += attempts

    def event(self, event: WorkerEvent) -> None:
        """Counts an event."""
        self._numbers[_HAPPENED + event] += 1

    def verdicts(self) -> Iterator[tuple[Reason, PacketOutcome, int, int]]:
        """(reason, outcome, packets, connection attempts), only those that occurred."""
        for number, reason in REASON_OF.items():
            for outcome in PacketOutcome:
                place = number * _OUTCOMES + outcome
                if packets := self._numbers[_PACKETS + place]:
                    yield reason, outcome, packets, self._numbers[_ATTEMPTS + place]

    def handled(self) -> int:
        """Packets handled so far, of whatever kind."""
        return sum(self._numbers[_PACKETS:_ATTEMPTS]) + sum(self._numbers[_HAPPENED:])

    def events(self) -> dict[WorkerEvent, int]:
        """How often each event has happened."""
        return {event: self._numbers[_HAPPENED + event] for event in WorkerEvent}
