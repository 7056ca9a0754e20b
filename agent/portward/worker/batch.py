"""Packets of a queue → their verdicts, many at a time: the faster way to read a queue.

For each batch: receive, open one view of the policy table, classify every packet in it, close the view, send all
verdicts. The view begins after the packets were received, and each verdict carries the epoch of the generation
that this view shows; so a verdict is never older than its packet, and none that was found under another policy
is remembered (`learn` compares the epoch). No view is open while the worker waits or the kernel acts on verdicts.

A packet like thousands before it, a plain TCP segment with the mark of a miss, goes by the fields of its
`MessageTemplate`, and its source by what was found in the same snapshot for the addresses around it. Every other
one, and every one at which that fails, takes the way through `SlowPath.handle`, the same as with NetfilterQueue.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from portward.base.codes import REASON_NUMBER
from portward.ipc import mark
from portward.ipc.counters import PacketOutcome, WorkerCounters, WorkerEvent
from portward.ipc.verdict import classify
from portward.table.reader import LookupResult, Reader
from portward.worker.handover import POLL_INTERVAL_S, GracePeriod, bound
from portward.worker.messages import (
    ACCEPT,
    DROP,
    WHOLE,
    MessageTemplate,
    Packet,
    Refused,
    Verdicts,
    read,
    template_of,
)
from portward.worker.nfqueue import SLOT, Queue
from portward.worker.packet import ATTEMPTS
from portward.worker.slow_path import SlowPath

# Packets received at once: enough to share out what a batch costs, few enough that the first need not wait long.
BATCH: Final = 64
# Ranges of sources remembered, some 200 bytes each: all of a segment with half as many attachments.
_RANGES: Final = 4096
# So many sources that were in none of them, since there is room for no more, and all are forgotten: they are of
# no use.
_STRANGERS: Final = 16 * _RANGES
# As many shapes as honest traffic has: two families, checksums known or not, larger than what is copied or not.
_SHAPES: Final = 8
# The smallest message with a packet's id has 32 bytes.
_ROOM: Final = BATCH * (SLOT // 32)

_log = logging.getLogger("portward.worker")


class _NeedsSlowPath(Exception):  # noqa: N818 # no error: the packet takes the careful way
    """A packet that does not go by shape and source alone."""


# The shape of no message, until there has been one: as many fields as are taken, and constants that none has.
_NONE: Final = MessageTemplate(lambda buffer, start: (b"",) * 14, tuple, (), frozenset(), 0, 0)


class _PendingPacket:
    """A packet of ours as `SlowPath.handle` takes it."""

    def __init__(self, packet: Packet, id_: int, verdicts: Verdicts) -> None:
        self.indev, self.hook = packet.indev, packet.hook
        self._packet, self._id, self._verdicts, self._mark = packet, id_, verdicts, packet.mark

    def get_mark(self) -> int:
        return self._mark

    def get_payload(self) -> bytes:
        return self._packet.payload

    def get_hw(self) -> bytes | None:
        return self._packet.link_address

    def set_mark(self, mark: int) -> None:
        self._mark = mark

    def accept(self) -> None:
        self._verdicts.give(ACCEPT, self._id, self._mark)

    def drop(self) -> None:
        self._verdicts.give(DROP, self._id, self._mark)


class _Answer:
    """What is said of sources with one finding, and the packets and attempts of this batch that it was said of."""

    __slots__ = ("attempts", "outcome", "own", "packets", "reason")

    def __init__(self, finding: LookupResult, verdict: mark.Class, outcome: PacketOutcome) -> None:
        # Our half of the mark, as the message has it.
        self.own = mark.stamp(0, verdict, mark.epoch_of(finding.generation)).to_bytes(2, "big")
        self.reason, self.outcome = REASON_NUMBER[finding.reason], outcome
        self.packets = self.attempts = 0


class _RangeCache:
    """The answers to sources, by ranges of addresses: the same answer holds from one entry of the policy table to
    the next, so a few ranges soon know every source there is.

    A source is a number, made of interface index and address: those of one family and interface lie side by side,
    and IPv6 (20 bytes with the index, which is never 0) beyond all of IPv4 (8 bytes).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all."""
        # The first number of each range, ascending; its last one and the answer. Before all stands an empty range.
        self._starts = [-1]
        self._held: list[tuple[int, _Answer | None]] = [(-2, None)]
        self._strangers = 0

    def get(self, source: bytes) -> _Answer | None:
        """The answer to a source (index and address, big-endian)."""
        number = int.from_bytes(source, "big")
        last, answer = self._held[bisect_right(self._starts, number) - 1]
        return answer if number <= last else None

    def room(self) -> bool:
        """Whether one more range is taken, asked about a source that is in none."""
        if len(self._starts) < _RANGES:
            return True
        self._strangers += 1
        if self._strangers < _STRANGERS:
            return False
        self.clear()
        return True

    def put(self, index: bytes, size: int, reach: tuple[int, int], answer: _Answer) -> None:
        """Holds an answer for the addresses from one to another, of `size` bytes each."""
        offset = int.from_bytes(index, "big") << size * 8
        place = bisect_right(self._starts, offset + reach[0])
        self._starts.insert(place, offset + reach[0])
        self._held.insert(place, (offset + reach[1], answer))


class BatchReader:
    """Gives verdicts on batches; `careful` judges what is not of the common kind, over the same `reader`."""

    def __init__(self, queue: int, reader: Reader, careful: SlowPath, counters: WorkerCounters) -> None:
        self._reader, self._careful, self._tally = reader, careful, counters
        self._verdicts = Verdicts(queue, _ROOM)
        self._shapes: list[MessageTemplate] = []
        # What holds for one snapshot: the answer to each finding, and the answers to sources.
        self._snapshot = -1
        self._answers: dict[LookupResult, _Answer] = {}
        # The same for rejected sources while their segment's budget of resets is spent.
        self._unanswered: dict[LookupResult, _Answer] = {}
        self._known = _RangeCache()
        self._told: set[str] = set()

    def answer(self, buffer: bytearray, lengths: Iterable[tuple[int]]) -> memoryview:
        """Judges the datagrams that stand in the slots of the buffer, of so many bytes each; gives the verdicts,
        one for each packet, to be sent before the next call. Never raises."""
        waiting = enumerate(lengths)
        try:
            with self._reader.view() as snapshot:
                if snapshot != self._snapshot:
                    self._snapshot = snapshot
                    self._answers.clear()
                    self._unanswered.clear()
                    self._known.clear()
                self._judge(buffer, waiting)
        except Exception:
            # There is no view. What is left is judged without one, and what fails again is dropped, counted and
            # told.
            for number, (length,) in waiting:
                self._walk(buffer[number * SLOT : number * SLOT + length])
        self._count()
        return self._verdicts.take()

    def _count(self) -> None:
        try:
            for answer in (*self._answers.values(), *self._unanswered.values()):
                if answer.packets:
                    packets, attempts = answer.packets, answer.attempts
                    answer.packets = answer.attempts = 0
                    self._tally.add(answer.reason, answer.outcome, packets=packets, attempts=attempts)
        except Exception:  # out of memory, say: the verdicts matter more
            self._tell("packets were judged and could not be counted")

    def _judge(self, buffer: bytearray, waiting: Iterator[tuple[int, tuple[int]]]) -> None:
        """Judges what waits within a view. All that a packet costs is in this loop, hence its local names."""
        known, accept = self._known.get, self._verdicts.accept
        unpack, constants, expected, firsts, least, before = self._shapes[0] if self._shapes else _NONE
        for number, (length,) in waiting:
            start = number * SLOT
            try:
                fields = unpack(buffer, start)
                # The same as `MessageTemplate.asks`, without a call.
                _, id_, _, index, _, keep, *_, payload, _, first, fragment, _, source, flags = fields
                if not (
                    constants(fields) == expected
                    and first in firsts
                    and fragment in WHOLE
                    and payload >= least
                    and 0 <= length - payload - before < 4
                ):
                    unpack, constants, expected, firsts, least, before = self._shape(buffer, start, length)
                    _, id_, _, index, _, keep, *_, _, _, _, _, _, source, flags = unpack(buffer, start)
                answer = known(index + source) or self._look_up(index, source)
                answer.packets += 1
                answer.attempts += flags in ATTEMPTS
                accept(id_, keep, answer.own)
            except Exception:  # _NeedsSlowPath, or whatever fails: if it fails again it is told
                self._walk(buffer[start : start + length])

    def _shape(self, buffer: bytearray, start: int, length: int) -> MessageTemplate:
        """The shape of a message that is not of the one before; raises _NeedsSlowPath where it has none."""
        for place, shape in enumerate(self._shapes):
            if shape.asks(shape.unpack(buffer, start), length):
                self._shapes.insert(0, self._shapes.pop(place))
                return shape
        found = template_of(bytes(buffer[start : start + length]))
        if found is None:
            raise _NeedsSlowPath
        self._shapes.insert(0, found)
        del self._shapes[_SHAPES:]
        return found

    def _look_up(self, index: bytes, source: bytes) -> _Answer:
        """What is said of a source; raises _NeedsSlowPath where that takes more than a verdict."""
        finding = self._reader.lookup(int.from_bytes(index, "big"), source)
        if finding is None or finding.damaged:
            raise _NeedsSlowPath
        answer = self._answers.get(finding)
        if answer is None:
            verdict, outcome = classify(finding)
            if outcome is PacketOutcome.RESET and not self._careful.firsts.left(int.from_bytes(index, "big")):
                # Not kept for the source: there may be an answer in the next second.
                return self._unanswered.setdefault(finding, _Answer(finding, verdict, PacketOutcome.DROPPED))
            if outcome in (PacketOutcome.RESET, PacketOutcome.DEFERRED):
                raise _NeedsSlowPath
            answer = self._answers[finding] = _Answer(finding, verdict, outcome)
        if self._known.room():  # else many small ranges are asked for in turn, and to keep them costs more
            self._known.put(index, len(source), self._reader.reach(int.from_bytes(index, "big"), source), answer)
        return answer

    def _walk(self, datagram: bytearray) -> None:
        """Judges whatever a datagram holds, whatever it looks like; never raises."""
        for message in read(bytes(datagram)):
            if isinstance(message, Refused):
                # A packet may have vanished since: removing any hook drops all that wait.
                if message.errno not in (0, errno.ENOENT):
                    self._tell(f"the kernel refused a message of the worker: {os.strerror(message.errno)}")
            elif message.id is None:
                self._tally.event(WorkerEvent.ERROR)
                self._tell("a message of the queue names no packet: nothing can be answered")
            else:
                self._careful.handle(_PendingPacket(message, message.id, self._verdicts))

    def _tell(self, what: str) -> None:
        if what not in self._told:  # once: it would fill the log at the speed of the network
            self._told.add(what)
            _log.error(what)


def serve(
    number: int, length: int, batches: BatchReader, lifeline: int, ready: Callable[[], None], stay: GracePeriod
) -> None:
    """Binds the queue and answers its packets until the other end of `lifeline` is closed or SIGTERM comes, and
    from then on as long as it may `stay`.

    `length` is how many packets may wait; `ready` is called when the queue is bound. Raises OSError: EPERM where
    another process has the queue, or without CAP_NET_ADMIN.
    """
    queue = bound(lambda: Queue(number, length, BATCH))
    try:
        ready()
        poll = select.poll()
        poll.register(queue, select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while all(descriptor != lifeline for descriptor, _ in poll.poll()):
            _answer(queue, batches)
        poll.unregister(lifeline)
        while not stay.over():
            poll.poll(POLL_INTERVAL_S * 1000)
            _answer(queue, batches)
    finally:
        queue.close()


def _answer(queue: Queue, batches: BatchReader) -> None:
    if lengths := queue.receive():
        queue.send(batches.answer(queue.buffer, lengths))
