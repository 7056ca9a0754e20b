"""The block of counters that a worker shares with the daemon. The worker writes it, the daemon reads it, without
locks.

It is a memory file whose descriptor the worker inherits. Each number has 8 bytes, is aligned, and is written by
one process alone, so a reader sees the old or the new value and never half of one. Numbers only rise.

The block begins with a header: its name, the version of its layout, and how much room it has for reasons, outcomes
and events. Daemon and worker may be of different versions of portward, because an upgrade replaces the program
while the daemon runs, and a worker that the daemon starts after that is the new one. A worker whose header would
differ refuses the block. Explicit codes give every number its place; the order of an enum never does.
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
from portward.ipc.mark import PacketOutcome
from portward.model import Reason


class WorkerEvent(IntEnum):
    """Events that a worker counts besides verdicts. The numbers are places in the shared block. A number is never
    given to another event."""

    MALFORMED = 0  # no TCP segment to a policy port could be read; the packet is dropped
    NO_SEGMENT = 1  # the table knows no segment behind the interface yet; dropped, not cached
    RESET_FAILED = 2  # the reset could not be sent; the packet is dropped
    ERROR = 3  # no verdict could be found; the packet is dropped, and the log says why
    PROBED = 4  # a question of the self-check was answered
    DAMAGED = 5  # the source's entry in the table cannot be read; the source is denied


class CountersError(PortwardError):
    """The block of counters was made by another version of portward."""


# Raise it with every change of the layout or of what a number means.
VERSION: Final = 1
# Places reserved for outcomes and events, so that a new one moves no other.
_OUTCOMES: Final = 8
_EVENTS: Final = 16
_HEADER: Final = struct.pack("<8s4H", b"portward", VERSION, REASON_NUMBERS, _OUTCOMES, _EVENTS)
# Offsets in units of 8 bytes: packets, then connection attempts, then events.
_PACKETS: Final = len(_HEADER) // 8
_ATTEMPTS: Final = _PACKETS + REASON_NUMBERS * _OUTCOMES
_HAPPENED: Final = _ATTEMPTS + REASON_NUMBERS * _OUTCOMES
_SIZE: Final = (_HAPPENED + _EVENTS) * 8


class WorkerCounters:
    """The counters of one worker: packets and connection attempts by reason and outcome, and events."""

    def __init__(self, descriptor: int) -> None:
        """Maps the block behind a descriptor from `create`. Raises CountersError if another version made it."""
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
        """The descriptor of a new block, with all numbers zero."""
        descriptor = os.memfd_create("portward-counters")
        os.ftruncate(descriptor, _SIZE)
        os.pwrite(descriptor, _HEADER, 0)
        return descriptor

    def verdict(self, reason: int, outcome: PacketOutcome, *, attempt: bool) -> None:
        """Counts a packet with a verdict; `reason` is a number of `codes.REASON_NUMBER`."""
        self.add(reason, outcome, packets=1, attempts=int(attempt))

    def add(self, reason: int, outcome: PacketOutcome, *, packets: int, attempts: int) -> None:
        """Counts packets with the same verdict, of which `attempts` are attempts to connect."""
        place = reason * _OUTCOMES + outcome
        self._numbers[_PACKETS + place] += packets
        if attempts:
            self._numbers[_ATTEMPTS + place] += attempts

    def event(self, event: WorkerEvent) -> None:
        """Counts an event."""
        self._numbers[_HAPPENED + event] += 1

    def verdicts(self) -> Iterator[tuple[Reason, PacketOutcome, int, int]]:
        """Reason, outcome, packets and connection attempts, for each pair that occurred."""
        for number, reason in REASON_OF.items():
            for outcome in PacketOutcome:
                place = number * _OUTCOMES + outcome
                if packets := self._numbers[_PACKETS + place]:
                    yield reason, outcome, packets, self._numbers[_ATTEMPTS + place]

    def handled(self) -> int:
        """Packets handled so far, of every kind."""
        return sum(self._numbers[_PACKETS:_ATTEMPTS]) + sum(self._numbers[_HAPPENED:])

    def events(self) -> dict[WorkerEvent, int]:
        """How often each event occurred."""
        return {event: self._numbers[_HAPPENED + event] for event in WorkerEvent}
